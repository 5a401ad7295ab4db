"""Arrays that end where they end: each in a block of malloc of its own, so that ASan sees the first byte beyond.

Knows bytes, not kernels. NumPy's own small blocks come from a cache, which hides a use of freed memory.
"""

import ctypes
import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LIBC = ctypes.CDLL(None)
_LIBC.posix_memalign.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t]
_LIBC.free.restype, _LIBC.free.argtypes = None, [ctypes.c_void_p]


def empty(n: int, dtype: Any, *, padded_to: int = 1) -> NDArray[Any]:
    """Make an array (n,) full of rubbish whose block is padded to a multiple of `padded_to` bytes; aligned to 128 bytes."""
    dtype = np.dtype(dtype)
    size_bytes = max(1, -(-n * dtype.itemsize // padded_to) * padded_to)
    address = ctypes.c_void_p()
    if _LIBC.posix_memalign(ctypes.byref(address), 128, size_bytes):
        raise MemoryError(f"no block of {size_bytes:,} bytes")
    block = (ctypes.c_uint8 * size_bytes).from_address(address.value)
    weakref.finalize(block, _LIBC.free, address.value)
    array = np.frombuffer(block, np.uint8)
    array[:] = 0xA5
    return array[: n * dtype.itemsize].view(dtype)


def copy(array: NDArray[Any], *, padded_to: int = 1) -> NDArray[Any]:
    """Copy a one-dimensional array into a block of its own."""
    made = empty(array.size, array.dtype, padded_to=padded_to)
    made[:] = array
    return made


class HostMemory:
    """The `Memory` of cases.py on the host, with exact blocks, and a launcher of kernels in the emulator."""

    def __init__(self, emulator: Any) -> None:
        self.launch = emulator.launch

    def put(self, array: NDArray[Any], padded_to: int = 1) -> NDArray[Any]:
        """Copy into a block of its own."""
        return copy(array, padded_to=padded_to)

    def empty(self, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        """Make a block full of rubbish; bfloat16 as uint16."""
        return empty(int(np.prod(shape)), "uint16" if dtype == "bfloat16" else dtype).reshape(shape)

    def get(self, array: NDArray[Any]) -> NDArray[Any]:
        """Copy the array, so that its block may go."""
        return array.copy()

    def address(self, array: NDArray[Any]) -> int:
        """Give where the array begins."""
        return array.ctypes.data
