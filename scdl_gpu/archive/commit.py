"""Directories that appear, and change, all at once.

Knows names, locks and durability, not what the files hold. A directory is built complete as a hidden
sibling, made durable, and put in place by one rename; a change hard-links what stays the same, so it
costs the bytes that differ, and a second name for each file that does not. Readers need no lock: what
they have open stays as it was.
"""

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import re
import secrets
import shutil
import stat
import time
import weakref
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from scdl_gpu.archive.links import keep_modes, link_tree, stop
from scdl_gpu.errors import ArchiveError

logger = logging.getLogger(__name__)

AT_FDCWD = -100
RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_FLAGS = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)
PATIENCE_S = 10.0
"""How long a small file waits for its other writers, who hold it for the time of two fsyncs."""
RETRY_S = 0.02


def _rename(source: Path, target: Path, flags: int) -> None:
    """Rename by renameat2(2) with `flags`; raises OSError, EINVAL or ENOSYS where the file system has no such flag."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError as error:
        raise OSError(errno.ENOSYS, "this C library has no renameat2", os.fspath(target)) from error
    if renameat2(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), flags) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), os.fspath(source), None, os.fspath(target))


def sync(path: Path) -> None:
    """Make a file, or the names in a directory, durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_directory(directory: Path) -> None:
    """Make a directory, and those above it that are missing, durably."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync(path.parent)


def _sync_tree(directory: Path) -> None:
    """Make every new file below `directory`, and every directory, durable; files with a second name are durable already."""
    for parent, _, names in os.walk(directory, topdown=False, onerror=stop):
        for name in names:
            file = Path(parent, name)
            if file.stat().st_nlink == 1:
                sync(file)
        sync(Path(parent))


def _remove(path: Path) -> None:
    """Remove a directory tree that no reader can find any more; what cannot be removed waits for the next writer."""
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        return
    except OSError as error:
        logger.warning("%s is left over and could not be removed: %s", path, error)


def _stale(path: Path, *, directories: bool) -> list[Path]:
    """List what killed writers of `path` left, its lock being held."""
    name = re.compile(re.escape(_hidden(path, "").name) + "[0-9a-f]{8}")
    with os.scandir(path.parent) as entries:
        found = [entry for entry in entries if name.fullmatch(entry.name)]
    return [Path(entry.path) for entry in found if entry.is_dir(follow_symlinks=False) == directories]


def _remove_stale(path: Path, *, kept: Path | None = None) -> None:
    """Remove the directories that killed writers of `path` left, its lock being held, but not the one that is `kept`."""
    for directory in _stale(path, directories=True):
        if directory != kept:
            _remove(directory)


def _hidden(path: Path, suffix: str | None = None) -> Path:
    """Return a hidden sibling of `path` that nobody else uses."""
    return path.with_name(f".{path.name}.staging-{secrets.token_hex(4) if suffix is None else suffix}")


def _lock(path: Path, *, patience_s: float = 0.0) -> int:
    """Take the writers' lock of what is at `path`; returns its file descriptor.

    Raises ArchiveError where another writer holds it for `patience_s` seconds. The lock file is removed with the lock;
    a writer that locked a removed file tries anew.
    """
    file = path.with_name(f".{path.name}.lock")
    end = time.monotonic() + patience_s
    while True:
        fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(fd)
            if time.monotonic() < end:
                time.sleep(RETRY_S)
                continue
            raise ArchiveError(
                f"{path}: another writer is at work (it holds {file}); wait for it to end, "
                f"or save or delete the dataset that is being made there"
            ) from error
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), file.stat()):
                return fd
        os.close(fd)


def _unlock(path: Path, fd: int) -> None:
    path.with_name(f".{path.name}.lock").unlink(missing_ok=True)
    fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def _abandon(path: Path, directory: Path, fd: int, owner: int) -> None:
    """Forget a directory that was never committed; a forked child has no say in it."""
    if os.getpid() == owner:
        _remove(directory)
        _unlock(path, fd)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Let errors of the operating system name the archive, whatever file or directory beside it they are about."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, f"{error.strerror} (nothing can be written in {path.parent})", str(path)) from error


@contextlib.contextmanager
def space_errors(path: Path) -> Iterator[None]:
    """Turn a full disk into an ArchiveError that says where and how full."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        existing = next(parent for parent in path.parents if parent.exists())
        raise ArchiveError(
            f"{path}: no space left while writing: {free_bytes(existing):,} bytes free on that file system; "
            f"nothing was changed: make room, or write elsewhere"
        ) from error


def free_bytes(directory: Path) -> int:
    """Bytes that an ordinary user may still write on the file system of `directory`."""
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def check_space(path: Path, needed_bytes: int) -> None:
    """Raise ArchiveError where the file system of `path`, whose parent is there, has less than `needed_bytes` free."""
    free = free_bytes(path.parent)
    if needed_bytes > free:
        raise ArchiveError(f"{path}: needs {needed_bytes:,} bytes, the file system has {free:,} free; make room, or write elsewhere")


def remove(path: Path, *, check: Callable[[], None] | None = None) -> None:
    """Remove the directory at `path`: hidden first, so that nobody opens a part of it; a writer there removes what a crash leaves.

    check: called when no other writer can change the directory any more; what it raises keeps the directory.
    Raises FileNotFoundError, and ArchiveError where a writer is at work on it.
    """
    path = Path(os.path.realpath(path))
    lock = _lock(path)
    try:
        if check is not None:
            check()
        path.rename(_hidden(path))
        sync(path.parent)
        _remove_stale(path)
    finally:
        _unlock(path, lock)


def tidy(directory: Path) -> None:
    """Remove the stagings and locks that killed writers left in `directory`; those of writers at work stay."""
    for file in directory.glob(".*.lock"):
        path = directory / file.name[1 : -len(".lock")]
        with contextlib.suppress(ArchiveError, OSError):
            if path.name and file.is_file() and file.stat().st_size == 0:
                lock = _lock(path)
                try:
                    _remove_stale(path)
                    for new in _stale(path, directories=False):
                        new.unlink()
                finally:
                    _unlock(path, lock)


def rewrite(file: Path, change: Callable[[], str | None]) -> None:
    """Write what `change` returns to a small file, at once and durably, None: remove it; other writers of it wait.

    change: called when no other writer can change the file, so it may read and merge what is there.
    Raises ArchiveError where another writer holds the file for PATIENCE_S, or the disk is full.
    """
    with space_errors(file), _named(file):
        lock = _lock(file, patience_s=PATIENCE_S)
        new = _hidden(file)
        try:
            for stale in _stale(file, directories=False):
                stale.unlink()
            text = change()
            if text is None:
                file.unlink(missing_ok=True)
                return
            with new.open("w") as stream:
                stream.write(text)
                with contextlib.suppress(FileNotFoundError):
                    os.fchmod(stream.fileno(), stat.S_IMODE(file.stat().st_mode))
                stream.flush()
                os.fsync(stream.fileno())
            new.replace(file)
            sync(file.parent)
        finally:
            new.unlink(missing_ok=True)
            _unlock(file, lock)


class Staging:
    """A hidden sibling of `path` that becomes the directory at `path` in one step.

    Write into `directory`, then `commit`; as a context manager, leaving without an exception commits and
    leaving with one discards. An object that is dropped discards. Never modify a hard-linked file in
    place: name it in `replaced`, or unlink it first.
    """

    def __init__(self, path: Path, directory: Path, lock: int, *, exchange: bool) -> None:
        self.path = path
        self.directory = directory
        self._exchange = exchange
        self._lock = lock
        self._abandon = weakref.finalize(self, _abandon, path, directory, lock, os.getpid())

    @classmethod
    def create(cls, path: Path, *, needed_bytes: int = 0, resumes: Callable[[Path], bool] | None = None) -> Self:
        """Begin a new directory at `path`, which must not exist; its parents are made.

        resumes: asked of each directory that a killed writer of `path` left, which of them to go on with; the first is taken.
        Raises FileExistsError where something is at `path`, ArchiveError where another writer works there
        or the file system has less than `needed_bytes` free.
        """
        path = Path(os.path.realpath(path))
        return cls._begin(path, needed_bytes, exchange=False, resumes=resumes)

    @classmethod
    def change(cls, path: Path, *, replaced: Collection[str] = (), needed_bytes: int = 0) -> Self:
        """Begin a changed copy of the directory at `path`: its files by hard link, but not those in `replaced`.

        replaced: names relative to `path`, of files or whole directories.
        Raises FileNotFoundError where nothing is at `path`, otherwise as `create`.
        """
        path = Path(os.path.realpath(path))
        if not path.is_dir():
            raise FileNotFoundError(f"{path}: no directory to change")
        staging = cls._begin(path, needed_bytes, exchange=True)
        with staging._discarding():
            link_tree(path, staging.directory, replaced)
        return staging

    @classmethod
    def _begin(cls, path: Path, needed_bytes: int, *, exchange: bool, resumes: Callable[[Path], bool] | None = None) -> Self:
        with space_errors(path), _named(path):
            make_directory(path.parent)
            lock = _lock(path)
        try:
            if not exchange and os.path.lexists(path):
                raise FileExistsError(f"{path} exists already; choose another path, or remove it first")
            stale = [] if resumes is None else _stale(path, directories=True)
            directory = next((one for one in stale if resumes is not None and resumes(one)), None)
            _remove_stale(path, kept=directory)
            check_space(path, needed_bytes)
            if directory is None:
                directory = _hidden(path)
                with space_errors(path):
                    directory.mkdir()
        except BaseException:
            _unlock(path, lock)
            raise
        return cls(path, directory, lock, exchange=exchange)

    def commit(self) -> None:
        """Make `directory` durable and put it at `path` in one rename; then drop what it replaces.

        After a failure before the rename nothing is changed and the staging is still there, to be committed again.
        """
        with space_errors(self.path):
            if self._exchange:
                keep_modes(self.path, self.directory)
            _sync_tree(self.directory)
            if self._exchange:
                self._swap()
            else:
                self._place()
            sync(self.path.parent)
        self.discard()

    def discard(self) -> None:
        """Remove `directory` and release the lock; harmless after `commit`."""
        self._abandon()

    def _place(self) -> None:
        try:
            _rename(self.directory, self.path, RENAME_NOREPLACE)
        except OSError as error:
            if error.errno not in NO_FLAGS:
                raise
            if os.path.lexists(self.path):
                raise FileExistsError(f"{self.path} exists already; choose another path, or remove it first") from error
            self.directory.rename(self.path)

    def _swap(self) -> None:
        try:
            _rename(self.directory, self.path, RENAME_EXCHANGE)
        except OSError as error:
            if error.errno not in NO_FLAGS:
                raise
            raise ArchiveError(
                f"{self.path}: this file system cannot exchange two directories, so an archive on it cannot be changed in place; "
                f"write the result elsewhere with output_path="
            ) from error

    @contextlib.contextmanager
    def _discarding(self) -> Iterator[None]:
        try:
            with space_errors(self.path):
                yield
        except BaseException:
            self.discard()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        with self._discarding():
            if value is not None:
                raise value
            self.commit()
