"""One HDF5 dataset, read past HDF5's global lock.

Knows where the bytes of a dataset lie and how gzip and shuffle are undone; not what the numbers mean. Bytes
are read at their file offset and decompressed in threads. What it does not understand (other filters, odd
types, external files) it reads through h5py, correctly and on one core.
"""

import itertools
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast

import h5py
import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from scdl_gpu.archive.commit import NO_SPACE
from scdl_gpu.convert.spill import PIECE_BYTES, SpilledChunk, joined
from scdl_gpu.errors import SourceError

MAX_CHUNK_BYTES = 64 << 20
"""Chunks larger than this are unpacked into a temporary file: two or three of them in memory would break the memory bound."""

H5_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, OverflowError)
"""What h5py and the decoders raise for bytes that are no valid HDF5."""


DECODE_ERRORS: tuple[type[Exception], ...] = (cast(type[Exception], isal_zlib.error), ValueError, MemoryError)
"""What isal raises for bytes that are no zlib stream."""

Job = TypeVar("Job")


@dataclass(frozen=True)
class Chunks:
    """Where the chunks of a dataset lie. Arrays have one entry per chunk, in C order; an offset of -1: never written."""

    shape: tuple[int, ...]
    grid: tuple[int, ...]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    masks: NDArray[np.uint32]


class H5Array:
    """One dataset of an open file, read in this process by any number of threads of `pool`, one `read` at a time."""

    def __init__(self, dataset: h5py.Dataset, *, path: Path, pool: Executor, threads: int, scratch: Path | None = None) -> None:
        self.where = f"{path}: {dataset.name.lstrip('/')}"
        self.shape: tuple[int, ...] = tuple(int(n) for n in dataset.shape)
        self.dtype: np.dtype[Any] = dataset.dtype.newbyteorder("=")
        self._dataset = dataset
        self._stored = dataset.dtype
        self._pool = pool
        self._threads = threads
        self._path = path
        self._scratch = scratch
        self._last: tuple[int, NDArray[Any]] | None = None
        self._spilled: tuple[int, SpilledChunk] | None = None

    @cached_property
    def _fd(self) -> int:
        return os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Close the descriptor; harmless when repeated."""
        fd = self.__dict__.pop("_fd", None)
        if fd is not None:
            os.close(fd)
        if self._spilled is not None:
            self._spilled[1].close()
        self._last = self._spilled = None

    @cached_property
    def _is_plain(self) -> bool:
        """Whether an element is its bytes: a number in a layout that NumPy has too, in this file, without a user block."""
        dataset = self._dataset
        return bool(
            dataset.dtype.kind in "biuf"
            and dataset.id.get_type().equal(h5py.h5t.py_create(dataset.dtype))
            and dataset.id.get_create_plist().get_external_count() == 0
            and dataset.file.userblock_size == 0
            and dataset.file.driver == "sec2"
        )

    @cached_property
    def _offset(self) -> int | None:
        """File offset of a contiguous dataset that has been written."""
        if not self._is_plain or self._dataset.id.get_create_plist().get_layout() != h5py.h5d.CONTIGUOUS:
            return None
        offset = self._dataset.id.get_offset()
        return None if offset is None else int(offset)

    @cached_property
    def _filters(self) -> tuple[int, ...] | None:
        """HDF5's numbers of the filters of a chunk, in order; None where one is not understood here."""
        plist = self._dataset.id.get_create_plist()
        filters = tuple(int(plist.get_filter(k)[0]) for k in range(plist.get_nfilters()))
        known = ((), (h5py.h5z.FILTER_DEFLATE,), (h5py.h5z.FILTER_SHUFFLE,), (h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE))
        return filters if filters in known else None

    @cached_property
    def _chunks(self) -> Chunks | None:
        """Addresses of all chunks, read once; None where chunks are not to be read here."""
        shape = self._dataset.chunks
        if not self._is_plain or shape is None or self._filters is None or not hasattr(self._dataset.id, "chunk_iter"):
            return None
        grid = tuple(-(-n // step) for n, step in zip(self.shape, shape, strict=True))
        count = math.prod(grid)
        offsets, sizes, masks = np.full(count, -1, np.int64), np.zeros(count, np.int64), np.zeros(count, np.uint32)

        def note(chunk: Any) -> None:
            number = 0
            for first, step, n in zip(chunk.chunk_offset, shape, grid, strict=True):
                if first // step >= n:
                    return
                number = number * n + first // step
            offsets[number], sizes[number], masks[number] = chunk.byte_offset, chunk.size, chunk.filter_mask

        self._dataset.id.chunk_iter(note)
        return Chunks(shape, grid, offsets, sizes, masks)

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """Shape of the stored chunks; single rows where there are none, or where a chunk is kept in a file anyway."""
        shape: tuple[int, ...] | None = self._dataset.chunks
        single = (1, *self.shape[1:])
        if shape is None or (self._chunks is not None and self._is_oversize(shape) and shape[1:] >= single[1:]):
            return single
        return shape

    def _is_oversize(self, chunk_shape: tuple[int, ...]) -> bool:
        return bool(math.prod(chunk_shape) * self._stored.itemsize > MAX_CHUNK_BYTES)

    def read(self, start: int, stop: int, out: NDArray[Any], columns: tuple[int, int] | None = None) -> NDArray[Any]:
        """Fill `out[:stop - start]` with elements or rows start..stop; raises SourceError naming the place of the fault."""
        out = out[: stop - start]
        if out.size == 0:
            return out
        target = out if self._stored.isnative else out.view(self._stored)
        area = (slice(start, stop), *(slice(0, n) for n in self.shape[1:]))
        if columns is not None:
            area = (area[0], slice(*columns))
        try:
            if self._offset is not None and area[1:] == tuple(slice(0, n) for n in self.shape[1:]):
                self._read_contiguous(start, target)
            elif self._chunks is not None:
                self._read_chunks(self._chunks, area, target)
            else:
                self._dataset.read_direct(out, area)
                target = out
        except H5_ERRORS as error:
            if isinstance(error, OSError) and error.errno in NO_SPACE:
                raise
            raise SourceError(f"{self.where}[{start}:{stop}] cannot be read ({error}); {self._cure()}") from error
        if target is not out:
            np.copyto(out, target)
        return out

    def _cure(self) -> str:
        if self._filters is None:
            return "is the plugin for its filter installed (import hdf5plugin first)? Otherwise the file is damaged: copy or write it again"
        return "the file is damaged: copy it again"

    def _read_contiguous(self, start: int, target: NDArray[Any]) -> None:
        first = int(self._offset or 0) + start * (target.nbytes // len(target))
        parts = np.array_split(_bytes(target), max(1, min(self._threads, target.nbytes >> 20)))
        at = first
        jobs: list[tuple[int, NDArray[np.uint8]]] = []
        for part in parts:
            jobs.append((at, part))
            at += part.size
        self._run(lambda job: _pread(self._fd, *job), jobs)

    def _read_chunks(self, chunks: Chunks, area: tuple[slice, ...], target: NDArray[Any]) -> None:
        touched = [range(part.start // step, -(-part.stop // step)) for part, step in zip(area, chunks.shape, strict=True)]
        jobs = list(itertools.product(*touched))
        if self._is_oversize(chunks.shape):
            for place in jobs:
                self._copy_chunk(chunks, place, area, target)
        else:
            self._run(lambda place: self._copy_chunk(chunks, place, area, target), jobs)

    def _run(self, work: Callable[[Job], None], jobs: Sequence[Job]) -> None:
        """Do all jobs, in as many runs as there are threads."""
        if len(jobs) <= 1 or self._threads == 1:
            for job in jobs:
                work(job)
            return
        count = min(len(jobs), 4 * self._threads)
        bounds = [len(jobs) * k // count for k in range(count + 1)]
        runs = [jobs[a:b] for a, b in itertools.pairwise(bounds)]
        for future in [self._pool.submit(_each, work, run) for run in runs]:
            future.result()

    def _copy_chunk(self, chunks: Chunks, place: tuple[int, ...], area: tuple[slice, ...], target: NDArray[Any]) -> None:
        """Put what one chunk holds of `area` where it belongs in `target`. place: the chunk's in the grid."""
        number = 0
        into: list[slice] = []
        out_of: list[slice] = []
        for k, step, n, wanted in zip(place, chunks.shape, chunks.grid, area, strict=True):
            number = number * n + k
            low, high = max(k * step, wanted.start), min((k + 1) * step, wanted.stop)
            into.append(slice(low - wanted.start, high - wanted.start))
            out_of.append(slice(low - k * step, high - k * step))
        out = target[tuple(into)]
        if chunks.offsets[number] < 0:
            out[...] = self._dataset.fillvalue
        elif not self._filters and target.ndim == 1:
            self._check_size(chunks, number)
            _pread(self._fd, int(chunks.offsets[number]) + out_of[0].start * self._stored.itemsize, _bytes(out))
        elif self._is_oversize(chunks.shape):
            self._copy_spilled(chunks, number, out_of, out)
        else:
            ends_inside = target.ndim == 1 and into[0].stop == target.size and out_of[0].stop < chunks.shape[0]
            out[...] = self._decode(chunks, number, keep=ends_inside)[tuple(out_of)]

    def _copy_spilled(self, chunks: Chunks, number: int, part: list[slice], out: NDArray[Any]) -> None:
        if self._spilled is None or self._spilled[0] != number:
            if self._spilled is not None:
                self._spilled[1].close()
            self._spilled = (number, self._spill(chunks, number))
        line = math.prod(chunks.shape[1:])
        values = self._spilled[1].read(part[0].start * line, part[0].stop * line).reshape(-1, *chunks.shape[1:])
        out[...] = values[(slice(None), *part[1:])]

    def _spill(self, chunks: Chunks, number: int) -> SpilledChunk:
        offset, size = int(chunks.offsets[number]), int(chunks.sizes[number])
        filters = self._active_filters(int(chunks.masks[number]))
        try:
            return SpilledChunk(
                (os.pread(self._fd, min(PIECE_BYTES, size - at), offset + at) for at in range(0, size, PIECE_BYTES)),
                self._stored,
                math.prod(chunks.shape),
                deflated=h5py.h5z.FILTER_DEFLATE in filters,
                shuffled=h5py.h5z.FILTER_SHUFFLE in filters,
                scratch=self._scratch,
            )
        except DECODE_ERRORS as error:
            raise ValueError(f"the chunk at byte {offset:,} cannot be unpacked: {error}") from error

    def _active_filters(self, mask: int) -> list[int]:
        """List the filters that were applied to a chunk; bit k of its mask says that the k-th was not."""
        return [code for k, code in enumerate(self._filters or ()) if not mask >> k & 1]

    def _check_size(self, chunks: Chunks, number: int) -> None:
        expected = math.prod(chunks.shape) * self._stored.itemsize
        if chunks.sizes[number] != expected:
            raise ValueError(f"the chunk at byte {chunks.offsets[number]:,} holds {chunks.sizes[number]:,} bytes, expected {expected:,}")

    def _decode(self, chunks: Chunks, number: int, *, keep: bool) -> NDArray[Any]:
        """Return a whole chunk, unfiltered; `keep` it for the next read, which begins in it."""
        last = self._last
        if last is not None and last[0] == number:
            return last[1]
        offset, mask = int(chunks.offsets[number]), int(chunks.masks[number])
        raw = np.empty(int(chunks.sizes[number]), np.uint8)
        _pread(self._fd, offset, raw)
        values = self._unfilter(raw, mask, chunks, offset).reshape(chunks.shape)
        if keep:
            self._last = (number, values)
        return values

    def _unfilter(self, raw: NDArray[np.uint8], mask: int, chunks: Chunks, offset: int) -> NDArray[Any]:
        expected = math.prod(chunks.shape) * self._stored.itemsize
        for code in reversed(self._active_filters(mask)):
            if code == h5py.h5z.FILTER_DEFLATE:
                try:
                    raw = np.frombuffer(isal_zlib.decompress(raw, bufsize=expected), np.uint8)
                except DECODE_ERRORS as error:
                    raise ValueError(f"the chunk at byte {offset:,} is no valid gzip stream: {error}") from error
            elif raw.size == expected:
                raw = joined(raw.reshape(self._stored.itemsize, -1))
        if raw.size != expected:
            raise ValueError(f"the chunk at byte {offset:,} unpacks to {raw.size:,} bytes, expected {expected:,}")
        return raw.view(self._stored)


def _each(work: Callable[[Job], None], jobs: Sequence[Job]) -> None:
    for job in jobs:
        work(job)


def _bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    return array.reshape(-1).view(np.uint8)


def _pread(fd: int, offset: int, out: NDArray[np.uint8]) -> None:
    done = 0
    while done < out.size:
        got = os.preadv(fd, [out.data[done : done + (1 << 30)]], offset + done)
        if got == 0:
            raise ValueError(f"the file ends {out.size - done:,} bytes too early, at byte {offset + done:,}")
        done += got
