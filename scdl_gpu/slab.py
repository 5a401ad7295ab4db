"""One slab of memory that holds the columns and values of archives: its layout, and how it is filled.

Knows files, rows and what is wrong with them, not where a slab lies or why. Every row is checked while it is read: one
pass over the files at the speed of memory, instead of a scan of its own.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from scdl_gpu import reader
from scdl_gpu.archive.check import check_columns, check_distinct, pieces
from scdl_gpu.archive.constants import FileNames
from scdl_gpu.archive.raw import ARRAY_FILES, RawArchive
from scdl_gpu.device import Device, Event, padded
from scdl_gpu.errors import ArchiveError

Progress = Callable[[int], None]

PIECE_ELEMENTS = 1 << 20
"""Read, checked and uploaded at one go: extents of 1 to 8 MiB."""
THREADS = 8
"""That read and check pieces; as many bounce buffers exist."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the columns and the values of an archive begin in the slab, in bytes."""

    indices: int
    data: int


class Layout:
    """How the archives lie in one slab, each once. numbers: for each shard the archive it is."""

    def __init__(self, shards: Sequence[RawArchive]) -> None:
        keys = [archive.stamp or (id(archive),) for archive in shards]
        known = dict(zip(keys, shards, strict=True))
        self.archives = list(known.values())
        numbers = {key: number for number, key in enumerate(known)}
        self.numbers = [numbers[key] for key in keys]
        self.places, end = [], 0
        for archive in self.archives:
            data = end + padded(archive.indices.nbytes)
            self.places.append(Place(end, data))
            end = data + padded(archive.data.nbytes)
        self.size_bytes = end

    @property
    def arena_bytes(self) -> int:
        """Size of an arena: the slab, and for each archive whether its rows ascend."""
        return self.size_bytes + len(self.archives)

    def name(self) -> str:
        """Name what lies in the slab: the same for all processes that opened the same files. Raises ArchiveError."""
        digest = hashlib.sha256(b"scdl_gpu arena 1")
        for archive in self.archives:
            digest.update(repr(archive.var.column_dims()).encode())
            for file in ARRAY_FILES:
                with _open(archive, file) as opened:
                    status = opened.status
                facts = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, archive.dtypes[file])
                digest.update(repr(facts).encode())
        return digest.hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows: the first, their pointers, the number of genes, and where their columns and values lie in the slab."""

    first: int
    pointers: NDArray[np.int64]
    n_vars: int | None
    indices: slice
    data: slice


@dataclass(slots=True)
class Buffers:
    """Where a piece is read to. data: None where the values go another way. event: when an upload out of them is done."""

    indices: torch.Tensor
    data: torch.Tensor | None
    memory: torch.Tensor
    event: Event | None = None


class Sink(Protocol):
    """What receives the pieces of a slab."""

    def values(self, where: slice) -> torch.Tensor | None:
        """Give the memory that takes all values of an archive, `where` in the slab, at once; None: they come in pieces."""

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
        return Buffers(self._slab[piece.indices], self._slab[piece.data], self._slab)

    def deliver(self, piece: Piece, buffers: Buffers) -> None:
        """Leave them there."""


class Bounced:
    """Pieces are read to page-locked buffers, in turn, and uploaded; values go straight to the device where the reader can."""

    def __init__(self, device: Device, size_bytes: int) -> None:
        self._device, self._ring = device, deque[Buffers]()
        self._is_direct = reader.reaches_device()
        self.slab = device.allocate(size_bytes)
        if self._is_direct:
            device.record().wait()  # waits, once: kvikio's writes are in no stream, the memory's last use may still be

    def values(self, where: slice) -> torch.Tensor | None:
        """Give the place on the device, where the reader can write to it."""
        return self.slab[where] if self._is_direct else None

    def buffers(self, piece: Piece) -> Buffers:
        """Give the buffers that were delivered longest ago; made anew while there are fewer than pieces under way."""
        n_indices, n_data = piece.indices.stop - piece.indices.start, 0 if self._is_direct else piece.data.stop - piece.data.start
        start = padded(n_indices)
        memory = torch.empty(0, dtype=torch.uint8)
        if len(self._ring) == THREADS:
            last = self._ring.popleft()
            memory = last.memory
            if last.event is not None:
                last.event.wait()  # waits
        if memory.numel() < start + n_data:
            memory = self._device.staging(start + n_data)
        buffers = Buffers(memory[:n_indices], None if self._is_direct else memory[start : start + n_data], memory)
        self._ring.append(buffers)
        return buffers

    def deliver(self, piece: Piece, buffers: Buffers) -> None:
        """Enqueue the upload; the buffers are used again when it is done."""
        self._device.upload(buffers.indices, self.slab[piece.indices])
        if buffers.data is not None:
            self._device.upload(buffers.data, self.slab[piece.data])
        buffers.event = self._device.record()

    def clear(self) -> None:
        """Let go of the memory."""
        self._ring.clear()
        self.slab = torch.empty(0, dtype=torch.uint8)


def fill(layout: Layout, sink: Sink, progress: Progress) -> list[bool]:
    """Read and check all archives; return for each whether the columns of every row ascend."""
    is_sorted = []
    with ThreadPoolExecutor(THREADS, thread_name_prefix="scdl-place") as pool:
        for archive, place in zip(layout.archives, layout.places, strict=True):
            with _open(archive, FileNames.COLPTR.value) as indices, _open(archive, FileNames.DATA.value) as data:
                values = sink.values(slice(place.data, place.data + archive.data.nbytes))
                if values is not None:
                    data.read(0, archive.data.nbytes, values)
                    progress(archive.data.nbytes)
                load = partial(_load, archive, indices, data)
                is_sorted.append(_copy_pieces(_pieces(archive, place), sink, partial(pool.submit, load), progress))
    return is_sorted


def _copy_pieces(some: Iterator[Piece], sink: Sink, submit: Callable[[Piece, Buffers], "Future[bool]"], progress: Progress) -> bool:
    """Read and check pieces in threads, THREADS at a time, and deliver them in order; return whether all rows ascend."""
    pending: deque[tuple[Piece, Buffers, Future[bool]]] = deque()
    is_sorted = True

    def finish() -> bool:
        piece, buffers, future = pending[0]
        ascending = future.result()
        pending.popleft()
        sink.deliver(piece, buffers)
        progress(buffers.indices.numel() + (0 if buffers.data is None else buffers.data.numel()))
        return ascending

    try:
        for piece in some:
            if len(pending) == THREADS:
                is_sorted &= finish()
            buffers = sink.buffers(piece)
            pending.append((piece, buffers, submit(piece, buffers)))
        while pending:
            is_sorted &= finish()
    finally:
        for _, _, future in pending:
            future.cancel()
        wait([future for _, _, future in pending])  # a thread may still be reading into the buffers
    return is_sorted


def _pieces(archive: RawArchive, place: Place) -> Iterator[Piece]:
    """Cut an archive into pieces. Raises ArchiveError for a row with more elements than genes, which must hold one twice."""
    width, depth = archive.indices.itemsize, archive.data.itemsize
    for first, pointers, n_vars in pieces(archive, archive.var, PIECE_ELEMENTS):
        longest = int(np.diff(pointers).max())
        if n_vars is not None and longest > n_vars:
            row = first + int(np.diff(pointers).argmax())
            raise ArchiveError(
                f"{archive.path / FileNames.COLPTR.value}: row {row} holds {longest:,} elements, the archive has {n_vars:,} genes: "
                f"some are there twice; bring the rows into canonical form with `scdl-gpu convert --canonical`"
            )
        start, stop = int(pointers[0]), int(pointers[-1])
        indices = slice(place.indices + start * width, place.indices + stop * width)
        yield Piece(first, pointers, n_vars, indices, slice(place.data + start * depth, place.data + stop * depth))


def _load(archive: RawArchive, indices: reader.File, data: reader.File, piece: Piece, buffers: Buffers) -> bool:
    """Read one piece and check it; return whether the columns of its rows ascend, and raise ArchiveError if they are not distinct."""
    start, stop = int(piece.pointers[0]), int(piece.pointers[-1])
    indices.read(start * archive.indices.itemsize, stop * archive.indices.itemsize, buffers.indices)
    if buffers.data is not None:
        data.read(start * archive.data.itemsize, stop * archive.data.itemsize, buffers.data)
    columns = buffers.indices.numpy().view(archive.indices.dtype)
    if check_columns(archive, piece.first, piece.pointers, columns, n_vars=piece.n_vars):
        return True
    check_distinct(archive, piece.first, piece.pointers, columns)
    return False


def _open(archive: RawArchive, name: str) -> reader.File:
    """Open a file of `archive`. Raises ArchiveError where it is not the one that was opened with it."""
    file = reader.File(archive.path / name)
    if archive.stamp and archive.stamp[ARRAY_FILES.index(name)] != (file.status.st_dev, file.status.st_ino):
        file.close()
        raise ArchiveError(f"{file.path} was replaced since the archive was opened: open it anew")
    return file
