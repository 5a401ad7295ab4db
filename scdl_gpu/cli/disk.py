"""How fast a directory's disk writes and reads, measured by a file of its own that is gone afterwards.

Knows one file and clocks. The page cache is bypassed (O_DIRECT) where the file system allows it, as it answers faster than
any disk; where not, the answer says so. At most PROBE_BYTES and SECONDS each way: enough to tell a disk from a network, too
little for a benchmark.
"""

import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

PROBE_BYTES = 128 << 20
EXTENT_BYTES = 4 << 20
"""What is written and read at one go: an extent of the size that loaders ask for."""
THREADS = 4
"""That read at once: one alone does not keep an NVMe busy."""
SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Speed:
    """What was measured of a disk. size_bytes: what was written, and then read; is_direct: past the page cache."""

    write_bytes_per_second: float
    read_bytes_per_second: float
    size_bytes: int
    is_direct: bool


def free_bytes(directory: Path) -> int:
    """Return what a user may still write to the file system of `directory`."""
    return shutil.disk_usage(directory).free


def measure(directory: Path, size_bytes: int = PROBE_BYTES, seconds: float = SECONDS) -> Speed:
    """Write a file to `directory`, read it, and time both; nothing is left of it.

    Raises OSError where the directory cannot be written to, or is full.
    """
    fd, is_direct = _open(directory)
    try:
        memory = mmap.mmap(-1, EXTENT_BYTES)  # begins a page, as O_DIRECT demands
        memory[:] = os.urandom(EXTENT_BYTES)  # zeros would be compressed away, or left out
        start, written = time.perf_counter(), 0
        while written < size_bytes and (not written or time.perf_counter() - start < seconds):
            written += os.pwrite(fd, memory, written)
        os.fsync(fd)
        write_seconds = time.perf_counter() - start
        if not is_direct:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        with ThreadPoolExecutor(THREADS) as pool:
            found = sum(pool.map(_reader(fd, start + seconds), range(0, written, EXTENT_BYTES)))
        read_seconds = time.perf_counter() - start
    finally:
        os.close(fd)
    return Speed(written / write_seconds, found / read_seconds, written, is_direct)


def _open(directory: Path) -> tuple[int, bool]:
    """Open a file in `directory` that has no name any more, past the page cache where that is possible."""
    fd, name = tempfile.mkstemp(prefix=".scdl-gpu-doctor-", dir=directory)
    try:
        try:
            direct = os.open(name, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        except OSError:  # tmpfs and some network file systems refuse it
            return fd, False
        os.close(fd)
        return direct, True
    finally:
        Path(name).unlink()


def _reader(fd: int, end: float) -> Callable[[int], int]:
    """Make the function that reads the extent at a place, and nothing once the time is up; returns how much it read."""

    def read(start: int) -> int:
        if start and time.perf_counter() > end:
            return 0
        with mmap.mmap(-1, EXTENT_BYTES) as memory:
            return os.preadv(fd, [memory], start)

    return read
