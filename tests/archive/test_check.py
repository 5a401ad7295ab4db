"""A check of every element: canonical or not, and the first fault by file, row and value."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import scipy.sparse

from scdl_gpu import convert_h5ad
from scdl_gpu.archive import check
from scdl_gpu.archive.check import check_archive
from scdl_gpu.archive.raw import open_raw
from scdl_gpu.errors import ArchiveError

Make = Callable[..., Path]
PIECES = [1, 2, 3, 1 << 22]


@pytest.fixture(params=PIECES, ids=lambda piece: f"piece {piece}", autouse=True)
def _piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut the archive into pieces of all sizes: they must not show."""
    monkeypatch.setattr(check, "PIECE", request.param)


def rows(*columns: list[int], values: list[float] | None = None, n_vars: int = 5) -> tuple[Any, ...]:
    """Make a CSR of rows of these columns."""
    flat = [column for row in columns for column in row]
    data = np.arange(1.0, len(flat) + 1) if values is None else np.array(values)
    return np.cumsum([0, *map(len, columns)]), np.array(flat, int), data, n_vars


@pytest.mark.parametrize(
    ("csr", "canonical"),
    [
        (rows([0, 3], [], [1, 2, 4], [4]), True),
        (rows([], [], []), True),
        (rows([4], [0], [4], [0]), True),
        (rows([0, 3], [3, 0]), False),
        (rows([0, 3], [2, 2]), False),
        (rows([0, 3], [1], values=[1, 0, 2]), False),
        (rows([0, 3], [1], values=[1, -0.0, 2]), True),
        (rows([0, 3], [1], values=[1, np.nan, 1e-45]), True),
    ],
)
def test_canonical_rows_are_told(make_csr: Make, csr: Any, canonical: bool) -> None:
    """Columns strictly ascending, no zeros; -0.0 and NaN are values."""
    assert check_archive(open_raw(make_csr("a", csr))) is canonical


@pytest.mark.parametrize("dtypes", [("uint8", "uint8", "uint8"), ("float16", "uint64", "uint64"), ("float64", "uint16", "uint32")])
def test_all_dtypes_are_checked(make_csr: Make, dtypes: tuple[str, str, str]) -> None:
    """Of values, pointers and columns."""
    good = make_csr("good", rows([0, 3], [1, 2, 4]), dtypes=dtypes)
    bad = make_csr("bad", rows([0, 3], [1, 2, 5]), dtypes=dtypes)

    assert check_archive(open_raw(good))
    with pytest.raises(ArchiveError, match=r"bad/col_ptr\.npy: row 1 holds column 5, expected 0\.\.4"):
        check_archive(open_raw(bad))


def test_the_first_column_out_of_range_is_named(make_csr: Make) -> None:
    """In the row that holds it, empty rows before it or not."""
    path = make_csr("a", rows([0], [], [], [1, 7, 9], [8]))

    with pytest.raises(ArchiveError, match=r"col_ptr\.npy: row 3 holds column 7, expected 0\.\.4"):
        check_archive(open_raw(path))


def test_columns_without_a_table_of_genes_have_no_range(make_csr: Make) -> None:
    """Nothing says how many genes there are; order is checked all the same."""
    import shutil

    ascending, falling = make_csr("a", rows([0, 900])), make_csr("b", rows([900, 0]))
    for path in (ascending, falling):
        for name in ("var_features", "obs_features"):
            shutil.rmtree(path / name)

    assert check_archive(open_raw(ascending))
    assert not check_archive(open_raw(falling))


def test_pointers_that_fall_are_named(make_csr: Make) -> None:
    """At the row where they do."""
    path = make_csr("a", (np.array([0, 1, 3, 2, 4]), np.array([0, 1, 2, 3]), np.ones(4), 5))

    with pytest.raises(ArchiveError, match=r"row_ptr\.npy: the pointer falls from 3 to 2 at row 2"):
        check_archive(open_raw(path))


@pytest.mark.parametrize("pointer", [9, 2**63, 2**64 - 1])
def test_pointers_that_leave_the_data_are_named(make_csr: Make, pointer: int) -> None:
    """Before they are followed, however large."""
    path = make_csr(
        "a", (np.array([0, 1, pointer, 4], "uint64"), np.array([0, 1, 2, 3]), np.ones(4), 5), dtypes=("uint8", "uint64", "uint8")
    )

    with pytest.raises(ArchiveError, match=r"row_ptr\.npy: (the pointer falls|pointer 2 is)"):
        check_archive(open_raw(path))


def test_blocks_have_their_own_genes(make_csr: Make, tmp_path: Path) -> None:
    """A column that the first block has and the second has not."""
    from scdl_gpu.archive.join import join

    parts = [make_csr("a", rows([0, 4], [1], n_vars=5)), make_csr("b", rows([0, 1], [], [2], n_vars=3), genes=["x", "y", "z"])]
    (tmp_path / "joined").mkdir()
    join([open_raw(path) for path in parts], tmp_path / "joined", data_dtype="float32")
    assert check_archive(open_raw(tmp_path / "joined"))

    np.array([0, 4, 1, 0, 1, 3], "uint16").tofile(tmp_path / "joined" / "col_ptr.npy")

    with pytest.raises(ArchiveError, match=r"row 4 holds column 3, expected 0\.\.2"):
        check_archive(open_raw(tmp_path / "joined"))


def test_a_mark_that_is_not_true_is_a_fault(make_csr: Make) -> None:
    """Rows that say canonical and are not would be served wrong."""
    path = make_csr("a", rows([3, 0]), metadata={"canonical": True})

    with pytest.raises(ArchiveError, match=r"metadata\.json: says that all rows are canonical"):
        check_archive(open_raw(path))


def test_progress_adds_up(make_csr: Make) -> None:
    """Every element once."""
    seen: list[int] = []
    archive = open_raw(make_csr("a", rows([0, 1, 2, 3], [], [4], [0, 4])))

    check_archive(archive, seen.append)

    assert sum(seen) == 7


EXTRAS = ["obsm/X_pca.npy", "obsp/far/data.npy", "obsp/far/indices.npy", "neighbor_values.npy", "neighbor_indices.npy"]


@pytest.fixture
def with_extras(tmp_path: Path) -> Path:
    """Give an archive with obsm, a neighbour graph and another graph."""
    adata = anndata.AnnData(scipy.sparse.csr_matrix(np.eye(40, 5, dtype="float32")), obsm={"X_pca": np.ones((40, 300))})
    adata.obsp["near"] = adata.obsp["far"] = scipy.sparse.csr_matrix(np.eye(40, k=1))
    return convert_h5ad(adata, tmp_path / "extras", obsm=("X_pca",), obsp=("near", "far"))


@pytest.mark.parametrize("name", EXTRAS)
def test_all_that_lies_beside_the_rows_is_read(with_extras: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A disk that fails at the last byte of obsm, of a graph or of its weights is noticed, and the file is named."""
    archive, size = open_raw(with_extras), (with_extras / name).stat().st_size
    assert check_archive(archive)
    whole = os.preadv

    def failing(fd: int, buffers: Any, offset: int) -> int:
        if Path(f"/proc/self/fd/{fd}").readlink() == with_extras / name and offset + len(buffers[0]) >= size:
            raise OSError(errno.EIO, "Input/output error")
        return whole(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)

    with pytest.raises(ArchiveError, match=rf"{name} cannot be read .*Input/output error"):
        check_archive(archive)


@pytest.mark.parametrize("name", EXTRAS)
def test_files_that_were_cut_since_are_named(with_extras: Path, name: str) -> None:
    """What became shorter after the archive was opened would end a reader of its map by a signal; a check says so."""
    archive = open_raw(with_extras)
    os.truncate(with_extras / name, (with_extras / name).stat().st_size - 1)

    with pytest.raises(ArchiveError, match=rf"{name} holds [\d,]+ bytes, expected [\d,]+"):
        check_archive(archive)


def test_damaged_tables_are_found(make_csr: Make) -> None:
    """Columns of obs and var are decoded, all of them."""
    path = make_csr("a", rows([0, 1], [2]))
    table = path / "obs_features" / "dataframe_0.parquet"
    content = bytearray(table.read_bytes())
    content[6:40] = bytes(34)
    table.write_bytes(content)
    archive = open_raw(path)

    with pytest.raises(ArchiveError, match=r"obs_features/dataframe_0\.parquet: column 'name'"):
        check_archive(archive)
