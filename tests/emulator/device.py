"""A device made of memory of the host and the emulator: the cuda backend runs on it in every test.

Knows what a GPU does with memory and order, as far as Python can see it: uploads happen as late as a stream may make
them, memory runs out, what is not initialised is rubbish, and every allocation ends where it ends.
"""

import contextlib
import ctypes
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from emulator import memory
from emulator.launcher import Emulator

from scdl_gpu.device import padded
from scdl_gpu.errors import DeviceError
from scdl_gpu.kernels.shards import ALIGNMENT


class EmulatedDevice:
    """A Device for tests. total_bytes: size of its memory; launcher: starts kernels, by default an Emulator.

    waits, launches: how many there were. allocated_bytes, pinned, opened: what is held now. fail_pin: let the next `pin` fail;
    fail_open: every `open_shared`. bus: what `bus_id` gives; unreachable: those of devices that this one cannot read.
    """

    def __init__(self, total_bytes: int = 8 << 30, *, launcher: Any = None) -> None:
        self.name, self.torch_device = "emulated", torch.device("cpu")
        self.total_bytes, self.allocated_bytes = total_bytes, 0
        self.waits = self.launches = 0
        self.pinned: dict[int, int] = {}
        self.fail_pin = self.fail_open = False
        self.bus, self.unreachable = f"emulated {os.getpid()}", frozenset[str]()
        self.opened: dict[int, mmap.mmap] = {}
        self._shareable: dict[int, int] = {}
        self._launcher = launcher or Emulator()
        self._enqueued: list[Callable[[], Any]] = []
        self._n_done = 0
        self._lock = threading.RLock()

    def memory(self) -> tuple[int, int]:
        """Return free and total bytes."""
        return self.total_bytes - self.allocated_bytes, self.total_bytes

    def empty(self, shape: int | Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Make a tensor full of rubbish in a block of its own."""
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        n_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        return self._take(n_bytes, 1)[:n_bytes].view(dtype).reshape(shape)

    def allocate(self, size_bytes: int) -> torch.Tensor:
        """Make padded memory; raises DeviceError beyond `total_bytes`."""
        return self._take(padded(size_bytes), ALIGNMENT)

    def _take(self, size_bytes: int, padded_to: int) -> torch.Tensor:
        if size_bytes > self.total_bytes - self.allocated_bytes:
            raise DeviceError(f"emulated has {self.memory()[0]} bytes free, {size_bytes} were asked for")
        array = memory.empty(size_bytes, np.uint8, padded_to=padded_to)
        self.allocated_bytes += size_bytes
        weakref.finalize(array, self._give, size_bytes)
        return torch.from_numpy(array)

    def _give(self, size_bytes: int) -> None:
        self.allocated_bytes -= size_bytes

    def staging(self, size_bytes: int) -> torch.Tensor:
        """Make memory of the host, full of rubbish."""
        return torch.from_numpy(memory.empty(size_bytes, np.uint8))

    def upload(self, host: torch.Tensor, device: torch.Tensor) -> None:
        """Enqueue a copy, which happens when somebody waits for it or a kernel is launched after it.

        As on a GPU nothing keeps `host` until then, or keeps others from writing to it.
        """
        _check_alike(host, device)
        address, size_bytes = host.data_ptr(), host.nbytes
        with self._lock:
            self._enqueued.append(lambda: ctypes.memmove(device.data_ptr(), address, size_bytes))

    def download(self, device: torch.Tensor, host: torch.Tensor) -> None:
        """Enqueue a copy, as `upload` does."""
        _check_alike(device, host)
        with self._lock:
            self._enqueued.append(lambda: host.copy_(device))

    def pin(self, memory: torch.Tensor) -> int:
        """Note that the memory is page-locked."""
        if memory.data_ptr() % 4096:
            raise DeviceError(f"memory at {memory.data_ptr():#x} does not begin a page")
        if self.fail_pin:
            self.fail_pin = False
            raise DeviceError("emulated cannot page-lock more")
        self.pinned[memory.data_ptr()] = memory.numel()
        return memory.data_ptr()

    def unpin(self, memory: torch.Tensor) -> None:
        """Note that it is not any more; KeyError where it was not."""
        del self.pinned[memory.data_ptr()]

    def bus_id(self) -> str:
        """Give the name, by default one of this process."""
        return self.bus

    def reaches(self, bus_id: str) -> bool:
        """Tell whether the other is not among those that cannot be reached."""
        return bus_id not in self.unreachable

    def shareable(self, size_bytes: int) -> torch.Tensor:
        """Make memory in a memfd, full of rubbish; raises DeviceError beyond `total_bytes`."""
        size_bytes = max(mmap.PAGESIZE, -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE)
        if size_bytes > self.memory()[0]:
            raise DeviceError(f"emulated has {self.memory()[0]} bytes free, {size_bytes} were asked for")
        fd = os.memfd_create("emulated", os.MFD_CLOEXEC)
        os.ftruncate(fd, size_bytes)
        array = np.frombuffer(mmap.mmap(fd, size_bytes), np.uint8)
        array[:] = 0xA5
        self.allocated_bytes += size_bytes
        self._shareable[array.ctypes.data] = fd
        weakref.finalize(array, self._unshare, array.ctypes.data, size_bytes)
        return torch.from_numpy(array)

    def _unshare(self, address: int, size_bytes: int) -> None:
        os.pwrite(self._shareable[address], bytes(size_bytes), 0)  # who still reads it gets nothing of it
        os.close(self._shareable.pop(address))
        self._give(size_bytes)

    def share(self, memory: torch.Tensor) -> bytes:
        """Say where the memfd is found."""
        return f"/proc/{os.getpid()}/fd/{self._shareable[memory.data_ptr()]}".encode()

    def open_shared(self, handle: bytes) -> int:
        """Map the memfd of another process; raises DeviceError where `fail_open` is set."""
        if self.fail_open:
            raise DeviceError("emulated cannot open memory of others")
        fd = os.open(handle, os.O_RDWR)
        mapped = mmap.mmap(fd, 0)
        os.close(fd)
        address = np.frombuffer(mapped, np.uint8).ctypes.data
        self.opened[address] = mapped
        return address

    def close_shared(self, address: int) -> None:
        """Unmap it; KeyError where it was not."""
        self.opened.pop(address).close()

    def launch(self, name: str, grid: Sequence[int], block: Sequence[int], args: Sequence[int | float], shared_bytes: int = 0) -> None:
        """Run a kernel on the emulator, after what was enqueued before it."""
        with self._lock:
            self.flush(len(self._enqueued))
            self.launches += 1
            self._launcher.launch(name, grid, block, args, shared_bytes)

    def record(self) -> "EmulatedEvent":
        """Mark the end of what is enqueued."""
        with self._lock:
            return EmulatedEvent(self, self._n_done + len(self._enqueued))

    def aside(self) -> contextlib.AbstractContextManager[None]:
        """Go on with the one stream that there is."""
        return contextlib.nullcontext()

    def flush(self, n: int) -> None:
        """Do the first n of what is enqueued."""
        with self._lock:
            for _ in range(min(n, len(self._enqueued))):
                self._enqueued.pop(0)()
                self._n_done += 1

    def flush_to(self, position: int) -> None:
        """Do what was enqueued before a point in the order."""
        with self._lock:
            self.flush(max(0, position - self._n_done))

    @property
    def n_done(self) -> int:
        """How much of all that was ever enqueued is done."""
        return self._n_done


class EmulatedEvent:
    """A point in the order of an EmulatedDevice."""

    def __init__(self, device: EmulatedDevice, position: int) -> None:
        self._device, self._position = device, position

    def is_done(self) -> bool:
        """Tell whether all before it is done."""
        return self._device.n_done >= self._position

    def wait(self) -> None:
        """Do what is enqueued before it."""
        self._device.waits += 1
        self._device.flush_to(self._position)


def _check_alike(source: torch.Tensor, target: torch.Tensor) -> None:
    if source.shape != target.shape or source.dtype != target.dtype or not (source.is_contiguous() and target.is_contiguous()):
        raise ValueError(f"a copy from {source.shape} {source.dtype} to {target.shape} {target.dtype}; expected alike and contiguous")
