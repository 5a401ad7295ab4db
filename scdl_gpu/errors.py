"""What can go wrong, drawn as a tree.

Knows names only; the texts are written where the fault is seen. Arguments of the caller raise
`ValueError`, `IndexError` and `TypeError` as everywhere in Python, and are not in this tree.

    ScdlError
    ├── ArchiveError                  files of an archive: what is on disk is not what it should be
    │   ├── MissingFileError          ... or is not there (also a FileNotFoundError)
    │   ├── NotRawError               ... or is packed, where plain arrays are needed (also an AttributeError)
    │   └── HeaderSerializationError  bytes of header.sch
    ├── SourceError                   a file or matrix that is to be converted
    │   └── MissingMatrixError        ... which lacks what was asked for; `available` names what it has
    └── DeviceError                   the machine: a GPU, its memory, memory of the host, libraries
"""

from typing import Any


class ScdlError(Exception):
    """Any fault that this package finds in files or in the machine."""


class ArchiveError(ScdlError):
    """An archive whose files are damaged, incomplete, unknown or busy."""


class MissingFileError(ArchiveError, FileNotFoundError):
    """A file of an archive, or the archive itself, is not there."""


class NotRawError(ArchiveError, AttributeError):
    """A packed archive, which has no plain arrays to hand out or to change; `scdl-gpu unpack` makes a raw one of it."""


class HeaderSerializationError(ArchiveError):
    """Bytes that are no valid `header.sch`, or values that cannot be put into one."""


class SourceError(ScdlError):
    """A source of a conversion (h5ad, AnnData, SciPy) that cannot be converted as asked."""


class MissingMatrixError(SourceError):
    """The matrix, or the key of obsm or obsp, that was asked for is not there; `available` names those that are."""

    def __init__(self, message: str, available: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.available = available

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle with `available`: errors come out of worker processes."""
        return type(self), (str(self), self.available)


class DeviceError(ScdlError):
    """A machine that lacks what was asked of it: a GPU, memory of it or of the host, a library."""
