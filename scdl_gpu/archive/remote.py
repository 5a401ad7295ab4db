"""What stays behind a URL of an archive that was opened there, and what keeps its mirror from being taken for a whole archive.

Knows which files those are, and in which state they were opened, not how they are read. In the mirror, a directory on this machine,
they have their sizes and no bytes: whoever opened it as an archive would read zeros for rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from scdl_gpu.errors import ArchiveError
from scdl_gpu.transport import Pin

MARKER = "remote.json"
"""In a mirror; written first, so that a mirror without it was never there."""
ONLY = "only GPUBatchLoader, and the GPUBatchDataModule over it, take one"
WAY_OUT = "download the whole archive and open that, for example with `wget -r`, `aws s3 sync` or `rclone copy`"


@dataclass(frozen=True, slots=True)
class Remote:
    """url: of the archive, as it may be shown; pins: the files that stay there, by their names in it."""

    url: str
    pins: Mapping[str, Pin]


def check_whole(path: Path) -> None:
    """Raise ArchiveError where the directory at `path` is a mirror, which lacks the rows."""
    if (path / MARKER).exists():
        raise ArchiveError(
            f"{path} mirrors an archive behind a URL, named in its {MARKER}, and has none of its rows; "
            f"give that URL to GPUBatchLoader, or {WAY_OUT}"
        )
