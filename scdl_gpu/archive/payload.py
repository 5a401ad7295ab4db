"""The files that hold the rows of an archive, opened for reading extents, wherever they lie.

Knows that a file must be the one that the archive was opened with, not what is read of it.
"""

import threading

import torch

from scdl_gpu import reader
from scdl_gpu.archive.packed_header import HEADER_BYTES
from scdl_gpu.archive.packed_shard import PackedShard
from scdl_gpu.archive.raw import ARRAY_FILES, RawArchive
from scdl_gpu.errors import ArchiveError

DIGEST_BYTES = 8
"""Of the hash that ends the header of a shard."""


def open_file(archive: RawArchive, name: str, *, is_direct: bool = False) -> reader.AnyFile:
    """Open a file of `archive`. Raises ArchiveError where it is not the one that was opened with it."""
    if archive.remote is not None and name in archive.remote.pins:
        return reader.RemoteFile(archive.remote.pins[name])
    file = reader.File(archive.path / name, is_direct=is_direct)
    if archive.stamp and archive.stamp[ARRAY_FILES.index(name)] != (file.status.st_dev, file.status.st_ino):
        file.close()
        raise ArchiveError(f"{file.path} was replaced since the archive was opened: open it anew")
    return file


def open_shard(shard: PackedShard, left: threading.Event, *, is_direct: bool = False) -> reader.AnyFile:
    """Open the file of a packed shard, unless `left` is set meanwhile, see `RemoteFile.until`.

    Raises ArchiveError where its header is not the one that was opened with the archive.
    """
    file: reader.AnyFile = reader.File(shard.path, is_direct=is_direct) if shard.pin is None else reader.RemoteFile(shard.pin)
    digest = torch.empty(DIGEST_BYTES, dtype=torch.uint8)
    try:
        file.until(left).read(HEADER_BYTES - DIGEST_BYTES, HEADER_BYTES, digest)
        is_same = digest.numpy()[::-1].tobytes().hex() == shard.digest
    except BaseException:
        file.close()
        raise
    if not is_same:
        file.close()
        raise ArchiveError(f"{file.path} was replaced since the archive was opened: open it anew")
    return file
