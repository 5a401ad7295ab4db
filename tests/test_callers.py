"""Warnings point at the line that called this package, however deep in it they are raised."""

import re
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import scipy.sparse as sp

from scdl_gpu import GPUBatchLoader, SingleCellCollection, SingleCellMemMapDataset, callers, convert_h5ad
from scdl_gpu.archive.raw import open_raw

PACKAGE = Path(callers.__file__).parent
Make = Callable[..., Path]


def lines_of(call: Callable[[], Any]) -> list[tuple[str, str]]:
    """Return file and text of the line that each warning of a call points at."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert caught
    return [(one.filename, Path(one.filename).read_text().splitlines()[one.lineno - 1].strip()) for one in caught]


@pytest.mark.parametrize("depth", [0, 1, 7])
def test_the_first_line_outside_the_package_is_named(depth: int) -> None:
    """Frames of modules of the package are passed over, those of others are not, whatever they are called."""
    source = "def call(callers, n):\n    return call(callers, n - 1) if n else callers.warn('odd')"
    inside: dict[str, Any] = {}
    exec(compile(source, str(PACKAGE / "archive" / "raw.py"), "exec"), inside)

    found = lines_of(lambda: inside["call"](callers, depth))

    assert found == [(__file__, 'found = lines_of(lambda: inside["call"](callers, depth))')]


def test_a_folder_whose_name_begins_alike_is_outside() -> None:
    """scdl_gpu_more/ beside scdl_gpu/ is a caller."""
    other: dict[str, Any] = {}
    exec(compile("def call(callers): callers.warn('odd')", f"{PACKAGE}_more/a.py", "exec"), other)

    with pytest.warns(UserWarning, match="odd") as caught:
        other["call"](callers)

    assert caught[0].filename == f"{PACKAGE}_more/a.py"


@pytest.fixture
def headerless(make_h5ad: Make, tmp_path: Path) -> Path:
    """Give an archive without a header: each way to open it warns."""
    path = convert_h5ad(make_h5ad(), tmp_path / "old", data_dtype="float32")
    (path / "header.sch").unlink()
    return path


def test_every_way_to_open_an_archive(headerless: Path) -> None:
    """However many functions lie between: the warning names the line that opened it."""
    ways = {
        "open_raw": lambda: open_raw(headerless),
        "a dataset": lambda: SingleCellMemMapDataset(headerless),
        "a loader": lambda: GPUBatchLoader(headerless, device="cpu"),
    }

    found = {way: lines_of(call) for way, call in ways.items()}

    for (way, call), lines in zip(ways.items(), found.values(), strict=True):
        assert lines == [(__file__, Path(__file__).read_text().splitlines()[call.__code__.co_firstlineno - 1].strip())], way


@pytest.fixture
def halves(tmp_path: Path) -> Path:
    """Give a file whose values float16 does not hold."""
    x = sp.csr_matrix(np.array([[0, 70_000.5], [1, 0]], np.float32))
    anndata.AnnData(x).write_h5ad(tmp_path / "halves.h5ad")
    return tmp_path / "halves.h5ad"


def test_conversions_and_casts(halves: Path, tmp_path: Path) -> None:
    """A loss of precision is told to whoever asked for the dtype: the constructor, a cast, a collection."""
    dataset = SingleCellMemMapDataset(tmp_path / "whole", h5ad_path=halves, use_X_not_raw=True)
    collection = SingleCellCollection(tmp_path / "many", data_dtype="float16")
    options: dict[str, Any] = {"data_dtype": "float16", "use_X_not_raw": True}
    ways = [
        lambda: SingleCellMemMapDataset(tmp_path / "lossy", h5ad_path=halves, **options),
        lambda: dataset.cast_data_to_dtype("float16"),
        lambda: collection.load_h5ad(halves, use_X_not_raw=True),
    ]

    for call in ways:
        line = Path(__file__).read_text().splitlines()[call.__code__.co_firstlineno - 1].strip()
        assert {text for file, text in lines_of(call) if file == __file__} == {line}


def test_a_missing_neighbour_key_is_told_to_the_caller(halves: Path, tmp_path: Path) -> None:
    """A constructor that finds no graph under the key says so where it is called."""
    options: dict[str, Any] = {"use_X_not_raw": True, "load_neighbors": True, "neighbor_key": "none"}

    found = lines_of(lambda: SingleCellMemMapDataset(tmp_path / "lonely", h5ad_path=halves, **options))

    text = 'found = lines_of(lambda: SingleCellMemMapDataset(tmp_path / "lonely", h5ad_path=halves, **options))'
    assert set(found) == {(__file__, text)}


def test_no_warning_is_lost_while_another_thread_silences_others() -> None:
    """Who warns waits until the other thread has read: the filters are the process's."""
    warns = threading.Thread(target=callers.warn, args=["odd"])

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with callers.silenced():
            warns.start()
            warns.join(0.1)
            warnings.warn("nobody sees this", DeprecationWarning, stacklevel=1)
        warns.join()

    assert [str(one.message) for one in caught] == ["odd"]


def test_warnings_are_raised_in_one_way_only() -> None:
    """No other module of the package counts the functions between itself and the caller."""
    sources = {path: path.read_text() for path in PACKAGE.rglob("*.py")}

    found = [str(path) for path, source in sources.items() if re.search(r"\bwarnings\.warn\(|\bstacklevel\b", source)]

    assert found == [str(PACKAGE / "callers.py")]
