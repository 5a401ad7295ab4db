"""A real GPU that counts what the emulated device counts, so that one test body holds for both.

Knows what `scdl_gpu.device.CudaDevice` is asked for; the numbers that CUDA itself does not tell are kept here. Nothing
touches CUDA before a CountedGpu is made.
"""

import ctypes
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from scdl_gpu.device import CudaDevice

HELD_BACK_CYCLES = 400_000_000
"""Of the GPU's clock: about a fifth of a second, in which a host enqueues hundreds of batches."""
ANY_DIRECTION = 4
"""cudaMemcpyDefault: the driver sees from the addresses where memory lies."""


class CountedGpu(CudaDevice):
    """torch's current GPU. waits, launches: how many there were. allocated_bytes, pinned: what is held now."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0
        self.pinned: dict[int, int] = {}
        torch.cuda.synchronize(self.index)
        self._allocated_before = torch.cuda.memory_allocated(self.index)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of tensors on the device that were not there when this was made."""
        return torch.cuda.memory_allocated(self.index) - self._allocated_before

    def launch(self, name: str, grid: Sequence[int], block: Sequence[int], args: Sequence[int | float], shared_bytes: int = 0) -> None:
        """Count a launch, and enqueue it."""
        self.launches += 1
        super().launch(name, grid, block, args, shared_bytes)

    def pin(self, memory: torch.Tensor) -> int:
        """Note what is page-locked."""
        address = super().pin(memory)
        self.pinned[memory.data_ptr()] = memory.numel()
        return address

    def unpin(self, memory: torch.Tensor) -> None:
        """Note that it is not any more; KeyError where it was not."""
        super().unpin(memory)
        del self.pinned[memory.data_ptr()]

    def hold_back(self) -> None:
        """Keep the GPU busy, so that all that is enqueued now is done much later."""
        torch.cuda._sleep(HELD_BACK_CYCLES)

    @contextmanager
    def refusing_waits(self) -> Iterator[None]:
        """Let torch raise where an operation waits for the GPU."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls this mode a prototype
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def write(device: Any, address: int, content: bytes) -> None:
    """Write to memory that kernels read at `address`, on the emulated device or on a GPU; waits."""
    source = ctypes.create_string_buffer(content, len(content))
    if isinstance(device, CudaDevice):
        import cupy

        cupy.cuda.runtime.memcpy(address, ctypes.addressof(source), len(content), ANY_DIRECTION)
    else:
        ctypes.memmove(address, source, len(content))
