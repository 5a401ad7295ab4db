"""Which rows are in memory together, and when: the order of an epoch that streams, a pure function of (seed, epoch) and the position.

Knows extents by their rows and bytes, ranks and steps, not files. An epoch is one sequence of extents from all over the dataset;
each rank takes an equal stretch of it, and cuts that into windows. Rows are shuffled within a window. Windows hold whole
batches, so that none needs two of them; the price is that another batch size, as another number of ranks, cuts otherwise.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from scdl_gpu.archive.cuts import Cuts
from scdl_gpu.order import Order, mixed, permuted

Ints = NDArray[np.int64]
EXTENT_BYTES = 1 << 20
"""Of an extent: a request of 1 MiB reads at the speed of the disk, and smaller ones shuffle better (docs/streaming.md)."""


def extent_bytes_of(window_bytes: int) -> int:
    """Choose the size of extents for windows of a size: the same for all of 8 MiB and more, so that ranks with other budgets agree."""
    return min(EXTENT_BYTES, window_bytes // 8)


def check_ranks(order: Order, window_bytes: int, budget: float | None) -> None:
    """Raise ValueError where ranks might cut rows into different extents, and so miss some: by shares of memory that is free to each."""
    if order.world_size > 1 and window_bytes < 8 * EXTENT_BYTES and not isinstance(budget, Integral):
        raise ValueError(
            f"windows of {window_bytes:,} bytes have extents of an eighth of that, which ranks must have alike, and a share of what is "
            f"free differs: give the budget as bytes, or windows of {8 * EXTENT_BYTES:,} bytes and more"
        )


@dataclass(frozen=True, slots=True, eq=False)
class WindowRows:
    """The rows of one window, and the steps in which they are consumed.

    step, n_steps: the first step, and how many; start: where the rows begin in the epoch's sequence; n_rows: of the window, of which
    `n_own` are this rank's, the others are borrowed. part, first, counts: (p,) pieces of extents, as of `Cuts`, in their order.
    """

    step: int
    n_steps: int
    start: int
    n_rows: int
    n_own: int
    part: NDArray[np.int32]
    first: Ints
    counts: Ints


def least_rows(order: Order) -> int:
    """Give the rows that a window must have: a batch, or all that a rank has of an epoch."""
    return min(order.batch_size, -(-order.n_rows // order.world_size)) if order.steps() else 0


def fits(order: Order, cuts: Cuts, window_bytes: int) -> bool:
    """Tell whether windows of so many bytes hold the largest extent, and a batch."""
    return int(cuts.size_bytes.max(initial=0)) <= window_bytes and fewest_rows(cuts, window_bytes) >= least_rows(order)


def fewest_rows(cuts: Cuts, window_bytes: int) -> int:
    """Bound from below the rows of a window that is not its rank's last, in whatever order extents come; each fits a window.

    At worst it begins with the last row of a large extent, counted whole, and the next one is large too and does not fit. What lies
    between is more than these two leave of the memory: so many of the extents with the fewest rows a byte, the last of them in part,
    and no fewer extents than there would be of the largest.
    """
    sizes, rows = cuts.size_bytes, cuts.n_rows
    if int(sizes.sum()) <= window_bytes:
        return int(rows.sum())
    falling = np.sort(sizes)[::-1]
    room = window_bytes - int(falling[:2].sum())
    if room < 0:
        return 1
    sparse = np.argsort(rows / sizes)
    ends = np.cumsum(sizes[sparse])
    whole = int(np.searchsorted(ends, room, side="right"))
    left, some = room + 1 - int(ends[whole] - sizes[sparse[whole]]), sparse[whole]
    by_bytes = int(rows[sparse[:whole]].sum()) - (-left * int(rows[some]) // int(sizes[some]))
    count = 1 + int(np.searchsorted(np.cumsum(falling), room, side="right"))
    return 1 + max(by_bytes, int(np.sort(rows)[:count].sum()))


class Drawn(NamedTuple):
    """Rows of some steps, (b,): numbers in the window, numbers in the dataset, and which of them are padding."""

    numbers: Ints
    rows: Ints
    is_padding: NDArray[np.bool_]


class WindowOrder:
    """The windows of one rank, and the rows of their steps; the number of steps is that of `order`.

    cuts: the extents of all parts; part_starts: (k,) the number in the dataset of the first row of each. window_bytes: that a
    window may take. Raises ValueError where that might be less than a batch takes, in whatever epoch and on whatever rank.
    """

    def __init__(self, order: Order, cuts: Cuts, part_starts: Ints, *, window_bytes: int, extent_bytes: int) -> None:
        if cuts.size_bytes.size and int(cuts.size_bytes.max()) > window_bytes:
            raise ValueError(
                f"a window of {window_bytes:,} bytes does not hold the largest extent, of {int(cuts.size_bytes.max()):,} bytes; "
                f"raise memory_budget or host_budget"
            )
        fewest = fewest_rows(cuts, window_bytes)
        if fewest < least_rows(order):
            raise ValueError(
                f"a window of {window_bytes:,} bytes may hold as few as {fewest:,} rows, as an epoch deals out extents, fewer than a batch "
                f"of {order.batch_size:,}; raise memory_budget or host_budget, or make batches smaller"
            )
        self._order, self._cuts, self._part_starts = order, cuts, part_starts
        self.window_bytes, self._extent_bytes = window_bytes, extent_bytes
        self.windows = lru_cache(maxsize=2)(self._windows)

    @property
    def name(self) -> str:
        """What a state calls this order."""
        return f"{self._order.name} windows"

    def with_seed(self, seed: int) -> "WindowOrder":
        """Return the same order under another seed."""
        return WindowOrder(
            self._order.with_seed(seed), self._cuts, self._part_starts, window_bytes=self.window_bytes, extent_bytes=self._extent_bytes
        )

    def left(self, epoch: int, position: int) -> tuple[WindowRows, ...]:
        """Return the windows that hold what is left of an epoch when `position` rows of it are consumed."""
        step = -(-position // self._order.step_rows)  # at the end of an epoch fewer rows than a step are left over
        return tuple(window for window in self.windows(epoch) if window.step + window.n_steps > step)

    def _windows(self, epoch: int) -> tuple[WindowRows, ...]:
        """Cut this rank's stretch of the epoch into windows."""
        order = self._order
        n_extents = self._cuts.part.size
        extents = np.arange(n_extents, dtype=np.int64)
        if order.shuffle:
            extents = permuted(order.seed, epoch, n_extents, extents)
        ends = np.cumsum(self._cuts.n_rows[extents])
        bytes_before = np.concatenate(([0], np.cumsum(self._cuts.size_bytes[extents])))
        start, last, n_steps = self._stretch()
        made: list[WindowRows] = []
        step = 0
        while step < n_steps:
            stop = self._window_end(ends, bytes_before, start, last)
            steps = n_steps - step if stop == last else (stop - start) // order.batch_size
            stop = last if stop == last else start + steps * order.batch_size
            n_own = stop - start
            made.append(self._window(extents, ends, (start, max(stop, start + 1)), step, steps, n_own))
            start, step = stop, step + steps
        return tuple(made)

    def _stretch(self) -> tuple[int, int, int]:
        """Return where this rank's rows begin and end in the epoch's sequence, and the steps of every rank."""
        order = self._order
        n_steps = order.steps()
        start, stop = (r * order.n_rows // order.world_size for r in (order.rank, order.rank + 1))
        if start == stop:  # fewer rows than ranks: one is borrowed
            start = stop = min(start, order.n_rows - 1)
        return start, min(stop, start + n_steps * order.batch_size), n_steps

    def _window_end(self, ends: Ints, bytes_before: Ints, start: int, last: int) -> int:
        """Find where the window that begins at `start` ends: as many extents as fit, up to `last`, but one at least."""
        first = int(np.searchsorted(ends, start, side="right"))
        after = int(np.searchsorted(bytes_before, bytes_before[first] + self.window_bytes, side="right")) - 1
        return min(int(ends[max(after, first + 1) - 1]), last)

    def _window(self, extents: Ints, ends: Ints, bounds: tuple[int, int], step: int, n_steps: int, n_own: int) -> WindowRows:
        """Take the pieces of extents between `bounds` of the sequence."""
        start, stop = bounds
        first, after = int(np.searchsorted(ends, start, side="right")), int(np.searchsorted(ends, stop, side="left")) + 1
        chosen = extents[first:after]
        begins = ends[first:after] - self._cuts.n_rows[chosen]
        low, high = np.maximum(begins, start), np.minimum(ends[first:after], stop)
        where = self._cuts.first[chosen] + (low - begins)
        return WindowRows(step, n_steps, start, stop - start, n_own, self._cuts.part[chosen], where, high - low)

    def draw(self, window: WindowRows, epoch: int, step: int, count: int = 1) -> Drawn:
        """Return the rows of `count` steps from `step` on, which are all of `window`; padding repeats rows of it."""
        order = self._order
        positions = (step - window.step) * order.batch_size + np.arange(count * order.batch_size, dtype=np.int64)
        is_padding = positions >= window.n_own
        numbers = positions % window.n_rows
        if order.shuffle:
            numbers = permuted(mixed(order.seed, epoch), window.start, window.n_rows, numbers)
        ends = np.cumsum(window.counts)
        piece = np.searchsorted(ends, numbers, side="right")
        begins = self._part_starts[window.part] + window.first - (ends - window.counts)
        return Drawn(numbers, begins[piece] + numbers, is_padding)

    # State

    @cached_property
    def _digest(self) -> str:
        """XXH3-64 of where all extents begin and end: the same rows in other files are cut elsewhere."""
        digest = xxhash.xxh3_64()
        for column in (self._cuts.part, self._cuts.first, self._cuts.n_rows, self._cuts.size_bytes):
            digest.update(np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()

    def state(self) -> dict[str, Any]:
        """Describe what windows depend on, beside what the state of `Order` says."""
        order = self._order
        windows = {"window_bytes": self.window_bytes, "extent_bytes": self._extent_bytes, "cuts": self._digest}
        steps = {"world_size": order.world_size, "batch_size": order.batch_size, "drop_last": order.drop_last}
        return {"order": self.name, "windows": windows | steps}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError for a state in the middle of an epoch of other windows; where an epoch begins all are welcome."""
        expected, found = self.state()["windows"], state.get("windows")
        if found != expected and 0 < state["position"] < self._order.n_rows:
            raise ValueError(
                f"the state was taken {state['position']:,} rows into an epoch with windows of {found}, these are {expected}: an epoch "
                f"that streams goes on with the files, ranks, batches and windows it began with; make the loader so (memory_budget, "
                f"host_budget), or load a state from between two epochs"
            )
