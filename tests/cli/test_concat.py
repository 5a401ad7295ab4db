"""`scdl-gpu concat`: archives one after the other; what cannot be joined is refused before anything is written."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset as Reference

from scdl_gpu.archive.features import ObservedFeatureIndex, VariableFeatureIndex
from scdl_gpu.archive.raw import open_raw
from scdl_gpu.archive.writer import finish
from scdl_gpu.convert import convert_h5ad

Make = Callable[..., Path]


@pytest.fixture
def archives(make_h5ad: Make, tmp_path: Path) -> list[Path]:
    """Give archives of 5, 3 and 4 rows: the first two share their genes, the second holds float32, so does the third."""
    sources = [make_h5ad("a.h5ad", 5, 6), make_h5ad("b.h5ad", 3, 6, seed=1), make_h5ad("c.h5ad", 4, 8, seed=2)]
    return [convert_h5ad(source, tmp_path / source.stem, data_dtype="float32") for source in sources]


def test_rows_follow_each_other(shell: Callable, archives: list[Path], dense_of: Callable, tmp_path: Path) -> None:
    """Rows, names and genes of all archives are there, in the order given; the archives stay; bionemo-scdl opens the result."""
    parts = [dense_of(archive, 8) for archive in archives]

    done = shell("scdl-gpu", "concat", *archives, tmp_path / "all")

    assert (done.returncode, done.stderr) == (0, "")
    assert "cells     12\n" in done.stdout
    np.testing.assert_array_equal(dense_of(tmp_path / "all", 8), np.concatenate(parts))
    joined = open_raw(tmp_path / "all")
    assert joined.var.column_dims() == [6, 8]
    assert joined.obs.names is not None
    assert joined.obs.names.tolist() == [f"cell_{k}" for n in (5, 3, 4) for k in range(n)]
    assert Reference(str(tmp_path / "all")).shape() == (12, [6, 8])
    assert all(archive.is_dir() for archive in archives)


def test_integers_and_floats_are_not_mixed(run: Callable, archives: list[Path], make_h5ad: Make, tmp_path: Path) -> None:
    """A mixture is refused with a command that cures it, which does."""
    convert_h5ad(make_h5ad("d.h5ad", 2, 6), tmp_path / "counts", data_dtype="uint16")

    refused = run("concat", tmp_path / "counts", archives[0], tmp_path / "all")
    cured = run("convert", tmp_path / "counts", tmp_path / "floats", "--data-dtype", "float32")
    joined = run("concat", tmp_path / "floats", archives[0], tmp_path / "all")

    assert refused.exit_code == 1
    assert "Cannot merge datasets with a mix of int and float dtypes for data: " in refused.stderr
    assert f"`scdl-gpu convert {tmp_path / 'counts'} NEW --data-dtype float32`" in refused.stderr
    assert (cured.exit_code, joined.exit_code) == (0, 0)
    assert open_raw(tmp_path / "all").n_rows == 7


def test_the_cure_names_the_archive_to_convert(run: Callable, archives: list[Path], make_h5ad: Make, tmp_path: Path) -> None:
    """Where the first archive has floats, it is the integers that are to be converted; wide ones need float64."""
    convert_h5ad(make_h5ad("d.h5ad", 2, 6), tmp_path / "counts", data_dtype="uint32")

    result = run("concat", archives[0], tmp_path / "counts", tmp_path / "all")

    assert f"`scdl-gpu convert {tmp_path / 'counts'} NEW --data-dtype float64`" in result.stderr


def test_outputs_that_exist_are_refused(run: Callable, archives: list[Path], tmp_path: Path) -> None:
    """An archive is never written over, not even by a concat of which it is a part."""
    before = (archives[0] / "data.npy").read_bytes()

    result = run("concat", archives[1], archives[0], archives[0])

    assert result.exit_code == 1
    assert "exists already" in result.stderr
    assert (archives[0] / "data.npy").read_bytes() == before


def test_outputs_inside_an_input_are_refused(run: Callable, archives: list[Path]) -> None:
    """An archive holds nothing but its own files."""
    result = run("concat", *archives, archives[1] / "all")

    assert result.exit_code == 1
    assert f"{archives[1] / 'all'} lies inside {archives[1]}" in result.stderr
    assert not (archives[1] / "all").exists()


def test_damaged_archives_are_named(run: Callable, archives: list[Path], tmp_path: Path) -> None:
    """An archive cut short is named with its file, and nothing is written."""
    with (archives[1] / "data.npy").open("r+b") as file:
        file.truncate(4)

    result = run("concat", *archives, tmp_path / "all")

    assert result.exit_code == 1
    assert str(archives[1] / "data.npy") in result.stderr
    assert not (tmp_path / "all").exists()


def test_archives_without_features_are_refused(run: Callable, archives: list[Path], tmp_path: Path) -> None:
    """Rows whose genes nobody knows would take those of their neighbours: they are refused."""
    dtypes = open_raw(archives[1]).dtypes
    shutil.rmtree(archives[1] / "var_features")
    shutil.rmtree(archives[1] / "obs_features")
    finish(archives[1], dtypes=dtypes, var=VariableFeatureIndex(), obs=ObservedFeatureIndex(), canonical=True)

    result = run("concat", *archives, tmp_path / "all")

    assert result.exit_code == 1
    assert str(archives[1]) in result.stderr
    assert "var table" in result.stderr
