"""Windows of an epoch that streams: filled from files, one ahead of the one that is consumed.

Knows extents, files and two stretches of memory, not batches. While a window is consumed the next is read, by threads with an
extent each, so that reads are in flight throughout; packed rows stay packed. The price of two windows is that each has half of the
memory. For a device rows are checked while they are read, as in `slab`; on the CPU every gather checks its own.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from scdl_gpu import reader
from scdl_gpu.archive.check import check_pointers
from scdl_gpu.archive.constants import FileNames
from scdl_gpu.archive.cuts import Cuts, cut, starts, strands
from scdl_gpu.archive.parts import DAMAGED_TEXT, Part, Parts
from scdl_gpu.archive.payload import open_file, open_shard
from scdl_gpu.archive.raw import RawArchive
from scdl_gpu.archive.row_checks import packed_check, raw_check
from scdl_gpu.arena import available_bytes, pages
from scdl_gpu.device import Device, Event, size_words
from scdl_gpu.errors import ArchiveError, DeviceError
from scdl_gpu.kernels import gpu
from scdl_gpu.kernels.packed import PACKED, SLACK_BYTES
from scdl_gpu.kernels.shards import DAMAGED, FAULTS, NO_FAULT, SHARD, kind_of
from scdl_gpu.order import Order
from scdl_gpu.shards import Shards
from scdl_gpu.slab import THREADS, Bounced, InPlace, Piece, Read, Sink, copy_pieces
from scdl_gpu.window import Window, upload
from scdl_gpu.window_order import WindowOrder, WindowRows, extent_bytes_of

MOST_ITEM_BYTES = 16
"""Of an element: column and value, of 8 bytes each."""
Kind = Literal["device", "pinned", "host"]
Check = Callable[..., bool]
STAYS = (
    "a loader that streams windows cannot go to a worker process of a DataLoader, nor be pickled: each worker would read all of the data. "
    "Iterate it directly, or use DataLoader(loader, batch_size=None, num_workers=0); it reads and assembles ahead by itself"
)


@dataclass(slots=True)
class Streaming:
    """What streaming did so far: bytes read, the seconds in which reads were in flight, windows filled, and how files are read.

    seconds_waited: of the consumer, for batches.
    """

    size_bytes: int = 0
    seconds: float = 0.0
    n_windows: int = 0
    seconds_waited: float = 0.0
    path: str = ""

    @property
    def bytes_per_second(self) -> float:
        """Bytes read in a second of reading."""
        return self.size_bytes / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        if not self.n_windows:
            return f"read by {self.path}" if self.path else "nothing read yet"
        return (
            f"{self.n_windows} windows, {size_words(self.size_bytes)} read at {self.bytes_per_second / 1e9:.2f} GB/s by {self.path}; "
            f"the consumer waited {self.seconds_waited:.1f} s"
        )


class _Slot:
    """Memory of one window. base: the address that readers of the rows see its begin at; event: of the last use on the device."""

    def __init__(self, kind: Kind, size_bytes: int, device: Device | None) -> None:
        self._device, self._pinned = device, False
        self.event: Event | None = None
        self.sink: Sink
        if kind == "device" and device is not None:
            self.memory = device.allocate(size_bytes)
            self.sink = Bounced(device, self.memory)
            self.base = self.memory.data_ptr()
            return
        try:
            self.memory = pages(size_bytes)
        except OSError as error:
            raise DeviceError(f"the host has no {size_words(size_bytes)} for a window: {error}; lower host_budget") from error
        self.sink, self.base = InPlace(self.memory), self.memory.data_ptr()
        if kind == "pinned" and device is not None:
            self.base, self._pinned = device.pin(self.memory), True

    def close(self) -> None:
        """Let the memory go; nothing may be reading it."""
        if self._pinned and self._device is not None:
            self._device.unpin(self.memory)
        self._pinned = False
        if isinstance(self.sink, Bounced):
            self.sink.clear()
        self.sink, self.memory = InPlace(torch.empty(0, dtype=torch.uint8)), torch.empty(0, dtype=torch.uint8)


class Windows:
    """The memory and the files that windows of `shards` go through; one epoch at a time has them, another one makes its own.

    kind: where windows lie; window_bytes: what one takes. reaches_device: values and packed rows are read straight to the device.
    Files are read past the page cache where all of them would not fit into it.
    """

    def __init__(self, shards: Shards, kind: Kind, *, window_bytes: int, stored_bytes: int, device: Device | None) -> None:
        self.shards, self.kind, self.window_bytes, self.device = shards, kind, window_bytes, device
        self.reaches_device = kind == "device" and reader.reaches_device()
        self.part_starts = np.concatenate(([0], shards.parts.ends[:-1]))
        self.report = Streaming(path="" if shards.parts.is_remote else reader.path_in_use())
        self._cuts: Cuts | None = None
        self._is_direct = stored_bytes > available_bytes()
        self._files: dict[Path, reader.AnyFile] = {}
        self._slots: list[_Slot] = []
        self._lock = threading.Lock()

    def order(self, order: Order) -> WindowOrder:
        """Make the order of windows of these shards, for ranks, batches and seed as `order` has them."""
        extent_bytes = extent_bytes_of(self.window_bytes)
        if self._cuts is None:
            self._cuts = cut(self.shards.parts, extent_bytes)
        return WindowOrder(order, self._cuts, self.part_starts, window_bytes=self.window_bytes, extent_bytes=extent_bytes)

    def stream(self, todo: Sequence[WindowRows]) -> "Stream":
        """Begin to fill windows, in this order."""
        return Stream(self, todo)

    def take_slots(self) -> list[_Slot]:
        """Give memory for two windows: what an epoch before this one left, or new. Raises DeviceError."""
        with self._lock:
            slots, self._slots = self._slots, []
        if slots:
            return slots
        with ExitStack() as stack:
            for _ in range(2):
                slots.append(_Slot(self.kind, self.window_bytes + SLACK_BYTES, self.device))
                stack.callback(slots[-1].close)
            stack.pop_all()
        return slots

    def give_slots(self, slots: list[_Slot]) -> None:
        """Take memory back for the next epoch."""
        with self._lock:
            if not self._slots:
                self._slots, slots = slots, []
        for slot in slots:
            slot.close()

    def file(self, part: Part, path: Path) -> reader.AnyFile:
        """Open a file of a part, once. Raises ArchiveError where it is not the one that was opened with the archive."""
        if path not in self._files:
            if part.shard is None:
                file: reader.AnyFile = open_file(_raw(part), path.name, is_direct=self._is_direct)
            else:
                file = open_shard(part.shard, is_direct=self._is_direct)
            self._files[path] = file
            self.report.path = file.path_in_use
        return self._files[path]

    def close(self) -> None:
        """Give memory and files back; no epoch may be streaming."""
        if self.device is not None:
            self.device.record().wait()  # waits, for kernels that may still read
        for slot in self._slots:
            slot.close()
        for file in self._files.values():
            file.close()
        self._slots, self._files = [], {}

    def __reduce__(self) -> NoReturn:
        raise RuntimeError(STAYS)

    def __repr__(self) -> str:
        return f"two windows of {size_words(self.window_bytes)} in {self.kind} memory, {self.report}"


class Stream:
    """Windows of one epoch, `todo`, filled in a thread: `window(k)` is there from when its future is done until `reached` passes it."""

    def __init__(self, windows: Windows, todo: Sequence[WindowRows]) -> None:
        self._windows, self._slots, self.todo = windows, windows.take_slots(), tuple(todo)
        self._reached, self._is_closed = 0, False
        self._changed = threading.Condition()
        self._readers = ThreadPoolExecutor(THREADS, thread_name_prefix="scdl-read")
        self._filler = ThreadPoolExecutor(1, thread_name_prefix="scdl-window")
        self._futures = [self._filler.submit(self._filled, k, rows) for k, rows in enumerate(self.todo)]

    def window(self, k: int) -> "Future[Window]":
        """Give window k, or what went wrong with it, when it is there."""
        return self._futures[k]

    def reached(self, k: int) -> None:
        """Say that all batches of windows before k are made, so that their memory may be filled anew."""
        if k <= self._reached:
            return
        device = self._windows.device
        with self._changed:
            if device is not None:
                self._slots[(k - 1) % 2].event = device.record()
            self._reached = k
            self._changed.notify_all()

    def _filled(self, k: int, rows: WindowRows) -> Window:
        """Fill the memory of window k, when nobody reads window k - 2 there any more."""
        slot, device = self._slots[k % 2], self._windows.device
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._reached >= k - 1)
            event, slot.event = slot.event, None
        self._raise_closed()
        if event is not None:
            event.wait()  # waits, in this thread
        begin = time.perf_counter()
        with nullcontext() if device is None else device.aside():
            window, size_bytes = fill_window(self._windows, slot.base, slot.sink, rows, self._readers, self._raise_closed)
        report = self._windows.report
        report.size_bytes, report.seconds = report.size_bytes + size_bytes, report.seconds + time.perf_counter() - begin
        report.n_windows += 1
        return window

    def _raise_closed(self) -> None:
        if self._is_closed:
            raise CancelledError("the iteration was left")

    def cancel(self) -> None:
        """Let no more windows come; who waits for one is told so."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        for future in self._futures:
            future.cancel()

    def close(self) -> None:
        """Cancel, and return when nothing is in flight. No batch may be being made of a window; those that are made stay."""
        self.cancel()
        self._filler.shutdown(wait=True, cancel_futures=True)
        self._readers.shutdown(wait=True)
        slots, self._slots, self._futures = self._slots, [], []
        if slots and self._windows.device is not None:
            for slot in slots:
                slot.event = self._windows.device.record()
        if slots:
            self._windows.give_slots(slots)


class _Laid(NamedTuple):
    """One piece of a window: the rows as a part, what is to be read, where in the slab each column begins, and where the next piece may."""

    part: Part
    piece: Piece
    at: tuple[int, ...]
    end: int


def fill_window(
    windows: Windows, base: int, sink: Sink, rows: WindowRows, pool: Executor, check_open: Callable[[], None]
) -> tuple[Window, int]:
    """Read the rows of a window to memory that readers see at `base`; returns the window, and the bytes read.

    check_open: called before each piece, may raise. Raises ArchiveError for what cannot be read, and, for a device, for damaged rows.
    """
    numbers = windows.shards.parts.part_of[rows.part]
    laid: list[_Laid] = []
    counted: list[int] = []

    def pieces() -> Iterator[Piece]:
        for number, first, count in zip(numbers.tolist(), rows.first.tolist(), rows.counts.tolist(), strict=True):
            check_open()
            laid.append(_lay(windows, windows.shards.parts.parts[number], first, count, laid[-1].end if laid else 0))
            yield laid[-1].piece

    is_sorted = copy_pieces(pieces(), sink, pool, counted.append)
    parts = Parts([one.part for one in laid], windows.shards.parts.orders.of(numbers), windows.shards.n_vars)
    raw, packed = _tables(laid, base, is_sorted)
    device = windows.device if windows.kind != "host" else None
    made = Window.on_host(parts, raw, packed) if device is None else Window.on_device(parts, raw, packed, device)
    if device is not None:
        device.record().wait()  # waits, in this thread: the rows are there
        if windows.reaches_device:
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


@contextmanager
def one_row(shards: Shards, row: int) -> Iterator[tuple[Window, NDArray[np.int64]]]:
    """Read row 0 <= row < n_rows from its file into memory of the host, and give a window of it, with its number there, (1,)."""
    number = int(np.searchsorted(shards.parts.ends, row, side="right"))
    part, local = shards.parts.locate(row)
    begin, end = (int(at) for at in starts(part)(np.array([local, local + 1])))
    windows = Windows(shards, "host", window_bytes=0, stored_bytes=0, device=None)
    memory = pages(max(0, end - begin) * MOST_ITEM_BYTES + 4 * reader.PAGE_BYTES + SLACK_BYTES)
    rows = WindowRows(0, 1, 0, 1, 1, np.array([number], np.int32), np.array([local]), np.ones(1, np.int64))
    with ThreadPoolExecutor(1) as pool, closing(windows):
        window, _ = fill_window(windows, memory.data_ptr(), InPlace(memory), rows, pool, lambda: None)
        yield window, np.zeros(1, np.int64)


def _lay(windows: Windows, part: Part, first: int, count: int, at: int) -> _Laid:
    """Lay out `count` rows of a part from `first` on at `at`, whole pages, with a row table of their own."""
    table, (start, stop) = _table(part, first, count)
    reads, offsets, leads = [], [], []
    for strand in strands(part, start, stop):
        file = windows.file(part, strand.path)
        begin, end = strand.pages
        is_seen = not _goes_there(windows, part) if part.shard is not None else strand.path.name == FileNames.COLPTR.value
        reads.append(Read(file, begin, min(end, file.size_bytes), at, is_seen))
        leads.append(slice(strand.start - begin, strand.stop - begin))
        offsets.append(at + strand.start - begin)
        at += end - begin
    check = _unchecked if windows.kind == "host" else partial(_check_read, _check(windows, part, first, table, start), leads)
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


def _goes_there(windows: Windows, part: Part) -> bool:
    """Tell whether what no check looks at is read straight to the device: of files behind URLs nothing is."""
    return windows.reaches_device and part.archive.remote is None


def _check(windows: Windows, part: Part, first: int, table: NDArray[Any], start: int) -> Check:
    if part.shard is not None:
        return _unchecked if _goes_there(windows, part) else packed_check(part.shard, first, first + table.size - 1)
    return raw_check(_raw(part), first, table.view(np.int64) + start, windows.shards.n_vars)


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
        archive = _raw(part)
        kind = kind_of(archive.dtype)
        raw[number] = (base + at[0], base + at[1], part.limit, archive.indices.itemsize, kind, ascends or archive.canonical, 0)
    return raw, packed


def _raw(part: Part) -> RawArchive:
    if not isinstance(part.archive, RawArchive):
        raise ArchiveError(f"{part.archive.path} is packed, and a part of it is none of its shards")
    return part.archive
