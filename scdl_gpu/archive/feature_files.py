"""The directory of a feature index: its tables, names, labels and row counts (bionemo-scdl's layout).

Knows which file belongs to which block, and the leftovers of other writers; not what the columns mean. Files are
replaced, never rewritten in place: those of an index that is open, here or in another process, stay as they are.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scdl_gpu.archive.blocks import Block, FileBlock
from scdl_gpu.archive.labels import NPY_NAME, label_files, read_labels
from scdl_gpu.archive.npy import read_npy, text_items
from scdl_gpu.errors import ArchiveError, MissingFileError

CUMULATIVE = "cumulative_sum_index.npy"
VERSION = "version.npy"
PENDING = ".pending"
"""Suffix of a file that is being written."""


@dataclass(slots=True)
class StoredIndex:
    """What a directory holds: [-1, end of block 0, end of block 1, ...], and per block its table and label."""

    cumulative: NDArray[np.int64]
    blocks: list[Block]
    labels: list[Any]
    version: str


def read_index(directory: Path, *, rows_are_entries: bool, pickled_paths: bool) -> StoredIndex:
    """Open the directory of an index; only small files and footers are read.

    rows_are_entries: a table has an entry per row (obs), which is checked. pickled_paths: see labels.read_labels.
    """
    cumulative = _read_cumulative(directory / CUMULATIVE)
    tables = _table_paths(directory, len(cumulative) - 1)
    blocks = [FileBlock.open(path, names_path=directory / f"{path.stem.replace('dataframe', 'names')}.names") for path in tables]
    if rows_are_entries:
        for path, block, n_rows in zip(tables, blocks, np.diff(cumulative.clip(min=0)), strict=True):
            if block.columns and block.n_rows != n_rows:
                raise ArchiveError(f"{path}: holds {block.n_rows:,} rows, {CUMULATIVE} promises {n_rows:,}; copy the archive again")
    labels = read_labels(directory, pickled_paths=pickled_paths)
    if len(labels) != len(blocks):
        raise ArchiveError(f"{directory}: {len(labels)} labels for {len(blocks)} blocks; copy the archive again")
    return StoredIndex(cumulative, list(blocks), list(labels), _read_version(directory / VERSION))


def write_index(directory: Path, stored: StoredIndex, *, legacy_labels: bool) -> None:
    """Write an index into `directory`; on an error the files that are there stay. Leftovers of an earlier save are removed."""
    directory.mkdir(parents=True, exist_ok=True)
    small = {CUMULATIVE: _npy(stored.cumulative), VERSION: _npy(np.array(stored.version))}
    small |= label_files(stored.labels, legacy=legacy_labels)
    written = list(small)
    try:
        for name, content in small.items():
            _pending(directory, name).write_bytes(content)
        for number, block in enumerate(stored.blocks):
            digits = f"{number:0{len(str(len(stored.blocks)))}d}"
            written.append(f"dataframe_{digits}.parquet")
            block.write(_pending(directory, written[-1]))
            if block.has_names:
                written.append(f"names_{digits}.names")
                block.write_names(_pending(directory, written[-1]))
        for name in written:
            _pending(directory, name).replace(directory / name)
    finally:
        for name in written:
            _pending(directory, name).unlink(missing_ok=True)
    stale = {*directory.glob("dataframe_*.parquet"), *directory.glob("names_*.names"), directory / NPY_NAME}
    for path in stale - {directory / name for name in written}:
        path.unlink(missing_ok=True)


def _pending(directory: Path, name: str) -> Path:
    return directory / f".{name}{PENDING}"


def _npy(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _read_cumulative(path: Path) -> NDArray[np.int64]:
    stored = read_npy(path)
    if stored.dtype.kind not in "iu" or stored.ndim != 1 or stored.size == 0:
        raise ArchiveError(f"{path}: holds {stored.dtype} of shape {stored.shape}, expected whole numbers: -1, then the end of each block")
    cumulative = stored.astype(np.int64)
    if cumulative[0] != -1 or (np.diff(cumulative.clip(min=0)) < 0).any() or (cumulative[1:] < 0).any():
        raise ArchiveError(f"{path}: holds {cumulative[:6].tolist()}, expected -1, then ascending row numbers; copy the archive again")
    return cumulative


def _read_version(path: Path) -> str:
    items = text_items(path, read_npy(path))
    if len(items) != 1:
        raise ArchiveError(f"{path}: holds {len(items)} strings, expected one version; copy the archive again")
    return items[0]


def _table_paths(directory: Path, n_blocks: int) -> list[Path]:
    """Find the table of each block. Other paddings are leftovers (bionemo-scdl keeps dataframe_0 beside dataframe_00)."""
    if n_blocks == 0:
        return []
    digits = len(str(n_blocks))
    expected = [directory / f"dataframe_{number:0{digits}d}.parquet" for number in range(n_blocks)]
    missing = [path for path in expected if not path.exists()]
    if not missing:
        return expected
    found = sorted(directory.rglob("*.parquet"))
    if len(found) < n_blocks:
        raise MissingFileError(f"{missing[0]} is missing: {len(found)} tables for {n_blocks} blocks; copy the archive again")
    if len(found) > n_blocks:
        raise ArchiveError(
            f"{directory}: {len(found)} tables for {n_blocks} blocks and no {missing[0].name}: which of them count is unclear; convert anew"
        )
    return found
