"""Real matrices, packed by the command that users have, and read by the reader of the specification alone."""

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import scipy.sparse
from archive.packed_reader import read_archive

from scdl_gpu import convert_h5ad
from scdl_gpu.archive.raw import open_raw
from scdl_gpu.errors import SourceError
from scdl_gpu.pack import pack


def strictly_read(path: Path, dtype: np.dtype[Any], shape: tuple[int, int]) -> scipy.sparse.csr_matrix:
    """Read a packed archive by the specification, values as integers of their bits; anything unusual in it is an error."""
    rows = [row for shard in read_archive(path) for row in shard.rows()]
    indptr = np.cumsum([0, *(len(row.columns) for row in rows)])
    columns = np.array([column for row in rows for column in row.columns], np.int64)
    values = np.frombuffer(b"".join(value for row in rows for value in row.values), f"u{dtype.itemsize}").copy()
    found = scipy.sparse.csr_matrix((values, columns, indptr), shape)
    found.sort_indices()
    return found


def packed_equals(source: Any, folder: Path, **options: Any) -> bool:
    """Convert and pack a source, and compare every bit with the canonical rows of the raw archive."""
    convert_h5ad(source, folder / "raw")
    pack(folder / "raw", folder / "packed", **options)
    archive = open_raw(folder / "raw")

    found = strictly_read(folder / "packed", archive.dtype, (archive.n_rows, archive.var.column_dims()[0]))

    same = [found.indptr, archive.indptr], [found.indices, archive.indices]
    return all(np.array_equal(a, b) for a, b in same) and found.data.tobytes() == np.asarray(archive.data).tobytes()


@pytest.mark.parametrize("options", [{}, {"group_by": "group"}], ids=["one order", "groups"])
def test_what_pack_writes_follows_the_specification(tmp_path: Path, options: dict[str, str]) -> None:
    """Counts and fractions, packed in one order and in one a group, come back by the page alone."""
    random = np.random.default_rng(3)
    weights = np.where(np.arange(60) % 2 == (np.arange(300) // 150)[:, None], 0.6, 0.01)
    dense = (random.integers(1, 400, (300, 60)) ** (random.random((300, 60)) < 0.3) * (random.random((300, 60)) < weights)).astype(
        "float32"
    )
    dense[17, :9] = 0.25
    data = anndata.AnnData(scipy.sparse.csr_matrix(dense))
    data.obs["group"] = np.where(np.arange(300) < 150, "a", "b")

    assert packed_equals(data, tmp_path, **options)


@pytest.mark.exhaustive
def test_real_files_packed_follow_the_specification(real_file: Path, tmp_path: Path) -> None:
    """Every real file that can be converted: as above."""
    try:
        is_equal = packed_equals(real_file, tmp_path)
    except SourceError as error:
        pytest.skip(f"no matrix that can be converted: {error}")

    assert is_equal
