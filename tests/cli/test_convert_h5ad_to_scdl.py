"""`convert_h5ad_to_scdl`: bionemo-scdl's command, side by side with it."""

import sys
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pytest
import scipy.sparse
from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset as Reference
from bionemo.scdl.scripts import convert_h5ad_to_scdl as reference

from scdl_gpu.archive.raw import open_raw

Make = Callable[..., Path]


@pytest.fixture
def files(make_h5ad: Make, tmp_path: Path) -> Path:
    """Give a directory of two files with raw.X and different genes, one of them deeper."""
    (tmp_path / "in" / "deep").mkdir(parents=True)
    make_h5ad("in/b.h5ad", 7, 5, raw=True)
    make_h5ad("in/deep/a.h5ad", 4, 6, seed=1, raw=True)
    return tmp_path / "in"


def rows_of(path: Path) -> list[tuple[list[float], list[int]]]:
    """Read all rows with bionemo-scdl."""
    dataset = Reference(str(path))
    return [(values.tolist(), columns.tolist()) for values, columns in (dataset.get_row(k)[0] for k in range(len(dataset)))]


def test_rows_are_those_of_bionemo_scdl(shell: Callable, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command line gives the same rows, dtypes and number of genes; parents of the output are made."""
    monkeypatch.setattr(sys, "argv", ["x", "--data-path", str(files), "--save-path", str(tmp_path / "theirs"), "--use-X-not-raw"])
    reference.main()

    done = shell("convert_h5ad_to_scdl", "--data-path", files, "--save-path", tmp_path / "new" / "ours", "--use-X-not-raw")

    assert (done.returncode, done.stderr) == (0, "")
    assert "cells     11\n" in done.stdout
    ours = tmp_path / "new" / "ours"
    assert rows_of(ours) == rows_of(tmp_path / "theirs")
    assert open_raw(ours).dtypes["data.npy"] == "float32"
    assert Reference(str(ours)).shape() == Reference(str(tmp_path / "theirs")).shape() == (11, [5, 6])


@pytest.mark.parametrize("mark", ["-", "_"])
def test_flags_have_two_spellings(run_reference: Callable, files: Path, tmp_path: Path, mark: str) -> None:
    """Every flag of bionemo-scdl is taken, with dashes and with underscores."""
    words = {
        "data-path": files,
        "save-path": tmp_path / "out",
        "num-workers": 2,
        "data-dtype": "uint8",
        "paginated-load-cutoff": 1,
        "load-block-row-size": 3,
    }
    flags = [part for name, value in words.items() for part in ("--" + name.replace("-", mark), value)]

    result = run_reference(*flags, "--use-X-not-raw".replace("-X-not-", f"{mark}X{mark}not{mark}"))

    assert result.exit_code == 0, result.stderr
    archive = open_raw(tmp_path / "out")
    assert (archive.dtypes["data.npy"], archive.var.column_dims()) == ("uint8", [5, 6])
    assert archive.metadata["x"] == "X"


def test_raw_is_the_default(run_reference: Callable, files: Path, tmp_path: Path) -> None:
    """Without --use-X-not-raw it is raw.X, with the genes of raw.var."""
    result = run_reference("--data-path", files, "--save-path", tmp_path / "out")

    assert result.exit_code == 0, result.stderr
    assert open_raw(tmp_path / "out").var.column_dims() == [7, 8]


def test_rows_are_stored_as_they_are(run_reference: Callable, tmp_path: Path) -> None:
    """Order, duplicates and explicit zeros stay as the file has them."""
    (tmp_path / "in").mkdir()
    matrix = scipy.sparse.csr_matrix((np.array([2, 0, 3, 1], "float32"), [2, 1, 2, 0], [0, 3, 4]), shape=(2, 3))
    anndata.AnnData(matrix).write_h5ad(tmp_path / "in" / "a.h5ad")

    result = run_reference("--data-path", tmp_path / "in", "--save-path", tmp_path / "out", "--use-X-not-raw")

    assert result.exit_code == 0, result.stderr
    archive = open_raw(tmp_path / "out")
    assert (archive.indices.tolist(), archive.data.tolist(), archive.canonical) == ([2, 1, 2, 0], [2, 0, 3, 1], False)


def test_neighbours_can_be_kept(run_reference: Callable, files: Path, tmp_path: Path) -> None:
    """--load-neighbors keeps the graph of every file, which bionemo-scdl's command cannot."""
    for file in files.rglob("*.h5ad"):
        adata = anndata.read_h5ad(file)
        adata.obsp["near"] = scipy.sparse.csr_matrix(np.eye(adata.n_obs, k=1))
        adata.write_h5ad(file)

    result = run_reference("--data-path", files, "--save-path", tmp_path / "out", "--load-neighbors", "--neighbor-key", "near")

    assert result.exit_code == 0, result.stderr
    graph = open_raw(tmp_path / "out").neighbors
    assert graph is not None
    assert graph.indices.tolist() == [1, 2, 3, 4, 5, 6, 8, 9, 10]


def test_nothing_lies_outside_the_output(shell: Callable, files: Path, tmp_path: Path) -> None:
    """TMPDIR stays empty, as does what is beside the output, when the command works and when it fails."""
    temporary, target = tmp_path / "tmp", tmp_path / "target"
    temporary.mkdir()
    target.mkdir()
    arguments = ("--data-path", files, "--save-path")

    done = shell("convert_h5ad_to_scdl", *arguments, target / "good", TMPDIR=str(temporary))
    (files / "c.h5ad").write_bytes(b"no HDF5")
    failed = shell("convert_h5ad_to_scdl", *arguments, target / "bad", "--use-mp", TMPDIR=str(temporary))

    assert (done.returncode, failed.returncode) == (0, 1)
    assert f"error: Error in processing file {files / 'c.h5ad'}" in failed.stderr
    assert list(temporary.iterdir()) == []
    assert [file.name for file in target.iterdir()] == ["good"]


def test_existing_outputs_are_refused_before_anything_is_read(run_reference: Callable, files: Path, tmp_path: Path) -> None:
    """bionemo-scdl moves data into an existing output and then fails; here it is refused at once and stays as it is."""
    (tmp_path / "out").mkdir()
    for file in files.rglob("*.h5ad"):
        file.write_bytes(b"no HDF5")

    result = run_reference("--data-path", files, "--save-path", tmp_path / "out")

    assert result.exit_code == 1
    assert result.stderr == f"error: {tmp_path / 'out'} exists already; choose another path, or remove it first\n"
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "error: --data-path {} is not there; a directory"),
        (lambda path: path.mkdir(), "error: There a no h5ad files in {}."),
        (lambda path: path.touch(), "error: --data-path {} is a file, a directory of h5ad files is expected: give "),
    ],
)
def test_directories_without_files_are_named(run_reference: Callable, tmp_path: Path, make: Callable, message: str) -> None:
    """What is not there, holds no h5ad file or is one ends with code 1, each told from the others."""
    make(tmp_path / "in")

    result = run_reference("--data-path", tmp_path / "in", "--save-path", tmp_path / "out")

    assert result.exit_code == 1
    assert result.stderr.startswith(message.format(tmp_path / "in"))
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_files_without_raw_say_how_to_use_x(run_reference: Callable, make_h5ad: Make, tmp_path: Path) -> None:
    """Where there is no raw.X the fault names the file and the cure."""
    (tmp_path / "in").mkdir()
    source = make_h5ad("in/a.h5ad")

    result = run_reference("--data-path", tmp_path / "in", "--save-path", tmp_path / "out")

    assert result.exit_code == 1
    assert f"Error in processing file {source}: This file does not have raw count data; set --use-X-not-raw" in result.stderr


@pytest.mark.parametrize("flags", [(), ("--use-mp",)])
def test_losses_are_warned_of(shell: Callable, tmp_path: Path, flags: tuple[str, ...]) -> None:
    """As in bionemo-scdl a dtype that does not hold the values is a warning, in one line a file, and the archive is made."""
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        anndata.AnnData(scipy.sparse.csr_matrix([[1.5, 0.0]])).write_h5ad(tmp_path / "in" / f"{name}.h5ad")
    arguments = ("--data-path", tmp_path / "in", "--save-path", tmp_path / "out", "--use-X-not-raw", "--data-dtype", "uint8", *flags)

    done = shell("convert_h5ad_to_scdl", *arguments)

    lines = done.stderr.splitlines()
    assert done.returncode == 0
    assert len(lines) == 2
    assert all(line.startswith("warning: Downcasted data values for 'data.npy' are not close to original values.") for line in lines)
    assert all(line.endswith("use a --data-dtype that holds them (float16, float32, float64)") for line in lines)
