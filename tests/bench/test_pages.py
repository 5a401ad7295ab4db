"""The page cache is asked, and forgets files that nobody has mapped."""

import mmap
from pathlib import Path

from scdl_gpu.bench import limits, pages


def test_cold_is_verified(tmp_path: Path) -> None:
    """A file that was read is there, one whose pages were dropped is not, one that is mapped and touched is told to have stayed."""
    (tmp_path / "below").mkdir()
    path = tmp_path / "below" / "a"
    path.write_bytes(bytes(1 << 20))
    (tmp_path / "empty").touch()

    pages.warm([tmp_path])
    warm = pages.resident([tmp_path])
    cold = pages.drop([tmp_path])
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        touched = sum(mapped[::4096])
        held = pages.drop([tmp_path])

    assert pages.size_of([tmp_path]) == 1 << 20
    assert warm == 1
    assert held >= cold
    assert touched == 0


def test_limits_are_measured(tmp_path: Path) -> None:
    """A copy of memory, a fill and a read of the disk have a rate."""
    path = tmp_path / "a"
    path.write_bytes(bytes(9 << 20))

    assert limits.memory_copy(1 << 20, 2) > 0
    assert limits.memory_fill(1 << 20, 2) > 0
    assert limits.disk_read([path]) > 0
