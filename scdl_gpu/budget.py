"""What a budget allows of some memory: of a device, or of the host.

Knows what is free and what was granted, not which rows lie where. Where nothing is granted half of the host's memory is taken, and
of a device's all but what its model may need: too little is made good by a budget, too much ends a job.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from numbers import Integral

from scdl_gpu.arena import Arena, available_bytes
from scdl_gpu.arguments import real
from scdl_gpu.device import Device, size_words
from scdl_gpu.errors import DeviceError
from scdl_gpu.order import ranks
from scdl_gpu.reader import PAGE_BYTES
from scdl_gpu.slab import Layout

RESERVE_BYTES = 4 << 30
"""Of the device's free memory, left to the model where no budget is given."""
WINDOW_BYTES = 4 << 30
"""Of a window where no budget is given: 4,096 extents of 1 MiB shuffle a batch of 1,024 nearly as a permutation does, the labels' shares
vary by a quarter more; larger ones gain little, and are longer in coming (docs/streaming.md)."""
LEAST_WINDOW = 1 << 16
"""Bytes that no window is smaller than."""
Suits = Callable[[int], bool]
"""Tells whether windows of so many bytes hold a batch in every epoch."""


@dataclass(frozen=True, slots=True)
class Room:
    """What a budget allows of some memory; None where none is given. sharers: processes that have windows of their own there."""

    limit: int
    words: str
    budget: float | None = None
    sharers: int = 1
    suits: Suits = lambda _: True

    @property
    def window_bytes(self) -> int:
        """Give the bytes of each of two windows, 0 where they are too few; where no budget is given as many as suit, if there are."""
        most = self.limit // (2 if self.budget is not None else 2 * self.sharers) // PAGE_BYTES * PAGE_BYTES
        if most < LEAST_WINDOW or self.budget is not None:
            return most if most >= LEAST_WINDOW else 0
        size = min(WINDOW_BYTES, 1 << (most.bit_length() - 1))
        while size < most and not self.suits(size):
            size = min(2 * size, most)
        return size

    @property
    def has_windows(self) -> bool:
        """Tell whether rows may stream there unasked."""
        return bool(self.window_bytes) and self.suits(self.window_bytes)

    def less(self, table_bytes: int) -> "Room":
        """Return what is left for rows beside tables."""
        if not table_bytes:
            return self
        limit, words = max(0, self.limit - table_bytes), f"{self.words}, {size_words(table_bytes)} of it for tables"
        return replace(self, limit=limit, words=words)

    def holds(self, size_bytes: int) -> bool:
        """Tell whether rows fit."""
        return size_bytes <= self.limit

    def miss(self, size_bytes: int) -> str:
        """Say that rows do not fit."""
        return f"{size_words(size_bytes)} of rows exceed {self.words}"

    def fit(self, size_bytes: int, cure: str) -> str:
        """Say that the rows fit; raise DeviceError naming the sizes where they do not."""
        if self.holds(size_bytes):
            return f"{size_words(size_bytes)} of rows fit {self.words}"
        raise DeviceError(f"{self.miss(size_bytes)}; choose {cure}")


def device_room(device: Device, asked: float | None, output_bytes: int) -> Room:
    """Find what a device has for rows and windows, beside batches, which need `output_bytes`. Raises ValueError for no budget."""
    free, total = device.memory()
    limit = _budget_bytes("memory_budget", asked, free)
    if limit is None:
        limit = max(0, free - max(RESERVE_BYTES, output_bytes))
    return Room(limit, f"the budget of {size_words(limit)} on {device.name}, {size_words(free)} of {size_words(total)} being free", asked)


def host_room(layout: Layout, budget: float | None, *, is_shared: bool) -> Room:
    """Find what the host has. is_shared: whether rows may lie in memory of another process. Raises ValueError for no budget."""
    free = available_bytes()
    if is_shared and Arena.exists(layout.arena_bytes, layout.name()):  # pinned by another rank: this one needs nothing more
        return Room(layout.size_bytes, "the memory that other processes hold them in")
    limit = _budget_bytes("host_budget", budget, free)
    limit = free // 2 if limit is None else limit
    words = f"the budget of {size_words(limit)} on the host, {size_words(free)} being available"
    return Room(limit, words, budget, sharers(os.environ, ranks(None, None)[1]))


def sharers(environment: Mapping[str, str], world_size: int) -> int:
    """Count the processes of a job on this node as torchrun tells them, or all of the job: too many leave memory unused, too few end it.

    Raises ValueError for what is no number.
    """
    told = environment.get("LOCAL_WORLD_SIZE", str(world_size))
    if not (told.isascii() and told.isdecimal() and int(told)):
        raise ValueError(f"the environment has LOCAL_WORLD_SIZE={told!r}, expected the number of processes on this node")
    return int(told)


def _budget_bytes(name: str, budget: float | None, free: int) -> int | None:
    if budget is None:
        return None
    expected = "bytes as an int, or a fraction of what is free as a float in 0..1"
    number, is_bytes = real(name, budget, expected), isinstance(budget, Integral)
    if not number >= 0 or not (is_bytes or number <= 1):
        raise ValueError(f"{name} is {budget!r}, expected {expected}")
    if is_bytes and number == 1:
        raise ValueError(f"{name} is 1, which is one byte: {name}=1.0 is all that is free, {name}=0 nothing; expected {expected}")
    return int(budget) if is_bytes else int(number * free)
