"""One slab of memory that holds the rows of archives: its layout, and how it is filled.

Knows files, rows and what is wrong with them, not where a slab lies or why. Every row is checked while it is read: one
pass over the files at the speed of memory, instead of a scan of its own.
"""

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch

from scdl_gpu import reader
from scdl_gpu.archive.check import pieces
from scdl_gpu.archive.constants import FileNames
from scdl_gpu.archive.packed_shard import PackedShard
from scdl_gpu.archive.parts import Archive, Part, parts_of
from scdl_gpu.archive.payload import open_file, open_shard
from scdl_gpu.archive.raw import RawArchive
from scdl_gpu.archive.row_checks import packed_check, raw_check
from scdl_gpu.device import Device, Event
from scdl_gpu.kernels.packed import SLACK_BYTES
from scdl_gpu.reader import PAGE_BYTES

Progress = Callable[[int], None]

PIECE_ELEMENTS = 1 << 20
"""Read, checked and uploaded at one go: extents of 1 to 8 MiB; of a packed shard as many words."""
THREADS = 8
"""That read and check pieces; as many bounce buffers exist."""


class Read(NamedTuple):
    """Bytes start..stop-1 of a file, which belong at `at` in the slab. is_seen: whether the check of the piece looks at them."""

    file: reader.AnyFile
    start: int
    stop: int
    at: int
    is_seen: bool = True

    @property
    def where(self) -> slice:
        """Their place in the slab."""
        return slice(self.at, self.at + self.stop - self.start)


class Piece(NamedTuple):
    """Some rows. check: looks at what was read, an array of bytes for each read, empty for one that went straight to a device.

    It returns whether columns ascend, and raises ArchiveError.
    """

    reads: tuple[Read, ...]
    check: Callable[..., bool]


class Plot(Protocol):
    """What a part takes of the slab: size_bytes."""

    size_bytes: int

    def open(self) -> Iterator[reader.AnyFile]:
        """Open its files. Raises ArchiveError where one is not the one that was opened with the archive."""

    def facts(self, files: Sequence[reader.AnyFile]) -> Iterator[tuple[Any, ...]]:
        """Tell what it is from others."""

    def whole(self, files: Sequence[reader.AnyFile]) -> Read | None:
        """Give what nobody needs to look at, and may go another way than the pieces."""

    def pieces(self, files: Sequence[reader.AnyFile], *, is_whole: bool) -> Iterator[Piece]:
        """Cut it into pieces, of what is not `whole` or of all. Raises ArchiveError for what tables show to be damaged."""


class RawPlot:
    """Columns and values of rows of a raw archive. indices, data: where its element 0 would lie, multiples of ALIGNMENT."""

    def __init__(self, part: Part, start: int) -> None:
        self._part, self._archive = part, cast(RawArchive, part.archive)
        self.indices, end = part.stretch(start, self._archive.indices.itemsize)
        self.data, end = part.stretch(end, self._archive.data.itemsize)
        self.size_bytes = end - start

    def open(self) -> Iterator[reader.AnyFile]:
        """Open columns, then values."""
        for name in (FileNames.COLPTR.value, FileNames.DATA.value):
            yield open_file(self._archive, name)

    def facts(self, files: Sequence[reader.AnyFile]) -> Iterator[tuple[Any, ...]]:
        """Tell the number of genes, and of each file which and of what state it is, and its dtype."""
        yield tuple(self._archive.var.column_dims())
        with open_file(self._archive, FileNames.ROWPTR.value) as pointers:
            for file in (*files, pointers):
                yield *file.facts, self._archive.dtypes[file.name]

    def whole(self, files: Sequence[reader.AnyFile]) -> Read:
        """Give the values: any bits are one."""
        start, stop = (at * self._archive.data.itemsize for at in (self._part.start, self._part.limit))
        return Read(files[1], start, stop, self.data + start)

    def pieces(self, files: Sequence[reader.AnyFile], *, is_whole: bool) -> Iterator[Piece]:
        """Cut rows into pieces. Raises what `raw_check` does."""
        archive, begin = self._archive, self._part.skipped
        width, depth = archive.indices.itemsize, archive.data.itemsize
        for first, pointers, n_vars in pieces(archive, archive.var, PIECE_ELEMENTS, first=begin, stop=begin + self._part.n_rows):
            check = raw_check(archive, first, pointers, n_vars)
            start, stop = int(pointers[0]), int(pointers[-1])
            reads = [Read(files[0], start * width, stop * width, self.indices + start * width)]
            if not is_whole:
                reads.append(Read(files[1], start * depth, stop * depth, self.data + start * depth))
            yield Piece(tuple(reads), check)


class PackedPlot:
    """The payload of rows of a packed shard, which stays packed. payload: where its word 0 would lie, a multiple of ALIGNMENT."""

    def __init__(self, part: Part, start: int) -> None:
        self._part, self._shard = part, cast(PackedShard, part.shard)
        self.payload, end = part.stretch(start, 4)
        self.size_bytes = end - start

    def open(self) -> Iterator[reader.AnyFile]:
        """Open the file of the shard."""
        yield open_shard(self._shard, threading.Event())

    def facts(self, files: Sequence[reader.AnyFile]) -> Iterator[tuple[Any, ...]]:
        """Tell which file, and of what state it is."""
        yield files[0].facts

    def whole(self, files: Sequence[reader.AnyFile]) -> None:
        """Give nothing: every word is looked at."""

    def pieces(self, files: Sequence[reader.AnyFile], *, is_whole: bool) -> Iterator[Piece]:
        """Check the tables, and cut rows into pieces, whose checks are verified."""
        shard = self._shard
        shard.check_tables()
        offsets = shard.entries["offset"].astype(np.int64)
        first, end = self._part.skipped, self._part.skipped + self._part.n_rows
        while first < end:
            last = min(end, max(first + 1, int(np.searchsorted(offsets, offsets[first] + PIECE_ELEMENTS, side="right")) - 1))
            start, stop = 4 * int(offsets[first]), 4 * int(offsets[last])
            read = Read(files[0], shard.payload_start + start, shard.payload_start + stop, self.payload + start)
            yield Piece((read,), packed_check(shard, first, last))
            first = last


class Layout:
    """How archives, or some rows of them, lie in one slab, parts each once. numbers: for each part the plot that it has."""

    def __init__(self, archives: Sequence[Archive | Part]) -> None:
        known: dict[Any, int] = {}
        self.parts = [part for one in archives for part in ([one] if isinstance(one, Part) else parts_of(one))]
        self.plots: list[RawPlot | PackedPlot] = []
        self.numbers = []
        end = 0
        for part in self.parts:
            key = part.key, part.skipped, part.n_rows
            if key not in known:
                known[key] = len(self.plots)
                self.plots.append((RawPlot if part.shard is None else PackedPlot)(part, end))
                end += self.plots[-1].size_bytes
            self.numbers.append(known[key])
        self.has_packed = any(part.shard is not None for part in self.parts)
        self.size_bytes = end + (SLACK_BYTES if self.has_packed else 0)

    @property
    def arena_bytes(self) -> int:
        """Size of an arena: the slab, and for each plot whether its rows ascend."""
        return self.size_bytes + len(self.plots)

    def name(self) -> str:
        """Name what lies in the slab: the same for all processes that opened the same files. Raises ArchiveError."""
        digest = hashlib.sha256(b"scdl_gpu arena 2")
        for plot in self.plots:
            with ExitStack() as stack:
                for fact in plot.facts([stack.enter_context(file) for file in plot.open()]):
                    digest.update(repr(fact).encode())
        return digest.hexdigest()[:32]


@dataclass(slots=True)
class Buffers:
    """Where a piece is read to: `parts`, a tensor for each read, `seen`, the same on the host. event: when the upload of it is done."""

    parts: list[torch.Tensor]
    seen: list[torch.Tensor]
    memory: torch.Tensor
    event: Event | None = None


class Sink(Protocol):
    """What receives the pieces of a slab."""

    def values(self, where: slice) -> torch.Tensor | None:
        """Give the memory that takes all that nobody looks at, `where` in the slab, at once; None: it comes in pieces."""

    def buffers(self, piece: Piece) -> Buffers:
        """Give the memory that the next piece is read to."""

    def deliver(self, piece: Piece, buffers: Buffers) -> None:
        """Bring a piece, read and checked, to where it belongs; pieces come in the order in which they got buffers."""


class InPlace:
    """Pieces are read to where they stay."""

    def __init__(self, slab: torch.Tensor) -> None:
        self._slab = slab

    def values(self, where: slice) -> None:
        """Let values come in pieces."""

    def buffers(self, piece: Piece) -> Buffers:
        """Give the piece's own place in the slab."""
        parts = [self._slab[read.where] for read in piece.reads]
        return Buffers(parts, parts, self._slab)

    def deliver(self, piece: Piece, buffers: Buffers) -> None:
        """Leave them there."""


class Bounced:
    """Pieces are read to page-locked buffers, in turn, and uploaded; what no check looks at goes straight there where the reader can."""

    def __init__(self, device: Device, slab: torch.Tensor) -> None:
        self._device, self._ring = device, deque[Buffers]()
        self._is_direct = reader.reaches_device()
        self.slab = slab
        if self._is_direct:
            device.record().wait()  # waits, once: kvikio's writes are in no stream, the memory's last use may still be

    def values(self, where: slice) -> torch.Tensor | None:
        """Give the place on the device, where the reader can write to it."""
        return self.slab[where] if self._is_direct else None

    def buffers(self, piece: Piece) -> Buffers:
        """Give the buffers that were delivered longest ago; made anew while there are fewer than pieces under way."""
        bounced = [not (self._is_direct and read.file.reaches_device) or read.is_seen for read in piece.reads]
        sizes = [read.stop - read.start if here else 0 for read, here in zip(piece.reads, bounced, strict=True)]
        starts = np.cumsum([0, *(-(-size // PAGE_BYTES) * PAGE_BYTES for size in sizes)])
        needed = int(starts[-2]) + sizes[-1]
        memory = torch.empty(0, dtype=torch.uint8)
        if len(self._ring) == THREADS:
            last = self._ring.popleft()
            memory = last.memory
            if last.event is not None:
                last.event.wait()  # waits
        if memory.numel() < needed:
            memory = self._device.staging(needed)
        seen = [memory[start : start + size] for start, size in zip(starts, sizes, strict=False)]
        parts = [part if here else self.slab[read.where] for read, part, here in zip(piece.reads, seen, bounced, strict=True)]
        buffers = Buffers(parts, seen, memory)
        self._ring.append(buffers)
        return buffers

    def deliver(self, piece: Piece, buffers: Buffers) -> None:
        """Enqueue the upload of what is not there yet; the buffers are used again when it is done."""
        for read, part, seen in zip(piece.reads, buffers.parts, buffers.seen, strict=True):
            if part is seen:
                self._device.upload(part, self.slab[read.where])
        buffers.event = self._device.record()

    def clear(self) -> None:
        """Let go of the memory."""
        self._ring.clear()
        self.slab = torch.empty(0, dtype=torch.uint8)


def fill(layout: Layout, sink: Sink, progress: Progress) -> list[bool]:
    """Read and check all plots; return for each whether the columns of every row ascend."""
    is_sorted = []
    with ThreadPoolExecutor(THREADS, thread_name_prefix="scdl-place") as pool:
        for plot in layout.plots:
            with ExitStack() as stack:
                files = [stack.enter_context(file) for file in plot.open()]
                whole = plot.whole(files)
                there = None if whole is None or not whole.file.reaches_device else sink.values(whole.where)
                if whole is not None and there is not None:
                    whole.file.read(whole.start, whole.stop, there)
                    progress(whole.stop - whole.start)
                some = plot.pieces(files, is_whole=there is not None)
                is_sorted.append(all(copy_pieces(some, sink, pool, progress)))
    return is_sorted


def copy_pieces(some: Iterator[Piece], sink: Sink, pool: Executor, progress: Progress) -> list[bool]:
    """Read and check pieces in threads, THREADS at a time, and deliver them in order; return for each whether its rows ascend."""
    pending: deque[tuple[Piece, Buffers, Future[bool]]] = deque()
    is_sorted = []

    def finish() -> None:
        piece, buffers, future = pending[0]
        is_sorted.append(future.result())
        pending.popleft()
        sink.deliver(piece, buffers)
        progress(sum(part.numel() for part in buffers.parts))

    try:
        for piece in some:
            if len(pending) == THREADS:
                finish()
            buffers = sink.buffers(piece)
            pending.append((piece, buffers, pool.submit(_load, piece, buffers)))
        while pending:
            finish()
    finally:
        for _, _, future in pending:
            future.cancel()
        wait([future for _, _, future in pending])  # a thread may still be reading into the buffers
    return is_sorted


def _load(piece: Piece, buffers: Buffers) -> bool:
    """Read one piece and check it; return whether the columns of its rows ascend."""
    for read, part in zip(piece.reads, buffers.parts, strict=True):
        read.file.read(read.start, read.stop, part)
    return piece.check(*(part.numpy() for part in buffers.seen))
