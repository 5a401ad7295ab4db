"""Windows of an epoch that streams: filled from files, one ahead of the one that is consumed.

Knows extents, files and two stretches of memory, not batches. While a window is consumed the next is read, by threads with an
extent each, so that reads are in flight throughout; packed rows stay packed. The price of two windows is that each has half of the
memory.
"""

import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from scdl_gpu import reader
from scdl_gpu.archive.cuts import starts
from scdl_gpu.archive.parts import Part
from scdl_gpu.archive.payload import open_file, open_shard
from scdl_gpu.arena import available_bytes, pages
from scdl_gpu.device import Device, Event, size_words
from scdl_gpu.errors import DeviceError
from scdl_gpu.filling import Kind, fill_window, raw_of
from scdl_gpu.kernels.packed import SLACK_BYTES
from scdl_gpu.order import Order
from scdl_gpu.shards import Shards
from scdl_gpu.slab import THREADS, Bounced, InPlace, Sink
from scdl_gpu.window import Window
from scdl_gpu.window_order import WindowOrder, WindowRows, extent_bytes_of, fits

MOST_ITEM_BYTES = 16
"""Of an element: column and value, of 8 bytes each."""
STAYS = (
    "a loader that streams windows cannot go to a worker process of a DataLoader, nor be pickled: each worker would read all of the data. "
    "Iterate it directly, or use DataLoader(loader, batch_size=None, num_workers=0); it reads and assembles ahead by itself"
)


@dataclass(slots=True)
class Streaming:
    """What streaming did so far: bytes read, the seconds in which reads were in flight, windows filled, and how files are read,
    all ways that are in use.

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
            self.event = device.record()  # of what this memory was before: a second stream writes to it
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


_UNDER_WAY: "weakref.WeakSet[Stream]" = weakref.WeakSet()


def _cancel_all() -> None:
    """Let no thread wait for a consumer that has gone: the interpreter, which waits for threads, would never end."""
    for stream in list(_UNDER_WAY):
        stream.cancel()


@cache
def _watch_exit() -> None:
    """Call `_cancel_all` before executors join their threads, which begin to when the interpreter ends, before `atexit` is asked."""
    threading._register_atexit(_cancel_all)  # type: ignore[attr-defined]


def holds_batches(shards: Shards, order: Order, window_bytes: int) -> bool:
    """Tell whether windows of so many bytes hold the batches of every epoch. Raises ArchiveError for damaged row pointers."""
    return fits(order, shards.cuts(extent_bytes_of(window_bytes)), window_bytes)


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
        self._is_direct = stored_bytes > available_bytes()
        self._files: dict[Any, reader.AnyFile] = {}
        self._paths: dict[str, None] = {}
        self._slots: list[_Slot] = []
        self._streams: set[Stream] = set()
        self._is_closed = False
        self._lock = threading.RLock()

    def order(self, order: Order) -> WindowOrder:
        """Make the order of windows of these shards, for ranks, batches and seed as `order` has them."""
        extent_bytes = extent_bytes_of(self.window_bytes)
        cuts = self.shards.cuts(extent_bytes)
        return WindowOrder(order, cuts, self.part_starts, window_bytes=self.window_bytes, extent_bytes=extent_bytes)

    def stream(self, todo: Sequence[WindowRows]) -> "Stream":
        """Begin to fill windows, in this order."""
        with self._lock:
            stream = Stream(self, todo)
            self._streams.add(stream)
        return stream

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

    def ended(self, stream: "Stream", slots: list[_Slot]) -> None:
        """Take the memory of an epoch back for the next, or give it up where there is some already, or all is closed."""
        with self._lock:
            self._streams.discard(stream)
            if not self._slots and not self._is_closed:
                self._slots, slots = slots, []
        for slot in slots:
            if slot.event is not None:
                slot.event.wait()  # waits, for kernels that may still read
            slot.close()
        if self._is_closed and not self._streams:
            self._close_files()

    def file(self, part: Part, path: Path, left: threading.Event) -> reader.AnyFile:
        """Open a file of a part, once. Raises ArchiveError where it is not the one that was opened with the archive."""
        key = part.key, path  # a path may have been opened in two states
        with self._lock:
            found = self._files.get(key)
        if found is None:  # without the lock: a server may keep it waiting, and `close` is not to wait for that
            if part.shard is None:
                opened: reader.AnyFile = open_file(raw_of(part), path.name, is_direct=self._is_direct)
            else:
                opened = open_shard(part.shard, left, is_direct=self._is_direct)
            with self._lock:
                found = self._files.setdefault(key, opened)
                self._paths[found.path_in_use] = None
                self.report.path = " and ".join(self._paths)
            if found is not opened:
                opened.close()
        return found

    def close(self) -> None:
        """Give memory and files back; of an epoch that is streaming when its iteration is left, which gets no more windows."""
        with self._lock:
            self._is_closed = True
            slots, self._slots = self._slots, []
            streams = list(self._streams)
        for stream in streams:
            stream.cancel()
        if self.device is not None:
            self.device.record().wait()  # waits, for kernels that may still read
        for slot in slots:
            slot.close()
        if not streams:
            self._close_files()

    def _close_files(self) -> None:
        with self._lock:
            files, self._files = list(self._files.values()), {}
        for file in files:
            file.close()

    def __reduce__(self) -> NoReturn:
        raise RuntimeError(STAYS)

    def __repr__(self) -> str:
        return f"two windows of {size_words(self.window_bytes)} in {self.kind} memory, {self.report}"


class Stream:
    """Windows of one epoch, `todo`, filled in a thread: `window(k)` is there from when its future is done until `reached` passes it."""

    def __init__(self, windows: Windows, todo: Sequence[WindowRows]) -> None:
        self._windows, self._slots, self.todo = windows, windows.take_slots(), tuple(todo)
        self._reached, self._left = 0, threading.Event()
        self._changed = threading.Condition()
        self._readers = ThreadPoolExecutor(THREADS, thread_name_prefix="scdl-read")
        self._filler = ThreadPoolExecutor(1, thread_name_prefix="scdl-window")
        self._futures = [self._filler.submit(self._filled, k, rows) for k, rows in enumerate(self.todo)]
        _watch_exit()
        _UNDER_WAY.add(self)

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
            self._futures[self._reached : k] = [Future() for _ in range(self._reached, k)]  # their row tables go
            self._reached = k
            self._changed.notify_all()

    def _filled(self, k: int, rows: WindowRows) -> Window:
        """Fill the memory of window k, when nobody reads window k - 2 there any more."""
        slot, device = self._slots[k % 2], self._windows.device
        with self._changed:
            self._changed.wait_for(lambda: self._left.is_set() or self._reached >= k - 1)
            event, slot.event = slot.event, None
        self._raise_closed()
        if event is not None:
            event.wait()  # waits, in this thread
        begin = time.perf_counter()
        with nullcontext() if device is None else device.aside():
            try:
                window, size_bytes = fill_window(self._windows, slot.base, slot.sink, rows, self._readers, self._left)
            finally:
                if device is not None:
                    device.record().wait()  # waits, in this thread: no upload is under way, whatever came
        report = self._windows.report
        report.size_bytes, report.seconds = report.size_bytes + size_bytes, report.seconds + time.perf_counter() - begin
        report.n_windows += 1
        return window

    def _raise_closed(self) -> None:
        if self._left.is_set():
            raise CancelledError("the iteration was left")

    def cancel(self) -> None:
        """Let no more windows come; who waits for one is told so."""
        with self._changed:
            self._left.set()
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
            self._windows.ended(self, slots)


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
        window, _ = fill_window(windows, memory.data_ptr(), InPlace(memory), rows, pool, threading.Event())
        yield window, np.zeros(1, np.int64)
