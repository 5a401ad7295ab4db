"""The page cache: letting it forget files, and asking it how much of them it holds.

Knows files, not loaders. What is mapped by a process stays, whatever is asked: `resident` tells.
"""

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np


def files_of(paths: Iterable[Path]) -> list[Path]:
    """List the files at or below some paths."""
    return [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path]) if file.is_file()]


def size_of(paths: Iterable[Path]) -> int:
    """Add up the bytes of the files at or below some paths."""
    return sum(file.stat().st_size for file in files_of(paths))


def drop(paths: Iterable[Path]) -> float:
    """Write back and drop the pages of all files; returns the share that stayed nevertheless."""
    files = files_of(paths)
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fsync(fd)  # a dirty page is not dropped
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
    return resident(files)


def warm(paths: Iterable[Path]) -> None:
    """Read every byte once."""
    buffer = bytearray(8 << 20)
    for file in files_of(paths):
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def resident(paths: Iterable[Path]) -> float:
    """Give the share of the pages of all files that the page cache holds, as `cached_pages` counts them."""
    held, total = cached_pages(paths)
    return held / total if total else 0.0


def cached_pages(paths: Iterable[Path]) -> tuple[int, int]:
    """Count the pages of all files that the page cache holds, by mincore(2), and all their pages.

    Raises OSError where it refuses: Linux answers for files that the caller owns or may write.
    """
    held = total = 0
    for file in files_of(paths):
        size = file.stat().st_size
        if size == 0:
            continue
        n_pages = -(-size // mmap.PAGESIZE)
        seen = np.zeros(n_pages, np.uint8)
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), size, access=mmap.ACCESS_READ) as mapped:
            view = np.frombuffer(mapped, np.uint8)
            done = _mincore(view.ctypes.data, size, seen.ctypes.data)
            del view  # it holds the map open
            if done != 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(file))
        held += int((seen & 1).sum())
        total += n_pages
    return held, total


def _mincore(address: int, size: int, out: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    return int(libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_void_p(out)))
