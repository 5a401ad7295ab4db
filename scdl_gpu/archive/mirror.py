"""Archives behind URLs: what opening needs, copied once to this machine; the rows stay there.

Knows which files an archive has without a list of them, which http does not give: the header, metadata.json and the first files of
a feature directory name the others. Copied are descriptions, features and row pointers, 8 bytes a row, or row tables, 16; a mirror is
used again as long as no file of the archive has changed, which costs a request for each. Graphs and obsm are left out.
"""

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from scdl_gpu import reader
from scdl_gpu.archive.commit import Staging, make_directory
from scdl_gpu.archive.constants import FileNames
from scdl_gpu.archive.dtypes import HEAD_BYTES
from scdl_gpu.archive.feature_files import CUMULATIVE, VERSION
from scdl_gpu.archive.labels import JSON_NAME, NPY_NAME
from scdl_gpu.archive.npy import split_npy
from scdl_gpu.archive.packed import open_archive, records_of
from scdl_gpu.archive.packed_header import HEADER_BYTES, ShardHeader, ShardHeaderError
from scdl_gpu.archive.parts import Archive
from scdl_gpu.archive.raw import PACKED
from scdl_gpu.archive.remote import MARKER, Remote
from scdl_gpu.errors import ArchiveError, MissingFileError
from scdl_gpu.transport import Pin, beside, shown

logger = logging.getLogger(__name__)

VERSION_OF_MIRRORS = 1
THREADS = 8
"""That copy, or ask, at once."""
PIECE_BYTES = 4 << 20
"""Copied in one request."""
SMALL_BYTES = 64 << 20
"""That a file may have which is read whole to be understood: the limit of a header."""
Given = TypeVar("Given")
Made = TypeVar("Made")


class Stretch(NamedTuple):
    """Bytes start..stop-1 of a file that are copied."""

    name: str
    start: int
    stop: int


def open_remote(url: str) -> Archive:
    """Open the archive at `url`, of either kind; its rows can only be read by `payload` files, extent by extent.

    Copies what else there is of it below $XDG_CACHE_HOME/scdl_gpu, or ~/.cache/scdl_gpu, where that is not there yet.
    Raises MissingFileError, ArchiveError, naming URLs.
    """
    there = _Folder(url)
    pins = there.described()
    far = [name for name in pins if name in _ROWS or name.endswith(".scdp")]
    mirror = _mirror_path(url, pins)
    make_directory(mirror.parent)
    with _alone(mirror):  # of several processes one copies
        if not (mirror / MARKER).exists():
            logger.info("%s is mirrored at %s", shown(url), mirror)
            with Staging.create(mirror, needed_bytes=sum(pin.size_bytes for name, pin in pins.items() if name not in far)) as staging:
                there.copy(staging.directory, far)
    archive = open_archive(mirror, remote=Remote(shown(url), {name: pins[name] for name in far}))
    if archive.metadata.get("obsm") or archive.metadata.get("obsp"):
        logger.info("%s: its obsm and obsp are left out, as of every archive behind a URL", shown(url))
    return archive


_ROWS = (FileNames.COLPTR.value, FileNames.DATA.value)


def _mirror_path(url: str, pins: dict[str, Pin]) -> Path:
    """Give the place of the mirror of these states of files; that of another state is another."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    told = json.dumps([VERSION_OF_MIRRORS, shown(url), sorted((name, pin.size_bytes, pin.state) for name, pin in pins.items())])
    return Path(cache) / "scdl_gpu" / hashlib.sha256(told.encode()).hexdigest()[:32]


@contextmanager
def _alone(mirror: Path) -> Iterator[None]:
    """Wait until no other process makes this mirror."""
    fd = os.open(mirror.with_name(f"{mirror.name}.wait"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


class _Folder:
    """The folder at a URL."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._transport = reader.opened_transport(url)
        self._files: dict[str, reader.RemoteFile] = {}
        self._texts: dict[str, bytes] = {}

    def described(self) -> dict[str, Pin]:
        """Find all files that a loader needs, and pin them. Raises MissingFileError for one that must be there."""
        metadata = self._json(FileNames.METADATA.value, dict)
        self._pin([FileNames.HEADER.value])
        self._try(FileNames.VERSION.value)
        if PACKED in metadata:
            self._pin([record.name for record in records_of(self._files[FileNames.METADATA.value].path, metadata)])
        else:
            self._pin([FileNames.ROWPTR.value, *_ROWS])
        names = metadata.get("names", {})
        tables = [self._features(name, names) for name in (FileNames.VAR_FEATURES.value, FileNames.OBS_FEATURES.value)]
        if not tables[0] and PACKED not in metadata:
            self._features(FileNames.FEATURES.value, {})
        return {name: file.pin for name, file in self._files.items()}

    def _features(self, folder: str, names: Any) -> bool:
        """Pin the files of a feature directory; False where there is none."""
        first = f"{folder}/{CUMULATIVE}"
        if not self._try(first):
            return False
        self._pin([f"{folder}/{VERSION}"])
        if not self._try(f"{folder}/{JSON_NAME}"):
            self._pin([f"{folder}/{NPY_NAME}"])
        n_blocks = self._npy_length(first) - 1
        digits = len(str(n_blocks))
        self._pin([f"{folder}/dataframe_{number:0{digits}d}.parquet" for number in range(n_blocks)])
        named = names.get(folder, []) if isinstance(names, dict) else []
        recorded = [number for number in named if type(number) is int and 0 <= number < n_blocks] if isinstance(named, list) else []
        self._pin([f"{folder}/names_{number:0{digits}d}.names" for number in recorded])
        return True

    def _try(self, name: str) -> bool:
        """Pin a file, if it is there."""
        try:
            self._pin([name])
        except MissingFileError:
            return False
        return True

    def _pin(self, names: Sequence[str]) -> None:
        files = _each(lambda name: reader.RemoteFile.open(beside(self._url, name), self._transport), names)
        self._files |= dict(zip(names, files, strict=True))

    def _text(self, name: str) -> bytes:
        """Read a small file, once."""
        if name not in self._texts:
            if name not in self._files:
                self._pin([name])
            file = self._files[name]
            if file.size_bytes > SMALL_BYTES:
                raise ArchiveError(f"{file.path} holds {file.size_bytes:,} bytes, expected a description of less than {SMALL_BYTES:,}")
            self._texts[name] = self._bytes(Stretch(name, 0, file.size_bytes))
        return self._texts[name]

    def _json(self, name: str, kind: type[Made]) -> Made:
        path, text = shown(beside(self._url, name)), self._text(name)
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ArchiveError(f"{path}: not JSON ({error}); is this the URL of an archive?") from error
        if not isinstance(found, kind):
            raise ArchiveError(f"{path}: holds a JSON {type(found).__name__}, expected a {kind.__name__}")
        return found

    def _npy_length(self, name: str) -> int:
        _, shape, _ = split_npy(self._files[name].path, self._text(name))
        if len(shape) != 1 or not shape[0]:
            raise ArchiveError(f"{self._files[name].path}: an array of shape {shape}, expected the ends of blocks; copy the archive again")
        return shape[0]

    def _bytes(self, stretch: Stretch) -> bytes:
        out = torch.empty(stretch.stop - stretch.start, dtype=torch.uint8)
        self._files[stretch.name].read(stretch.start, stretch.stop, out)
        return out.numpy().tobytes()

    def copy(self, mirror: Path, far: Sequence[str]) -> None:
        """Copy to `mirror` what is pinned; of the files `far` the tables, and for the rest nothing but the size."""
        (mirror / MARKER).write_text(json.dumps({"url": shown(self._url), "not_here": sorted(far)}))
        for name, file in self._files.items():
            (mirror / name).parent.mkdir(parents=True, exist_ok=True)
            with (mirror / name).open("xb") as stream:
                stream.truncate(file.size_bytes)
        near = [stretch for name, file in self._files.items() if name not in far for stretch in _cut(name, 0, file.size_bytes)]
        tables = [stretch for some in _each(self._tables, far) for stretch in some]
        _each(lambda stretch: self._write(mirror, stretch), near + tables)

    def _tables(self, name: str) -> list[Stretch]:
        """Tell what is copied of a file whose rows stay: of values the begin, which tells their dtype; of a shard its tables."""
        file = self._files[name]
        if name in _ROWS:
            return _cut(name, 0, min(file.size_bytes, HEAD_BYTES if name == FileNames.DATA.value else 0))
        head = self._bytes(Stretch(name, 0, min(HEADER_BYTES, file.size_bytes)))
        try:
            header = ShardHeader.parse(head, file.size_bytes)
        except ShardHeaderError as error:
            raise ArchiveError(f"{file.path}: {error}") from error
        ends = [(section.offset, section.offset + section.size_bytes) for section in (header.orders, header.rows)]
        return [stretch for start, stop in ((0, HEADER_BYTES), *ends) for stretch in _cut(name, start, stop)]

    def _write(self, mirror: Path, stretch: Stretch) -> None:
        text = self._texts.get(stretch.name)
        text = self._bytes(stretch) if text is None else text[stretch.start : stretch.stop]
        with (mirror / stretch.name).open("r+b") as stream:
            stream.seek(stretch.start)
            stream.write(text)


def _cut(name: str, start: int, stop: int) -> list[Stretch]:
    return [Stretch(name, at, min(at + PIECE_BYTES, stop)) for at in range(start, stop, PIECE_BYTES)]


def _each(do: Callable[[Given], Made], some: Sequence[Given]) -> list[Made]:
    """Do it to each, in threads; the first error is raised, and what was not begun is left."""
    with ThreadPoolExecutor(THREADS, thread_name_prefix="scdl-mirror") as pool:
        futures = [pool.submit(do, one) for one in some]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()
