"""Parts cut into extents: runs of rows whose bytes are read at one go.

Knows row pointers and row tables, not which extents are in memory together. Where an extent ends is found by bisection, some
twenty looks each, so that the table of 100 M rows is not read for it. The price is that extents differ in rows.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scdl_gpu.archive.constants import FileNames
from scdl_gpu.archive.parts import Part, Parts
from scdl_gpu.errors import ArchiveError
from scdl_gpu.reader import PAGE_BYTES

Ints = NDArray[np.int64]
MOST_ROWS = 1 << 16
"""Of an extent: rows without elements take no bytes in the files, but entries of the row table in memory."""


class Cuts(NamedTuple):
    """Extents of a list of parts, in its order, (e,) each: `part`, the place in the list, first row as the part counts, rows, and bytes.

    size_bytes: the most that any rows of the extent take in memory, whole pages and their entries of the row table included.
    """

    part: NDArray[np.int32]
    first: Ints
    n_rows: Ints
    size_bytes: Ints


class Strand(NamedTuple):
    """Bytes start..stop-1 of a file."""

    path: Path
    start: int
    stop: int

    @property
    def pages(self) -> tuple[int, int]:
        """Begin and end of the whole pages that hold them."""
        return self.start // PAGE_BYTES * PAGE_BYTES, -(-self.stop // PAGE_BYTES) * PAGE_BYTES


def cut(parts: Parts, size_bytes: int) -> Cuts:
    """Cut the parts of a list into extents: what one has behind its first row is less than `size_bytes`, however long that row is.

    Parts of the same files are looked at once.
    """
    known: dict[Any, tuple[Ints, Ints]] = {}
    for part in parts.parts:
        if part.key not in known:
            known[part.key] = _cut_part(part, size_bytes)
    cuts = [known[part.key] for part in parts.parts]
    counts = np.array([sizes.size for _, sizes in cuts], np.int64)
    begins, here = np.cumsum(counts) - counts, counts[parts.part_of]
    place = np.repeat(np.arange(here.size, dtype=np.int32), here)
    chosen = np.arange(here.sum()) + np.repeat(begins[parts.part_of] - np.cumsum(here) + here, here)
    columns = ([bounds[:-1] for bounds, _ in cuts], [np.diff(bounds) for bounds, _ in cuts], [sizes for _, sizes in cuts])
    return Cuts(place, *(np.concatenate((np.zeros(0, np.int64), *column))[chosen] for column in columns))


def divided(parts: Sequence[Part], shares: Sequence[int]) -> list[list[tuple[int, Part]]]:
    """Deal out `parts`, laid end to end, to holders: each gets `shares` bytes of columns and values, to a row; returns pieces of each part.

    A piece is (holder, rows); parts of the same files are dealt out once. Raises ArchiveError for damaged row pointers where it cuts.
    """
    known: dict[Any, list[tuple[int, Part]]] = {}
    ends = np.cumsum(shares, dtype=np.int64)
    for part in parts:
        if part.key not in known:
            known[part.key] = _deal(part, ends)
            ends = ends - part.limit * _width(part)
    return [[(holder, part.piece(one.skipped, one.skipped + one.n_rows)) for holder, one in known[part.key]] for part in parts]


def _deal(part: Part, ends: Ints) -> list[tuple[int, Part]]:
    """Cut one part where its bytes reach `ends`, (holders,); what is behind the last of them goes to the last holder."""
    goals = ends[:-1] // _width(part)
    inside = (goals > 0) & (goals < part.limit)
    bounds = np.where(goals > 0, part.n_rows, 0)
    if inside.any():
        if part.shard is not None:
            part.shard.check_tables()
        bounds[inside] = _last_at_most(starts(part), part.n_rows, goals[inside])
        falls = np.flatnonzero(np.diff(np.concatenate(([0], starts(part)(bounds), [part.limit]))) < 0)
        if falls.size:
            row = int(bounds[min(int(falls[0]), bounds.size - 1)])
            raise ArchiveError(f"{part.name(row)} begins where no row may; the file is damaged: copy it again, or convert the source anew")
    bounds = np.maximum.accumulate(np.concatenate(([0], bounds, [part.n_rows])))
    dealt = [(holder, part.piece(*rows)) for holder, rows in enumerate(itertools.pairwise(bounds.tolist())) if rows[0] < rows[1]]
    return dealt or [(0, part)]


def _width(part: Part) -> int:
    """Bytes of an element, column and value, or of a word."""
    return sum(width for _, _, width in _columns(part))


def strands(part: Part, start: int, stop: int) -> Iterator[Strand]:
    """Give the bytes of elements start..stop-1 of a raw part, columns and then values, or of words of a packed one."""
    for path, begin, width in _columns(part):
        yield Strand(path, begin + start * width, begin + stop * width)


def starts(part: Part) -> Callable[[Any], Ints]:
    """Return the function that tells where rows begin, of any (k,) numbers 0..n_rows: in elements, or in words."""
    if part.shard is None:
        return lambda rows: np.asarray(part.table[rows]).astype(np.int64)
    return lambda rows: np.asarray(part.table["offset"][rows]).astype(np.int64)


def _columns(part: Part) -> tuple[tuple[Path, int, int], ...]:
    """Give the files of a part: path, where its elements begin, and bytes of each."""
    if part.shard is not None:
        return ((part.shard.path, part.shard.payload_start, 4),)
    path, dtypes = part.archive.path, part.archive.dtypes
    return tuple((path / name, 0, np.dtype(dtypes[name]).itemsize) for name in (FileNames.COLPTR.value, FileNames.DATA.value))


def _cut_part(part: Part, size_bytes: int) -> tuple[Ints, Ints]:
    """Return the rows between which a part is cut, 0 and its rows included, and the bytes of each extent."""
    start, files = starts(part), _columns(part)
    width = _width(part)
    ends = start(np.array([0, part.n_rows]))
    goals = np.arange(ends[0], ends[1], max(1, size_bytes // width), dtype=np.int64)[1:]
    bounds = np.unique(np.concatenate((_last_at_most(start, part.n_rows, goals), np.arange(0, part.n_rows, MOST_ROWS), [0, part.n_rows])))
    elements = np.diff(start(bounds))
    if (elements < 0).any():
        at = int(np.flatnonzero(elements < 0)[0])
        raise ArchiveError(
            f"{part.name(int(bounds[at + 1]))} begins before {part.name(int(bounds[at]))}, expected rows to follow each other; "
            f"the file is damaged: copy it again, or convert the source anew"
        )
    sizes = elements * width + np.diff(bounds) * _entry_bytes(part) + 2 * PAGE_BYTES * len(files)
    return bounds, sizes


def _entry_bytes(part: Part) -> int:
    """Bytes of a row in the table of a window: a row pointer of 8, or an entry of a packed shard."""
    return 8 if part.shard is None else part.table.itemsize


def _last_at_most(start: Callable[[Any], Ints], n_rows: int, goals: Ints) -> Ints:
    """Find for each goal the last row that begins at it or before, by bisection over all goals at once."""
    low, high = np.zeros(goals.size, np.int64), np.full(goals.size, n_rows, np.int64)
    while (low < high).any():
        middle = (low + high + 1) // 2
        is_before = start(middle) <= goals
        low, high = np.where(is_before, middle, low), np.where(is_before, high, middle - 1)
    return low
