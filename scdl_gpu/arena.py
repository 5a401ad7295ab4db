"""Host memory that the processes of one node share.

Knows memory and processes, not rows or devices. An arena is a memfd, found again by its name among the open
files of this user's processes: it is no file, so a killed job leaves nothing behind, and the size of /dev/shm
does not limit it. The price is the search, about 3 us for each open file of the user, once. Processes that
cannot see each other in /proc (containers of their own) get a copy each.
"""

import contextlib
import fcntl
import mmap
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import numpy as np
import torch

SEALED = b"scdl_gpu: sealed"
PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


class Arena:
    """Memory shared by the processes that open the same `name` and size; private without a name.

    memory: (size_bytes,) uint8, page-aligned, zero at first. It lives as long as any process has it open.
    Whoever fills it does so inside `locked`, and then seals it: who opens it afterwards finds `is_sealed`.
    """

    def __init__(self, size_bytes: int, name: str | None = None) -> None:
        self._fd = _open_memfd(_whole_pages(size_bytes), name)
        try:
            self._map = mmap.mmap(self._fd, _whole_pages(size_bytes))
        except BaseException:
            os.close(self._fd)
            raise
        with contextlib.suppress(OSError):  # a hint: kernels without huge pages for shared memory refuse it
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.memory = torch.from_numpy(np.frombuffer(self._map, np.uint8, size_bytes))  # torch.frombuffer would not keep it mapped

    @staticmethod
    def exists(size_bytes: int, name: str) -> bool:
        """Tell whether a process of this user has the arena open."""
        found = _find(_whole_pages(size_bytes), name)
        if found is not None:
            os.close(found)
        return found is not None

    @contextlib.contextmanager
    def locked(self) -> Iterator[Self]:
        """Exclude the other processes that have this arena open, waiting for them; a killed one lets go by itself."""
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        try:
            yield self
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    @contextlib.contextmanager
    def held(self) -> Iterator[Self]:
        """Let the arena be held, by this process among others, as long as it lives at most."""
        fcntl.flock(self._fd, fcntl.LOCK_SH)
        try:
            yield self
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    @property
    def is_held(self) -> bool:
        """Whether another process holds it."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        return False

    @property
    def is_sealed(self) -> bool:
        """Whether the memory holds what it is for."""
        return self._map[-len(SEALED) :] == SEALED

    def seal(self) -> None:
        """Say that the memory holds what it is for; from now on nobody writes to it."""
        self._map[-len(SEALED) :] = SEALED

    def close(self) -> None:
        """Give the memory back; it is gone when the last tensor over it is, in the last process that has it open."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd, self.memory = -1, torch.empty(0, dtype=torch.uint8)
            with contextlib.suppress(BufferError):  # somebody holds a view: unmapped with the last of them
                self._map.close()


def pages(size_bytes: int) -> torch.Tensor:
    """Give (size_bytes,) uint8 of this process alone, from a page's begin, zero; large pages where the kernel has them."""
    memory = mmap.mmap(-1, max(1, size_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # hints: a forked child has no use for it, and would have pages copied that are written here
        memory.madvise(mmap.MADV_DONTFORK)
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.from_numpy(np.frombuffer(memory, np.uint8, size_bytes))


def available_bytes() -> int:
    """Memory of this node that could be had without swapping: what the kernel and the container's limits leave."""
    meminfo = (PROC / "meminfo").read_text()
    found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo, re.MULTILINE)
    free = int(found[1]) * 1024 if found else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return min([free, *_cgroup_rooms()])


def _cgroup_rooms() -> Iterator[int]:
    """What each memory limit over this process leaves, page cache counted as free (cgroup v2; then v1)."""
    with contextlib.suppress(OSError):
        own = re.search(r"^0::/(.*)$", (PROC / "self" / "cgroup").read_text(), re.MULTILINE)
        group = CGROUPS / own[1] if own else CGROUPS
        for folder in (group, *group.parents):
            if folder.is_relative_to(CGROUPS):
                yield from _cgroup_room(folder, "memory.max", "memory.current", "")
    yield from _cgroup_room(CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")


def _cgroup_room(folder: Path, limit: str, usage: str, prefix: str) -> Iterator[int]:
    with contextlib.suppress(OSError, ValueError):  # no such group; the limit is "max"
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        cache = sum(int(statistics.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
        yield max(0, int((folder / limit).read_text()) - int((folder / usage).read_text()) + cache)


def _whole_pages(size_bytes: int) -> int:
    """Size of the mapping: the memory, a seal, and what fills the last page."""
    return -(-(size_bytes + len(SEALED)) // mmap.PAGESIZE) * mmap.PAGESIZE


def _open_memfd(size_bytes: int, name: str | None) -> int:
    """Open the memfd that a process of this user has under `name`, or make it; returns the descriptor."""
    if name is None:
        return _make(size_bytes, "private")
    with _naming():
        found = _find(size_bytes, name)
        return _make(size_bytes, name) if found is None else found


def _make(size_bytes: int, name: str) -> int:
    fd = os.memfd_create(f"scdl-gpu-{name}", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size_bytes)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _find(size_bytes: int, name: str) -> int | None:
    """Look for a memfd of this name and size among the open files of this user's processes, and open it."""
    target = f"/memfd:scdl-gpu-{name} (deleted)"
    for process in PROC.iterdir():
        if not process.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # processes come and go, and others' are closed to us
            if process.stat().st_uid != os.getuid():
                continue
            for entry in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if str(entry.readlink()) == target and (fd := _open_if(entry, size_bytes)) is not None:
                        return fd
    return None


def _open_if(entry: Path, size_bytes: int) -> int | None:
    """Open what a process has open at `entry`, if it is of this size; the lock of the new descriptor is its own."""
    fd = os.open(entry, os.O_RDWR | os.O_CLOEXEC)
    if os.fstat(fd).st_size == size_bytes:
        return fd
    os.close(fd)
    return None


@contextlib.contextmanager
def _naming() -> Iterator[None]:
    """Let one process of this user at a time look for a name and take it."""
    path = Path(tempfile.gettempdir()) / f"scdl-gpu-{os.getuid()}.lock"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)  # a child forked meanwhile has the descriptor too: closing would leave it the lock
        os.close(fd)
