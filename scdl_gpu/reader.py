"""Extents of files into memory, host or device; of files behind URLs into memory of the host.

Knows files and byte ranges, not rows or epochs. kvikio reads where it is installed and finds a driver, else
preadv, or for a URL its `transport`; which of them is found out once, by reading this module's own file, and never changes in
silence: `path_in_use` says it. Extents of 1 MiB and more: a small one costs kvikio 11 to 21 us, preadv 4. A network fails where a
disk does not, so that a range of a URL is asked for again, up to TRIES times, from where it broke off.
"""

import functools
import importlib
import logging
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import CancelledError
from copy import copy
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch

from scdl_gpu.errors import ArchiveError, MissingFileError
from scdl_gpu.transport import Absent, Broken, Pin, Refused, Transport, check_same, shown, transport_for

logger = logging.getLogger(__name__)
Found = TypeVar("Found")

PAGE_BYTES = 4096
"""What direct reads begin and end at multiples of, in the file and in memory."""
KVIKIO_THREADS = 8
"""Where the user left kvikio's default of one: 8 to 16 saturate NVMe arrays (kvikio's own measurements, issue 453)."""
TRIES = 8
"""Of a range of a URL."""
PAUSE_S, MOST_PAUSE_S = 0.25, 30.0
"""Before the second try, twice as long before each further one, or as long as the server asks for: half a minute over all tries,
in which a balancer or a restarted server comes back; a longer outage is for who started the job to judge, who can resume the epoch."""


class AnyFile(ABC):
    """A file that extents are read of. path: where it lies, name: the last part of that; facts: which it is, and of what state.

    reaches_device: `read` can write to memory of a device. path_in_use: how it is read.
    """

    path: Path | str
    name: str
    size_bytes: int
    facts: tuple[Any, ...]
    reaches_device: bool

    @property
    @abstractmethod
    def path_in_use(self) -> str:
        """Say how this file is read."""

    @abstractmethod
    def read(self, start: int, stop: int, out: torch.Tensor) -> None:
        """Read bytes start..stop-1 into `out`, (stop - start,) uint8, contiguous; returns when they are there. Raises ArchiveError."""

    def check_size(self) -> None:  # noqa: B027
        """Raise ArchiveError where the file was cut since it was opened: what is mapped of it could not be read then."""

    def until(self, left: threading.Event) -> Self:
        """Give the same file, whose reads do not try again when `left` is set; those of a disk try once."""
        return self

    @abstractmethod
    def close(self) -> None:
        """Close the file; no read may be under way."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


class File(AnyFile):
    """One file, opened for reading extents; what it names may be replaced meanwhile, this stays. Any number of threads may read.

    is_direct: read past the page cache what begins at a page, in the file and in memory, where the file system admits it.
    """

    def __init__(self, path: str | os.PathLike[str], *, is_direct: bool = False) -> None:
        self.path: Path = Path(path)
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise MissingFileError(f"{path} is missing; the copy is incomplete: copy it again") from error
        except OSError as error:
            raise ArchiveError(f"{path} cannot be opened ({error}); check its permissions, and `ulimit -n`") from error
        self.status = status = os.fstat(self._fd)
        self.name, self.size_bytes, self.reaches_device = self.path.name, status.st_size, reaches_device()
        self.facts = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
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
        _check_room(self.path, start, stop, out)
        try:
            end = min(stop, self.size_bytes)
            found = 0 if end < stop else self._kvikio_read(start, out) if self._cufile is not None else self._preadv(start, out)
        except (OSError, RuntimeError) as error:
            raise ArchiveError(f"{self.path}: bytes {start:,} to {stop:,} cannot be read ({error}); check the disk") from error
        if found != stop - start:
            raise ArchiveError(f"{self.path} ends before byte {stop:,}; the copy is incomplete: copy it again, or convert the source anew")

    def check_size(self) -> None:
        """Compare the size with that of the opening."""
        found = os.fstat(self._fd).st_size
        if found < self.size_bytes:
            raise ArchiveError(
                f"{self.path} holds {found:,} bytes, and held {self.size_bytes:,} when it was opened: it was cut; copy the archive again"
            )

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


def _check_room(path: Any, start: int, stop: int, out: torch.Tensor) -> None:
    """Raise ValueError unless `out` has room for bytes start..stop-1, and no more."""
    if not 0 <= start <= stop or out.numel() != stop - start or out.dtype != torch.uint8 or not out.is_contiguous():
        raise ValueError(f"{path}: {out.numel()} values ({out.dtype}) for bytes {start} to {stop}, expected as many uint8")


def _fill(fd: int, memory: memoryview, start: int) -> int:
    """Read until `memory` is full or the file ends; returns how many bytes there are. A direct read ends at a whole page."""
    found = 0
    while found < len(memory) and (n := os.preadv(fd, [memory[found:]], start + found)):
        found += n
    return found


class RemoteFile(AnyFile):
    """One file behind a URL, in the state that is pinned: another state of it raises. Any number of threads may read.

    Memory of a device is not reached: a range that breaks off goes on from there in memory of the host.
    """

    reaches_device = False

    def __init__(self, pin: Pin, transport: Transport | None = None) -> None:
        self.path: str = shown(pin.url)
        self.name, self.size_bytes = pin.name, pin.size_bytes
        self.facts = (self.path, *pin[1:])
        self._pin, self._transport = pin, transport or opened_transport(pin.url)
        self._left = threading.Event()
        self._kvikio = _kvikio_remote(pin) if self._transport.name == "http" else None

    @classmethod
    def open(cls, url: str, transport: Transport | None = None) -> Self:
        """Pin the file at `url` as it is now. Raises MissingFileError where there is none, ArchiveError where it cannot be read."""
        transport = transport or opened_transport(url)
        return cls(_tried(shown(url), lambda: transport.pin(url), threading.Event()), transport)

    def until(self, left: threading.Event) -> Self:
        """Give the same file, whose reads raise CancelledError in place of another try when `left` is set."""
        file = copy(self)
        file._left = left
        return file

    @property
    def pin(self) -> Pin:
        """The state that it is read in."""
        return self._pin

    @property
    def path_in_use(self) -> str:
        """Say how this file is read."""
        return self._transport.name if self._kvikio is None else f"{path_in_use().partition(':')[0]} RemoteFile"

    def read(self, start: int, stop: int, out: torch.Tensor) -> None:
        """Read bytes start..stop-1 into `out`, (stop - start,) uint8, contiguous, on the host; returns when they are there.

        Raises ArchiveError naming URL, bytes and cause where they cannot be had, or are of another state of the file.
        """
        _check_room(self.path, start, stop, out)
        if stop > self.size_bytes:
            raise ArchiveError(f"{self.path} ends before byte {stop:,}; the copy there is incomplete: copy it again")
        found = 0

        def go_on() -> None:
            nonlocal found
            try:
                if self._kvikio is None or found or not self._kvikio_read(start, out):
                    self._transport.read(self._pin, start + found, memoryview(out.numpy().data)[found:])
            except Broken as error:
                found += error.found
                raise

        if start < stop:
            _tried(f"{self.path}: bytes {start:,} to {stop:,}", go_on, self._left)

    def _kvikio_read(self, start: int, out: torch.Tensor) -> bool:
        """Read by kvikio, and see whether the file is still the one that is pinned; False, with a warning, where it could not."""
        try:
            n = self._kvikio.pread(out.numpy(), out.numel(), start).get()  # type: ignore[union-attr]
        except RuntimeError as error:
            logger.warning("%s: kvikio could not read %d bytes at %d (%s); http does", self.path, out.numel(), start, error)
            return False
        check_same(self._pin, self._transport.pin(self._pin.url))
        return bool(n == out.numel())

    def close(self) -> None:
        """Let go of what kvikio holds; no read may be under way. Connections are shared, and stay."""
        self._kvikio = None


def opened_transport(url: str) -> Transport:
    """Give what reads `url`. Raises ArchiveError naming what to install."""
    try:
        return transport_for(url)
    except (ImportError, ValueError) as error:
        raise ArchiveError(f"{shown(url)} cannot be read: {error}") from error


def _tried(what: str, once: Callable[[], Found], left: threading.Event) -> Found:
    """Do something with a URL, up to TRIES times, or until `left` is set. Raises MissingFileError, ArchiveError naming it and the cause."""
    number, pause = 0, 0.0
    while True:
        if left.wait(pause):
            raise CancelledError(f"{what}: nobody waits for it any more")
        number += 1
        try:
            return once()
        except Absent as error:
            raise MissingFileError(f"{what} is missing ({error}); the copy there is incomplete: copy it again") from error
        except Refused as error:
            raise ArchiveError(f"{what} cannot be read: {error}") from error
        except OSError as error:
            if number == TRIES:
                raise ArchiveError(f"{what} cannot be read, tried {TRIES} times: {error}; check server and network") from error
            asked = error.wait_s if isinstance(error, Broken) else 0.0
            logger.info("%s: try %d failed: %s", what, number, error)
            pause = min(MOST_PAUSE_S, max(PAUSE_S * 2 ** (number - 1), asked))


def _kvikio_remote(pin: Pin) -> Any:
    """Open a file at http or https with kvikio, None where it has no part for that. Raises nothing: size and state are known."""
    kvikio = _kvikio()[0]
    if kvikio is None or not pin.size_bytes or not getattr(kvikio, "is_remote_file_available", lambda: False)():
        return None
    return kvikio.RemoteFile.open_http(pin.url, pin.size_bytes)


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
