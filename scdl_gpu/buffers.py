"""Memory that batches are made in, used again and again, and the way from there to a device.

Knows sizes, references and events, not rows. Fresh pages of a large output cost about as much as filling
them (the design's figure, not measured here), so a buffer is used again as soon as nothing refers to what was made in it; the price is
memory that stays: what was ever in use at once, up to a limit.
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
"""Buffers of one kind of size that a ring knows, and four for each thread: of more, one in use is forgotten."""
TRIED = 16
"""Buffers that are looked at before a new one is made; the first is the one that was given out longest ago, and mostly free."""
PART_ALIGNMENT = 16
"""Bytes that each array of a parcel begins at a multiple of."""


def _fresh(size_bytes: int) -> Bytes:
    return np.empty(size_bytes, np.uint8)


class Ring:
    """Buffers that are used again when nobody refers to what was made in them. Safe for threads.

    make: gives new memory of so many bytes.
    """

    def __init__(self, make: Callable[[int], Bytes] = _fresh) -> None:
        self._make = make
        self._kept = KEPT + 4 * torch.get_num_threads()
        self._buffers: dict[int, deque[Bytes]] = {}  # by the bits of their size, so that row pointers do not take the place of values
        self._lock = threading.Lock()
        buffer = _fresh(1)
        self._references_of_free = sys.getrefcount(buffer)  # differs between releases of Python

    def empty(self, n: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return (n,) uninitialised values in a buffer that is free, or in a new one, a quarter larger than asked for."""
        size = n * dtype.itemsize
        with self._lock:
            known = self._buffers.get(size.bit_length()) or self._buffers.setdefault(size.bit_length(), deque())
            for _ in range(min(TRIED, len(known))):
                buffer = known.popleft()
                is_free = sys.getrefcount(buffer) == self._references_of_free
                if is_free and buffer.size < size:
                    continue  # too small: let go
                known.append(buffer)
                if is_free:
                    return buffer[:size].view(dtype)
            if len(known) == self._kept:
                known.pop()  # one that is in use, for long perhaps
            buffer = self._make(size + size // 4)
            known.append(buffer)
            return buffer[:size].view(dtype)


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
