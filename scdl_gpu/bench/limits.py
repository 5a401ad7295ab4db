"""What the machine could do at best: copies of memory, reads of the disk, copies to, from and on a GPU.

Knows the hardware, not loaders. GB are 10^9 bytes that arrive; a figure is the best of several tries, since a limit is what can be had.
"""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from scdl_gpu.bench import pages

COPY_BYTES, READ_BYTES, READ_SECONDS = 256 << 20, 4 << 20, 2.0
READERS = 4


def limits(files: Sequence[Path], *, device: str = "cpu") -> dict[str, float]:
    """Measure all limits there are, in GB/s: memory copy and fill, disk read; with a GPU host to device, device to host, device copy.

    files: read from the disk, their pages dropped first; nobody may have them mapped.
    """
    found = {"memory copy": memory_copy(), "memory fill": memory_fill(), "disk read": disk_read(files)}
    return found | (device_copies(device) if device.startswith("cuda") else {})


def memory_copy(size_bytes: int | None = None, tries: int = 5) -> float:
    """Copy memory that was touched before, on all cores."""
    size_bytes = size_bytes or COPY_BYTES
    threads = len(os.sched_getaffinity(0))
    source, target = np.ones(size_bytes, np.uint8), np.zeros(size_bytes, np.uint8)
    edges = [size_bytes * part // threads for part in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:

        def copy() -> None:
            list(
                pool.map(
                    lambda part: np.copyto(target[edges[part] : edges[part + 1]], source[edges[part] : edges[part + 1]]), range(threads)
                )
            )

        return size_bytes / min(_seconds(copy) for _ in range(tries)) / 1e9


def memory_fill(size_bytes: int | None = None, tries: int = 5) -> float:
    """Fill memory that was touched before, on all cores: what dense batches are bound by, most of which is zeros."""
    target = np.ones((size_bytes or COPY_BYTES) // 4, np.float32)
    threads = len(os.sched_getaffinity(0))
    parts = np.array_split(target, threads)
    with ThreadPoolExecutor(threads) as pool:
        return target.nbytes / min(_seconds(lambda: list(pool.map(lambda part: part.fill(0), parts))) for _ in range(tries)) / 1e9


def disk_read(files: Sequence[Path], seconds: float = READ_SECONDS) -> float:
    """Read files in requests of 4 MiB by four threads, for some seconds at most, pages dropped first.

    Raises ValueError where there is nothing to read.
    """
    left = pages.drop(files)
    extents = [(file, start) for file in pages.files_of(files) for start in range(0, file.stat().st_size, READ_BYTES)]
    if not extents:
        raise ValueError("no bytes to read: the limit of the disk needs files")
    start = time.perf_counter()

    def read(number: int) -> int:
        done, buffer = 0, bytearray(READ_BYTES)
        for file, offset in extents[number::READERS]:
            if time.perf_counter() - start > seconds:
                break
            fd = os.open(file, os.O_RDONLY)
            try:
                done += os.preadv(fd, [buffer], offset)
            finally:
                os.close(fd)
        return done

    with ThreadPoolExecutor(READERS) as pool:
        total = sum(pool.map(read, range(READERS)))
    return total * (1 - left) / (time.perf_counter() - start) / 1e9


def device_copies(device: str, size_bytes: int = 1 << 30, tries: int = 5) -> dict[str, float]:
    """Copy between page-locked memory and a GPU, both ways, and within the GPU."""
    import torch

    host = torch.ones(size_bytes, dtype=torch.uint8).pin_memory()
    here, there = (torch.empty(size_bytes, dtype=torch.uint8, device=device) for _ in range(2))

    def rate(target: "torch.Tensor", source: "torch.Tensor") -> float:
        def copy() -> None:
            target.copy_(source, non_blocking=True)
            torch.cuda.synchronize()  # waits

        return size_bytes / min(_seconds(copy) for _ in range(tries)) / 1e9

    return {"host to device": rate(here, host), "device to host": rate(host, here), "device copy": rate(there, here)}


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
