"""Sizes of windows follow from what is free, from who shares it, and from what a batch needs."""

import pytest

from scdl_gpu.budget import Room, sharers

GIB = 1 << 30


@pytest.mark.parametrize(
    ("room", "window_bytes"),
    [
        (Room(100 * GIB, ""), 4 * GIB),
        (Room(100 * GIB, "", sharers=8), 4 * GIB),
        (Room(40 * GIB, "", sharers=8), 2 * GIB),
        (Room(40 * GIB, "", 0.5, sharers=8), 20 * GIB),
        (Room(100 * GIB, "", suits=lambda size: size >= 9 * GIB), 16 * GIB),
        (Room(20 * GIB, "", suits=lambda size: size >= 9 * GIB), 10 * GIB),
        (Room(2 * GIB, "", 1, suits=lambda size: size >= 9 * GIB), GIB),
        (Room(100_000, ""), 0),
    ],
)
def test_windows_share_what_is_free(room: Room, window_bytes: int) -> None:
    """Two windows a process are a power of two up to 4 GiB, or as large as a batch takes; a budget that is given is taken as it is."""
    assert room.window_bytes == window_bytes


def test_nothing_streams_unasked_through_windows_without_a_batch() -> None:
    """Rows stream by themselves where windows suit, not where the largest there is room for do not."""
    assert Room(GIB, "").has_windows
    assert not Room(GIB, "", suits=lambda size: size > GIB).has_windows
    assert not Room(0, "").has_windows


def test_processes_of_a_node_are_counted_as_torchrun_tells_them() -> None:
    """LOCAL_WORLD_SIZE is the number, that of the job where it is not set; what is no number is refused by name."""
    assert [sharers(told, 16) for told in ({}, {"LOCAL_WORLD_SIZE": "8"})] == [16, 8]
    for told in ("", "0", "-1", "four"):
        with pytest.raises(ValueError, match=f"LOCAL_WORLD_SIZE='{told}', expected the number of processes"):
            sharers({"LOCAL_WORLD_SIZE": told}, 1)
