"""Extents of a real file's archives are those that docs/order.md says, computed here in plain Python from the files alone."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from archive.packed_reader import read_archive

from scdl_gpu import convert_h5ad
from scdl_gpu.archive.cuts import cut
from scdl_gpu.archive.packed import open_archive
from scdl_gpu.archive.parts import Parts

PAGE = 4096


def extents_of(starts: list[int], width: int, files: int, entry: int, extent_bytes: int) -> list[tuple[int, int, int]]:
    """Give first row, rows and bytes of the extents of a part whose rows begin at `starts`, the last being their end."""
    n_rows, step = len(starts) - 1, extent_bytes // width
    goals = range(0, starts[-1], step)
    before = {max(row for row in range(n_rows + 1) if starts[row] <= goal) for goal in list(goals)[1:]}
    bounds = sorted(before | set(range(0, n_rows, 65_536)) | {0, n_rows})
    pairs = itertools.pairwise(bounds)
    return [(a, b - a, (starts[b] - starts[a]) * width + entry * (b - a) + 2 * PAGE * files) for a, b in pairs]


@pytest.fixture(scope="module")
def source(real_data: Path) -> Path:
    """Give a real file of a few hundred cells."""
    return real_data / "mix_sc_celseq2_5cl_p1.h5ad"


@pytest.mark.parametrize("extent_bytes", [5_000, 30_000, 262_144])
def test_a_real_raw_archive_is_cut_as_the_document_says(source: Path, tmp_path: Path, extent_bytes: int) -> None:
    """Columns and values are cut together, before the row at each multiple of what an extent may have."""
    convert_h5ad(source, tmp_path / "raw")
    archive = open_archive(tmp_path / "raw")
    names = ("row_ptr.npy", "col_ptr.npy", "data.npy")
    pointers, columns, values = (np.fromfile(tmp_path / "raw" / name, archive.dtypes[name]) for name in names)
    assert pointers[-1] == columns.size == values.size

    cuts = cut(Parts.of([archive], archive.var.column_dims()[0]), extent_bytes)

    expected = extents_of(pointers.tolist(), columns.itemsize + values.itemsize, 2, 8, extent_bytes)
    assert list(zip(*(column.tolist() for column in cuts[1:]), strict=True)) == expected
    assert len(expected) > 5
    assert set(cuts.part.tolist()) == {0}


@pytest.mark.parametrize("extent_bytes", [5_000, 30_000, 262_144])
def test_a_real_packed_archive_is_cut_as_the_document_says(source: Path, tmp_path: Path, extent_bytes: int) -> None:
    """Shards are cut each by itself, in words."""
    convert_h5ad(source, tmp_path / "packed", packed=True)
    archive = open_archive(tmp_path / "packed")

    cuts = cut(Parts.of([archive], archive.var.column_dims()[0]), extent_bytes)

    expected = []
    for number, shard in enumerate(read_archive(tmp_path / "packed")):
        shard.check_tables()
        starts = [entry[0] for entry in shard.entries]
        expected += [(number, *extent) for extent in extents_of(starts, 4, 1, 16, extent_bytes)]
    assert list(zip(*(column.tolist() for column in cuts), strict=True)) == expected
    assert len(expected) >= len(json.loads((tmp_path / "packed" / "metadata.json").read_text())["packed"]["shards"])
