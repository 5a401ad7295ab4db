"""Memory that batches are made in, used again and again, and the way from there to a device.

Knows sizes, references and events, not rows. Fresh pages of a large output cost as much as filling them
(benchmarks/LOG.md, 2026-11-23), so a buffer is used again as soon as nothing refers to what was made in it; the price is
that as many buffers stay as were ever in use at once, up to KEPT of them free.
"""

import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from scdl_gpu.device import Device, Event

Bytes = NDArray[np.uint8]

KEPT = 64
"""Buffers that may lie idle in a ring."""
SLACK = 4
"""A buffer up to this many times too large is used, so that row pointers do not take the place of values."""
SMALL_BYTES = 4096
"""Below this, what a buffer wastes does not matter."""
PART_ALIGNMENT = 16
"""Bytes that each array of a parcel begins at a multiple of."""


def _fresh(size_bytes: int) -> Bytes:
    return np.empty(size_bytes, np.uint8)


def _references(buffers: list[Bytes]) -> list[int]:
    return [sys.getrefcount(buffer) for buffer in buffers]


class Ring:
    """Buffers that are used again when nobody refers to what was made in them. Safe for threads.

    make: gives new memory of so many bytes.
    """

    def __init__(self, make: Callable[[int], Bytes] = _fresh) -> None:
        self._make = make
        self._buffers: list[Bytes] = []
        self._lock = threading.Lock()
        self._references_of_free = _references([_fresh(1)])[0]  # differs between releases of Python

    def empty(self, n: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return (n,) uninitialised values in a buffer that is free, or in a new one, a quarter larger than asked for."""
        size = n * dtype.itemsize
        with self._lock:
            place = self._place(size)
            return self._buffers[place][:size].view(dtype)

    def _place(self, size: int) -> int:
        """Find the smallest free buffer that holds `size` bytes, or make one; returns where it is among the buffers."""
        free = [k for k, count in enumerate(_references(self._buffers)) if count == self._references_of_free]
        if len(free) > KEPT:
            dropped = set(free[KEPT:])
            self._buffers = [buffer for k, buffer in enumerate(self._buffers) if k not in dropped]
            return self._place(size)
        alike = [k for k in free if self._buffers[k].size <= SLACK * size + SMALL_BYTES]
        fitting = [k for k in alike if self._buffers[k].size >= size]
        if fitting:
            return min(fitting, key=lambda k: self._buffers[k].size)
        made = self._make(size + size // 4)
        if alike:  # all of them too small: the largest gives way
            place = max(alike, key=lambda k: self._buffers[k].size)
            self._buffers[place] = made
            return place
        self._buffers.append(made)
        return len(self._buffers) - 1


class Part(NamedTuple):
    """An array of a parcel on the device, for kernels: how long it is, and where."""

    length: int
    address: int

    def __len__(self) -> int:
        return self.length

    def data_ptr(self) -> int:
        """Give its address, as a tensor does."""
        return self.address


class Parcel(NamedTuple):
    """Arrays, one after the other in page-locked memory; places: where each begins, in bytes, its dtype and length."""

    memory: Bytes
    places: dict[str, tuple[int, np.dtype[Any], int]]


class Arrived:
    """A parcel on the device."""

    def __init__(self, memory: torch.Tensor, places: dict[str, tuple[int, np.dtype[Any], int]]) -> None:
        self._memory, self._places, self._address = memory, places, memory.data_ptr()

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def part(self, name: str) -> Part:
        """Give an array for kernels; an empty one where the parcel has none of this name."""
        start, _, length = self._places.get(name, (0, None, 0))
        return Part(length, self._address + start)

    def tensor(self, name: str) -> torch.Tensor:
        """Give an array as a tensor over the memory of the parcel."""
        start, dtype, length = self._places[name]
        return self._memory[start : start + length * dtype.itemsize].view(getattr(torch, dtype.name))


class Courier:
    """Brings arrays of the host to a device, through page-locked memory, without a wait.

    ring: page-locked buffers; those that a copy still reads are not free.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self.ring = Ring(lambda size_bytes: device.staging(size_bytes).numpy())
        self._under_way: deque[tuple[Event, Any]] = deque()

    def packed(self, arrays: Mapping[str, NDArray[Any]]) -> Parcel:
        """Copy arrays, (n,) each, to page-locked memory. Any thread may."""
        places, total = {}, 0
        for name, array in arrays.items():
            places[name] = (total, array.dtype, array.size)
            total += -(-array.nbytes // PART_ALIGNMENT) * PART_ALIGNMENT
        memory = self.ring.empty(total, np.dtype(np.uint8))
        for name, array in arrays.items():
            start = places[name][0]
            memory[start : start + array.nbytes] = array.view(np.uint8)
        return Parcel(memory, places)

    def bring(self, parcel: Parcel, *tensors: torch.Tensor) -> tuple[Arrived, list[torch.Tensor]]:
        """Enqueue the copies of a parcel, and of tensors that lie in buffers of the ring. In one thread only."""
        while self._under_way and self._under_way[0][0].is_done():
            self._under_way.popleft()
        hosts = [torch.from_numpy(parcel.memory), *tensors]
        arrived = [self._device.empty(tuple(host.shape), host.dtype) for host in hosts]
        for host, there in zip(hosts, arrived, strict=True):
            self._device.upload(host, there)
        self._under_way.append((self._device.record(), hosts))
        return Arrived(arrived[0], parcel.places), arrived[1:]

    def clear(self) -> None:
        """Let the memory go; nothing may be under way."""
        self._under_way.clear()
        self.ring = Ring(lambda size_bytes: self._device.staging(size_bytes).numpy())
