"""One window read into memory: what of which files, where it goes, and the tables that kernels find it by.

Knows extents and files, not which window comes when. For a device rows are checked while they are read, as in `slab`; on the CPU
every gather checks its own.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Executor
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from scdl_gpu import reader
from scdl_gpu.archive.check import check_pointers
from scdl_gpu.archive.constants import FileNames
from scdl_gpu.archive.cuts import starts, strands
from scdl_gpu.archive.parts import DAMAGED_TEXT, Part, Parts
from scdl_gpu.archive.raw import RawArchive
from scdl_gpu.archive.row_checks import packed_check, raw_check
from scdl_gpu.device import Device
from scdl_gpu.errors import ArchiveError
from scdl_gpu.kernels import gpu
from scdl_gpu.kernels.packed import PACKED
from scdl_gpu.kernels.shards import DAMAGED, FAULTS, NO_FAULT, SHARD, kind_of
from scdl_gpu.shards import Shards
from scdl_gpu.slab import Piece, Read, Sink, copy_pieces
from scdl_gpu.window import Window, upload
from scdl_gpu.window_order import WindowRows

Kind = Literal["device", "pinned", "host"]
Check = Callable[..., bool]


class Source(Protocol):
    """What windows are filled from. kind: where they lie; reaches_device: values and packed rows are read straight to the device."""

    shards: Shards
    kind: Kind
    device: Device | None
    reaches_device: bool

    def file(self, part: Part, path: Path, left: threading.Event) -> reader.AnyFile:
        """Open a file of a part, once; not to the end where `left` is set meanwhile."""


class _Laid(NamedTuple):
    """One piece of a window: the rows as a part, what is to be read, where in the slab each column begins, and where the next piece may."""

    part: Part
    piece: Piece
    at: tuple[int, ...]
    end: int


def fill_window(
    source: Source, base: int, sink: Sink, rows: WindowRows, pool: Executor, left: threading.Event
) -> tuple[Window, int]:
    """Read the rows of a window to memory that readers see at `base`; returns the window, and the bytes read.

    left: set when nobody waits for them any more; then CancelledError is raised.
    Raises ArchiveError for what cannot be read, and, for a device, for damaged rows.
    """
    numbers = source.shards.parts.part_of[rows.part]
    laid: list[_Laid] = []
    counted: list[int] = []

    def pieces() -> Iterator[Piece]:
        for number, first, count in zip(numbers.tolist(), rows.first.tolist(), rows.counts.tolist(), strict=True):
            if left.is_set():
                raise CancelledError("the iteration was left")
            laid.append(_lay(source, left, source.shards.parts.parts[number], first, count, laid[-1].end if laid else 0))
            yield laid[-1].piece

    is_sorted = copy_pieces(pieces(), sink, pool, counted.append)
    parts = Parts([one.part for one in laid], source.shards.parts.orders.of(numbers), source.shards.n_vars)
    raw, packed = _tables(laid, base, is_sorted)
    device = source.device if source.kind != "host" else None
    made = Window.on_host(parts, raw, packed) if device is None else Window.on_device(parts, raw, packed, device)
    if device is not None:
        device.record().wait()  # waits, in this thread: the rows are there
        if source.reaches_device:
            _verify_there(made, device)
    return made, sum(counted)


def _verify_there(window: Window, device: Device) -> None:
    """Verify the checks of packed rows that went straight to the device, there. Raises ArchiveError naming the first that is damaged."""
    parts = window.parts
    numbers = np.flatnonzero(np.repeat(parts.is_packed, [part.n_rows for part in parts.parts]))
    if not numbers.size:
        return
    part, _, rows, indptr = parts.extents(numbers)
    fault = np.full(FAULTS, NO_FAULT, np.int32)
    shard, where, pointers, found = (upload(array, device) for array in (part, rows, indptr, fault))
    gpu.check_rows(device.launch, window.packed, shard, where, pointers.view(torch.int64), found)
    report = device.staging(fault.nbytes)
    device.download(found, report)
    device.record().wait()  # waits, in this thread
    position = int(report.numpy().view(np.int32)[DAMAGED])
    if position != NO_FAULT:
        raise ArchiveError(f"{parts.name(int(numbers[position]))} {DAMAGED_TEXT}")


def _lay(source: Source, left: threading.Event, part: Part, first: int, count: int, at: int) -> _Laid:
    """Lay out `count` rows of a part from `first` on at `at`, whole pages, with a row table of their own."""
    if part.shard is not None:
        source.file(part, part.shard.path, left).check_size()  # its row table is mapped
    table, (start, stop) = _table(part, first, count)
    reads, offsets, leads = [], [], []
    for strand in strands(part, start, stop):
        file = source.file(part, strand.path, left).until(left)
        begin, end = strand.pages
        is_seen = not _goes_there(source, part) if part.shard is not None else strand.path.name == FileNames.COLPTR.value
        reads.append(Read(file, begin, min(end, file.size_bytes), at, is_seen))
        leads.append(slice(strand.start - begin, strand.stop - begin))
        offsets.append(at + strand.start - begin)
        at += end - begin
    check = _unchecked if source.kind == "host" else partial(_check_read, _check(source, part, first, table, start), leads)
    piece = Part(part.archive, part.shard, part.first, count, table, stop - start, skipped=first)
    return _Laid(piece, Piece(tuple(reads), check), tuple(offsets), at)


def _table(part: Part, first: int, count: int) -> tuple[NDArray[Any], tuple[int, int]]:
    """Copy the entries of rows, counted from the first of them, and give where they begin and end. Raises ArchiveError for damaged ones."""
    start, stop = (int(at) for at in starts(part)(np.array([first, first + count])))
    if part.shard is not None:
        part.shard.check_tables()
        entries = np.array(part.table[first : first + count + 1])
        entries["offset"] -= np.uint32(start)
        return entries, (start, stop)
    pointers = np.asarray(part.table[first : first + count + 1]).astype(np.int64)
    check_pointers(part.archive.path / FileNames.ROWPTR.value, pointers, first, part.limit)
    return (pointers - start).view(np.uint64), (start, stop)


def _goes_there(source: Source, part: Part) -> bool:
    """Tell whether what no check looks at is read straight to the device: of files behind URLs nothing is."""
    return source.reaches_device and part.archive.remote is None


def _check(source: Source, part: Part, first: int, table: NDArray[Any], start: int) -> Check:
    if part.shard is not None:
        return _unchecked if _goes_there(source, part) else packed_check(part.shard, first, first + table.size - 1)
    return raw_check(raw_of(part), first, table.view(np.int64) + start, source.shards.n_vars)


def _check_read(check: Check, leads: list[slice], *found: NDArray[np.uint8]) -> bool:
    """Check what was read, without what fills up its pages."""
    return check(*(memory[lead] for memory, lead in zip(found, leads, strict=True)))  # of an empty one nothing is left


def _unchecked(*_: Any) -> bool:
    """Leave rows to the gather, which checks them."""
    return False


def _tables(laid: Sequence[_Laid], base: int, is_sorted: Sequence[bool]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Make the tables of pieces for kernels, of raw and of packed ones; in each the others are empty."""
    raw, packed = np.zeros(len(laid), SHARD), np.zeros(len(laid), PACKED)
    raw["is_sorted"] = True
    for number, ((part, _, at, _), ascends) in enumerate(zip(laid, is_sorted, strict=True)):
        if part.shard is not None:
            packed[number] = (base + at[0], part.limit, part.shard.source, 0)
            continue
        archive = raw_of(part)
        kind = kind_of(archive.dtype)
        raw[number] = (base + at[0], base + at[1], part.limit, archive.indices.itemsize, kind, ascends or archive.canonical, 0)
    return raw, packed


def raw_of(part: Part) -> RawArchive:
    """Return the raw archive of a part. Raises ArchiveError for a packed one."""
    if not isinstance(part.archive, RawArchive):
        raise ArchiveError(f"{part.archive.path} is packed, and a part of it is none of its shards")
    return part.archive
