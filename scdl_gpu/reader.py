"""Extents of files into memory, host or device.

Knows files and byte ranges, not rows or epochs. kvikio reads where it is installed and finds a driver, else
preadv; which of the two is found out once, by reading this module's own file, and never changes in silence:
`path_in_use` says it. Extents of 1 MiB and more: a small one costs kvikio 11 to 21 us, preadv 4.
"""

import functools
import importlib
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from scdl_gpu.errors import ArchiveError, MissingFileError

PAGE_BYTES = 4096
"""What direct reads begin and end at multiples of, in the file and in memory."""
KVIKIO_THREADS = 8
"""Where the user left kvikio's default of one: 8 to 16 saturate NVMe arrays (kvikio's own measurements, issue 453)."""


class File:
    """One file, opened for reading extents; what it names may be replaced meanwhile, this stays. Any number of threads may read.

    is_direct: read past the page cache what begins at a page, in the file and in memory, where the file system admits it.
    """

    def __init__(self, path: str | os.PathLike[str], *, is_direct: bool = False) -> None:
        self.path = Path(path)
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise MissingFileError(f"{path} is missing; the copy is incomplete: copy it again") from error
        self.status = os.fstat(self._fd)
        kvikio = _kvikio()[0]
        self._cufile = None if kvikio is None else kvikio.CuFile(f"/proc/self/fd/{self._fd}", "r")
        self._direct = self._open_direct() if is_direct and kvikio is None else -1

    def _open_direct(self) -> int:
        """Open the file once more, for direct reads; -1 where its file system has none, such as tmpfs."""
        try:
            return os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError:
            return -1

    @property
    def path_in_use(self) -> str:
        """Say how this file is read."""
        return "preadv with O_DIRECT" if self._direct >= 0 else path_in_use()

    def read(self, start: int, stop: int, out: torch.Tensor) -> None:
        """Read bytes start..stop-1 into `out`, (stop - start,) uint8, contiguous, on the host or, with kvikio, on a device.

        Returns when they are there. The caller makes sure that nothing enqueued on a device still uses `out`.
        Raises ArchiveError where the file ends before `stop`, or cannot be read.
        """
        if not 0 <= start <= stop or out.numel() != stop - start or out.dtype != torch.uint8 or not out.is_contiguous():
            raise ValueError(f"{self.path}: {out.numel()} values ({out.dtype}) for bytes {start} to {stop}, expected as many uint8")
        try:
            end = min(stop, self.status.st_size)
            found = 0 if end < stop else self._kvikio_read(start, out) if self._cufile is not None else self._preadv(start, out)
        except (OSError, RuntimeError) as error:
            raise ArchiveError(f"{self.path}: bytes {start:,} to {stop:,} cannot be read ({error}); check the disk") from error
        if found != stop - start:
            raise ArchiveError(f"{self.path} ends before byte {stop:,}; the copy is incomplete: copy it again, or convert the source anew")

    def _kvikio_read(self, start: int, out: torch.Tensor) -> int:
        buffer = out if out.is_cuda else out.numpy()
        return int(self._cufile.pread(buffer, out.numel(), start).get()) if out.numel() else 0  # type: ignore[union-attr]

    def _preadv(self, start: int, out: torch.Tensor) -> int:
        memory = memoryview(out.numpy().data)
        found = 0
        if self._direct >= 0 and start % PAGE_BYTES == 0 and out.data_ptr() % PAGE_BYTES == 0:
            found = _fill(self._direct, memory[: len(memory) // PAGE_BYTES * PAGE_BYTES], start)
        return found + _fill(self._fd, memory[found:], start + found)

    def close(self) -> None:
        """Close the file; no read may be under way."""
        if self._cufile is not None:
            self._cufile.close()
        for fd in (self._fd, self._direct):
            if fd >= 0:
                os.close(fd)
        self._fd, self._direct, self._cufile = -1, -1, None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def _fill(fd: int, memory: memoryview, start: int) -> int:
    """Read until `memory` is full or the file ends; returns how many bytes there are. A direct read ends at a whole page."""
    found = 0
    while found < len(memory) and (n := os.preadv(fd, [memory[found:]], start + found)):
        found += n
    return found


def read(path: str | os.PathLike[str], start: int, stop: int, out: torch.Tensor) -> None:
    """Read bytes start..stop-1 of the file at `path` into `out`, as `File.read` does."""
    with File(path) as file:
        file.read(start, stop, out)


def path_in_use() -> str:
    """Say how extents are read in this process, and why so."""
    return _kvikio()[1]


def reaches_device() -> bool:
    """Tell whether `read` can write to the memory of a device."""
    return _kvikio()[0] is not None


@functools.cache
def _kvikio() -> tuple[Any, str]:
    """Return kvikio, or None, and how files are read: decided by an attempt."""
    try:
        kvikio = importlib.import_module("kvikio")
        defaults = importlib.import_module("kvikio.defaults")
    except ImportError as error:
        return None, f"preadv: kvikio is not there ({error})"
    if defaults.get("num_threads") == 1 and "KVIKIO_NTHREADS" not in os.environ:
        defaults.set("num_threads", KVIKIO_THREADS)
    probe = torch.empty(1, dtype=torch.uint8)
    try:
        with kvikio.CuFile(__file__, "r") as file:
            file.pread(probe.numpy(), 1, 0).get()
            direct = not defaults.is_compat_mode_preferred()
    except (OSError, RuntimeError) as error:
        return None, f"preadv: kvikio cannot read here ({error})"
    if direct:
        return kvikio, f"kvikio {kvikio.__version__}: GPUDirect Storage, where the file system has it"
    return kvikio, f"kvikio {kvikio.__version__}: compatibility mode, through host memory"
