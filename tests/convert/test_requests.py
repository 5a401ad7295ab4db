"""What is asked for and cannot be had is refused in words, before anything is written."""

import threading
import warnings
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas
import pytest
import scipy.sparse

import scdl_gpu
from scdl_gpu.archive.raw import open_raw
from scdl_gpu.convert import convert_h5ad
from scdl_gpu.convert.frames import read_guarded
from scdl_gpu.errors import MissingMatrixError, SourceError


def annotated(n: int = 4, width: int = 2, **members: Any) -> anndata.AnnData:
    """Make an AnnData of n cells and three genes, with X_pca."""
    x = scipy.sparse.csr_matrix(np.eye(n, 3, dtype=np.float32))
    names = [f"cell_{k}" for k in range(n)]
    return anndata.AnnData(x, obs=pandas.DataFrame(index=names), obsm={"X_pca": np.ones((n, width))}, **members)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": 0.5}, r"tolerance=0\.5 needs a data_dtype \(--data-dtype\)"),
        ({"tolerance": float("nan"), "data_dtype": "uint8"}, "tolerance=nan is no difference"),
        ({"tolerance": float("nan")}, "tolerance=nan is no difference"),
        ({"tolerance": -1.0, "data_dtype": "uint8"}, r"tolerance=-1\.0 is no difference"),
        ({"tolerance": "much", "data_dtype": "uint8"}, "tolerance='much' is no difference"),
        ({"x": "layers/"}, "x='layers/' names no matrix"),
    ],
)
def test_options_that_say_nothing(archive: Path, options: dict[str, Any], message: str) -> None:
    """A tolerance without a dtype, one that is no number, and a layer without a name are refused."""
    with pytest.raises(ValueError, match=message):
        convert_h5ad(annotated(), archive, **options)

    assert not archive.exists()


def test_a_matrix_is_named_by_text(archive: Path) -> None:
    """An x of another type is a TypeError that says what is expected."""
    with pytest.raises(TypeError, match=r'x=3 is a int; expected text: "auto", "X"'):
        convert_h5ad(annotated(), archive, x=3)  # type: ignore[arg-type]


def test_what_is_no_source_is_told_what_is(archive: Path) -> None:
    """The message lists all kinds of sources."""
    with pytest.raises(SourceError, match=r"an archive, a directory of h5ad files, an AnnData, .* or a list of those"):
        convert_h5ad(5, archive)


def test_a_source_without_any_matrix(archive: Path) -> None:
    """Nobody asked for X: the message says that there is none at all."""
    with pytest.raises(MissingMatrixError, match="has no matrix at all") as caught:
        convert_h5ad(anndata.AnnData(obs=pandas.DataFrame(index=["a"])), archive)

    assert "'X'" not in str(caught.value)


def test_a_source_with_layers_only(archive: Path) -> None:
    """Where there is neither raw nor X, the layers are offered, as Python and as a shell spell it."""
    adata = anndata.AnnData(obs=pandas.DataFrame(index=["a"]), layers={"counts": np.ones((1, 2))}, shape=(1, 2))

    with pytest.raises(MissingMatrixError, match=r"has no X and no raw; it has layers/counts: .* x='layers/counts' \(--x layers/counts\)"):
        convert_h5ad(adata, archive)


def test_the_error_of_a_missing_matrix_is_public() -> None:
    """It can be caught by its public name."""
    assert scdl_gpu.MissingMatrixError is MissingMatrixError


def test_vectors_of_different_widths(tmp_path: Path, archive: Path) -> None:
    """Arrays asked for are not dropped: widths that differ are an error that names sources and widths."""
    for name, width in (("a", 2), ("b", 3)):
        annotated(width=width).write_h5ad(tmp_path / f"{name}.h5ad")
    convert_h5ad(tmp_path / "b.h5ad", tmp_path / "b", obsm=["X_pca"])

    for second in ("b.h5ad", "b"):
        with pytest.raises(SourceError, match=rf"obsm\['X_pca'\] .* 2 in \S*a\.h5ad, 3 in \S*{second} a row"):
            convert_h5ad([tmp_path / "a.h5ad", tmp_path / second], archive, obsm=["X_pca"])

    assert not archive.exists()


@pytest.mark.parametrize("kind", ["obsm", "obsp"])
def test_an_archive_that_lacks_what_is_asked_for(tmp_path: Path, archive: Path, kind: str) -> None:
    """Keys that an archive does not have are refused, alone and among others."""
    members = {"obsp": {"distances": np.eye(4)}}
    convert_h5ad(annotated(**members), tmp_path / "a", obsm=["X_pca"], obsp=["distances"])

    for source in (tmp_path / "a", [tmp_path / "a", annotated(**members)]):
        with pytest.raises(MissingMatrixError, match=rf"a has no {kind}\['other'\]; it has (X_pca|distances)"):
            convert_h5ad(source, archive, **{kind: ["other"]})
    convert_h5ad(tmp_path / "a", archive, obsm=["X_pca"], obsp=["distances"])

    assert list(open_raw(archive).obsm) == ["X_pca"]


@pytest.mark.parametrize("labels", [["dose", "dose"], [1, "1"]])
def test_two_columns_of_one_name(archive: Path, labels: list[Any]) -> None:
    """Names that are equal, or equal as text, are an error that says which."""
    adata = annotated()
    table = pandas.DataFrame(np.ones((4, 2)), index=adata.obs_names, columns=labels)
    adata._obs = table

    with pytest.raises(SourceError, match=rf"AnnData\.obs has 2 columns named '{labels[1]}'"):
        convert_h5ad(adata, archive)


@pytest.mark.parametrize(
    "values",
    [
        pandas.Series(pandas.period_range("2020", periods=4, freq="D")),
        pandas.Series(pandas.interval_range(0, 4)),
        pandas.Series(pandas.Categorical(pandas.interval_range(0, 4))),
        pandas.Series([1j, 2, 3, 4]),
        pandas.Series([[1], [2], [3], [4]]),
    ],
    ids=["period", "interval", "categories", "complex", "lists"],
)
def test_columns_that_cannot_be_stored(archive: Path, values: Any) -> None:
    """Values of types that no archive holds are refused, naming table, column and dtype."""
    adata = annotated()
    adata.obs["when"] = values.to_numpy() if values.dtype.kind == "c" else values.array

    with pytest.raises(SourceError, match=r"AnnData\.obs\['when'\], of dtype .*, cannot be stored .* turn it into text"):
        convert_h5ad(adata, archive)

    assert not archive.exists()


def test_an_archive_inside_its_source(tmp_path: Path) -> None:
    """An archive cannot lie in the directory, or the archive, that it is made of."""
    annotated().write_h5ad(tmp_path / "a.h5ad")
    convert_h5ad(tmp_path / "a.h5ad", tmp_path / "old")

    for source in (tmp_path, tmp_path / "old", [tmp_path / "a.h5ad", tmp_path]):
        with pytest.raises(ValueError, match=r"old/new lies in .*, which is to be converted; choose a path outside"):
            convert_h5ad(source, tmp_path / "old" / "new")

    assert not (tmp_path / "old" / "new").exists()


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    """The error names the archive, not the files that writing begins with."""
    (tmp_path / "file").touch()

    with pytest.raises(OSError, match=r"file/archive") as caught:
        convert_h5ad(annotated(), tmp_path / "file" / "archive")
    with pytest.raises(OSError, match="/proc/archive") as second:
        convert_h5ad(annotated(), "/proc/archive")

    assert ".lock" not in str(caught.value) + str(second.value)


def test_reading_in_threads_leaves_the_filters_of_warnings_alone() -> None:
    """However reads overlap, the filters are afterwards what they were before."""
    before, inside, go = list(warnings.filters), threading.Event(), threading.Event()
    slow = threading.Thread(target=read_guarded, args=("slow", lambda: (inside.set(), go.wait(10))))
    fast = threading.Thread(target=read_guarded, args=("fast", lambda: None))
    slow.start()
    inside.wait(10)
    fast.start()
    fast.join(0.2)

    go.set()
    slow.join()
    fast.join()

    assert list(warnings.filters) == before
