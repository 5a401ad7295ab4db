"""Windows of an epoch: every row once, on one rank, in whole batches, in no more memory than is given, from (seed, epoch) alone."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from frozen import windowed

from scdl_gpu.archive.cuts import Cuts
from scdl_gpu.order import Order
from scdl_gpu.window_order import WindowOrder, WindowRows, extent_bytes_of

ROW_BYTES = 10


def cuts_of(parts: list[list[int]]) -> tuple[Cuts, np.ndarray]:
    """Make extents of so many rows for each part, 10 bytes a row, and say where parts begin."""
    counts = np.array(list(itertools.chain(*parts)), np.int64)
    part = np.repeat(np.arange(len(parts)), [len(extents) for extents in parts]).astype(np.int32)
    first = np.concatenate([np.cumsum([0, *extents[:-1]]) for extents in parts]).astype(np.int64)
    starts = np.cumsum([0, *(sum(extents) for extents in parts[:-1])]).astype(np.int64)
    return Cuts(part, first, counts, counts * ROW_BYTES), starts


def made(parts: list[list[int]], window_rows: int, **options: Any) -> WindowOrder:
    """Make the order of a rank, with windows that hold so many rows."""
    cuts, starts = cuts_of(parts)
    order = Order(int(cuts.n_rows.sum()), **options)
    return WindowOrder(order, cuts, starts, window_bytes=window_rows * ROW_BYTES, extent_bytes=100)


def drawn(order: WindowOrder, epoch: int = 0) -> Iterator[tuple[WindowRows, np.ndarray, np.ndarray]]:
    """Give window, rows and padding of every step of a rank."""
    for window in order.windows(epoch):
        for step in range(window.step, window.step + window.n_steps):
            _, rows, is_padding = order.draw(window, epoch, step)
            yield window, rows, is_padding


PARTS = [[7, 7, 7, 2], [5], [9, 9, 1]]
DOCUMENT = Path(__file__).parents[1] / "docs" / "order.md"
GOLDEN = [
    ((0, 0, 0, 1), [21, 45, 37, 38, 41, 13, 44, 12, 8]),
    ((42, 7, 0, 2), [24, 5, 19, 25, 16, 15, 23, 3, 17]),
    ((42, 7, 1, 2), [35, 10, 8, 11, 36, 32, 9, 34, 46]),
]


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("shuffle", [True, False])
def test_all_ranks_together_yield_every_row_once(world: int, batch: int, shuffle: bool) -> None:
    """Rows that are no padding are disjoint and complete, and every rank yields equally many batches of equal length."""
    options = {"batch_size": batch, "world_size": world, "shuffle": shuffle, "seed": 5}
    by_rank = [list(drawn(made(PARTS, 30, rank=rank, **options), epoch=3)) for rank in range(world)]

    assert {len(steps) for steps in by_rank} == {-(-47 // (batch * world))}
    assert {rows.size for steps in by_rank for _, rows, _ in steps} == {batch}
    own = np.concatenate([rows[~is_padding] for steps in by_rank for _, rows, is_padding in steps])
    assert np.sort(own).tolist() == list(range(47))


@pytest.mark.parametrize("world", [1, 2, 5])
def test_an_incomplete_step_is_left_out_on_all_ranks(world: int) -> None:
    """With drop_last no row is padding, and none comes twice."""
    by_rank = [list(drawn(made(PARTS, 20, batch_size=4, rank=r, world_size=world, drop_last=True))) for r in range(world)]

    assert {len(steps) for steps in by_rank} == {47 // (4 * world)}
    rows = np.concatenate([rows for steps in by_rank for _, rows, _ in steps])
    assert not np.concatenate([is_padding for steps in by_rank for *_, is_padding in steps]).any()
    assert np.unique(rows).size == rows.size


def test_more_ranks_than_rows_borrow_what_they_yield() -> None:
    """A rank without rows yields padding, as many batches as the others."""
    by_rank = [list(drawn(made([[2]], 20, batch_size=3, rank=r, world_size=4))) for r in range(4)]

    assert [len(steps) for steps in by_rank] == [1, 1, 1, 1]
    own = np.concatenate([rows[~is_padding] for steps in by_rank for _, rows, is_padding in steps])
    assert np.sort(own).tolist() == [0, 1]


def test_no_rows_are_no_windows() -> None:
    """An empty dataset has no steps."""
    assert made([[]], 20, batch_size=3).windows(0) == ()


def test_windows_hold_pieces_of_extents_and_no_more_bytes_than_given() -> None:
    """Each window's pieces lie in extents, their rows are what its steps draw, and whole extents would fit its memory."""
    order = made(PARTS, 20, batch_size=3, seed=1)
    cuts, starts = cuts_of(PARTS)

    for window in order.windows(0):
        pieces = [starts[p] + f + np.arange(c) for p, f, c in zip(window.part, window.first, window.counts, strict=True)]
        steps = [rows for other, rows, _ in drawn(order) if other is window]
        assert set(np.concatenate(steps)) == set(np.concatenate(pieces))
        assert window.n_rows == sum(window.counts)
        touched = 0
        for p, f, c in zip(window.part, window.first, window.counts, strict=True):
            inside = (cuts.part == p) & (cuts.first <= f) & (f + c <= cuts.first + cuts.n_rows)
            assert inside.sum() == 1
            touched += int(cuts.size_bytes[inside][0])
        assert touched <= 200


def test_rows_are_shuffled_across_a_window_and_differ_by_epoch_and_seed() -> None:
    """Rows of one window come in no order of the files; epochs and seeds differ, in extents and in rows; the same ones agree."""

    def rows_of(seed: int, epoch: int) -> list[int]:
        return [int(row) for _, rows, _ in drawn(made([[50] * 20], 500, batch_size=10, seed=seed), epoch) for row in rows]

    here = rows_of(0, 0)

    assert here == rows_of(0, 0)
    assert here != rows_of(0, 1)
    assert here != rows_of(1, 0)
    jumps = np.abs(np.diff(here[:500]))
    assert np.mean(jumps == 1) < 0.05
    assert len({row // 50 for row in here[:10]}) > 4


def test_rows_in_order_are_not_shuffled() -> None:
    """Without shuffle one rank yields the rows as they lie."""
    steps = list(drawn(made(PARTS, 25, batch_size=5, shuffle=False)))

    rows = np.concatenate([rows[~is_padding] for _, rows, is_padding in steps])
    assert rows.tolist() == list(range(47))


def test_what_is_left_of_an_epoch_begins_with_the_window_of_the_position() -> None:
    """A position within a window keeps that window, and those after it."""
    order = made([[10] * 10], 30, batch_size=5, world_size=1)
    windows = order.windows(0)

    assert [len(order.left(0, position)) for position in (0, 25, 30, 35, 95, 100)] == [4, 4, 3, 3, 1, 0]
    assert order.left(0, 30)[0] is windows[1]


def test_a_window_without_room_for_a_batch_is_refused() -> None:
    """A batch must fit a window, and so must the largest extent; the errors name the sizes."""
    with pytest.raises(ValueError, match=r"a window of 200 bytes may hold as few as 8 rows, .* fewer than a batch of 9; raise"):
        made([[7] * 9], 20, batch_size=9)
    assert made([[7] * 9], 20, batch_size=8).windows(0)
    with pytest.raises(ValueError, match=r"a window of 60 bytes does not hold the largest extent, of 70 bytes"):
        made([[7] * 9], 6, batch_size=1)


def test_a_batch_that_a_later_epoch_has_no_window_for_is_refused_at_once() -> None:
    """The first epoch would do, a later one not: between a large extent's last row and the next large one lie a few rows."""
    with pytest.raises(ValueError, match=r"a window of 240 bytes may hold as few as 2 rows, .* fewer than a batch of 5"):
        made([[12, 1, 12, 9, 9, 12, 1, 5, 8]], 24, batch_size=5)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_what_one_window_holds_is_never_refused(world: int) -> None:
    """Where all rows, or all of a rank, come in one window, batches may be larger than it; so they may where no step is left."""
    assert len(made([[7] * 9], 63, batch_size=100, world_size=world).windows(3)) == 1
    assert made([[7] * 9], 20, batch_size=100, drop_last=True).windows(0) == ()
    assert len(made([[7] * 9], 28, batch_size=100, rank=1, world_size=7).windows(0)) == 1


def fewest(n_extents: int, fit: int, rows: int) -> int:
    """Find the fewest rows of a window that holds `fit` of the extents, of so many rows each, and is not the last, by trying all begins."""
    windows = [(start, min(start // rows + fit, n_extents) * rows) for start in range(n_extents * rows)]
    return min(stop - start for start, stop in windows if stop < n_extents * rows)


@pytest.mark.parametrize(("n_extents", "fit", "rows"), [(9, 2, 7), (9, 1, 7), (4, 3, 5), (20, 8, 3), (6, 5, 1)])
def test_the_bound_is_met_where_extents_are_alike(n_extents: int, fit: int, rows: int) -> None:
    """Of extents of one size the largest batch that is taken is that which the worst window holds, not a row less."""
    worst = fewest(n_extents, fit, rows)
    made([[rows] * n_extents], fit * rows, batch_size=worst)

    with pytest.raises(ValueError, match=rf"may hold as few as {worst} rows"):
        made([[rows] * n_extents], fit * rows, batch_size=worst + 1)


def test_another_world_is_welcome_between_epochs_only() -> None:
    """A state within an epoch asks for the ranks, batches and windows it was taken under; one from an epoch's begin for none."""
    order, other = made([[10] * 10], 30, batch_size=5), made([[10] * 10], 30, batch_size=5, rank=1, world_size=2)
    state = {"position": 50} | order.state()

    order.check_state(state)
    other.check_state(state | {"position": 0})
    with pytest.raises(ValueError, match=r"50 rows into an epoch with windows of .*'world_size': 1.*'world_size': 2"):
        other.check_state(state)
    with pytest.raises(ValueError, match=r"'window_bytes': 300.*'window_bytes': 400"):
        made([[10] * 10], 40, batch_size=5).check_state(state)


@pytest.mark.parametrize(("window_kib", "extent_kib"), [(64, 8), (4 << 10, 512), (8 << 10, 1 << 10), (32 << 20, 1 << 10)])
def test_extents_are_of_1_mib_but_in_tiny_windows(window_kib: int, extent_kib: int) -> None:
    """Windows of 8 MiB and more have extents of one size, so that ranks with other budgets agree; smaller ones have eight."""
    assert extent_bytes_of(window_kib << 10) == extent_kib << 10


def test_nothing_is_left_at_the_end_of_an_epoch() -> None:
    """A state after the last batch, whose position is that of the rows, begins no window."""
    order = made([[10] * 10 + [3]], 30, batch_size=5)

    assert order.left(0, 103) == ()
    assert len(order.left(0, 100)) == 1


def test_other_files_and_another_last_step_are_other_windows() -> None:
    """The same rows cut elsewhere, and a last step that is left out, refuse a state from within an epoch."""
    state = {"position": 50} | made([[10] * 10], 30, batch_size=5).state()

    with pytest.raises(ValueError, match="goes on with the files"):
        made([[5] * 20], 30, batch_size=5).check_state(state)
    with pytest.raises(ValueError, match="goes on with the files"):
        made([[10] * 10], 30, batch_size=5, drop_last=True).check_state(state)


@hypothesis.given(
    parts=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=8), min_size=1, max_size=4),
    window=st.integers(12, 80),
    batch=st.integers(1, 40),
    world=st.integers(1, 5),
    seed=st.integers(0, 3),
    drop_last=st.booleans(),
)
def test_any_extents_are_dealt_out_whole(parts: list[list[int]], window: int, batch: int, world: int, seed: int, drop_last: bool) -> None:
    """What is not refused at once yields equal steps, no row twice, and all of them unless steps are dropped, in any epoch."""
    n_rows = sum(map(sum, parts))
    try:
        orders = [made(parts, window, batch_size=batch, rank=r, world_size=world, seed=seed, drop_last=drop_last) for r in range(world)]
    except ValueError:
        hypothesis.reject()

    for epoch in range(5):
        assert all(window.n_steps for order in orders for window in order.windows(epoch))
    by_rank = [list(drawn(order)) for order in orders]

    assert {len(steps) for steps in by_rank} == {orders[0]._order.steps()}
    own = [rows[~is_padding] for steps in by_rank for _, rows, is_padding in steps]
    rows = np.sort(np.concatenate([np.zeros(0, np.int64), *own]))
    assert np.unique(rows).size == rows.size
    if not drop_last:
        assert rows.tolist() == list(range(n_rows))


@pytest.mark.parametrize(("place", "rows"), GOLDEN)
def test_windows_give_the_golden_rows(place: tuple[int, int, int, int], rows: list[int]) -> None:
    """The order of windows never changes: these values are frozen, and the document states the same ones."""
    seed, epoch, rank, world = place
    steps = drawn(made(PARTS, 20, batch_size=3, seed=seed, rank=rank, world_size=world), epoch)

    assert [int(row) for _, batch, _ in itertools.islice(steps, 3) for row in batch] == rows
    assert ", ".join(map(str, rows)) in re.sub(r"\s+", " ", DOCUMENT.read_text())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 2), (0, 3), (2, 3)])
@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (42, 7), (2**63, 1)])
def test_windows_follow_the_document(seed: int, epoch: int, rank: int, world: int, batch: int) -> None:
    """All batches of a rank are those that docs/order.md gives, computed in plain Python."""
    cuts, starts = cuts_of(PARTS)
    extents = [(int(starts[p] + first), int(count)) for p, first, count in zip(cuts.part, cuts.first, cuts.n_rows, strict=True)]
    expected = windowed(extents, cuts.size_bytes.tolist(), 200, batch, seed=seed, epoch=epoch, rank=rank, world=world)

    found = [rows.tolist() for _, rows, _ in drawn(made(PARTS, 20, batch_size=batch, seed=seed, rank=rank, world_size=world), epoch)]

    assert found == expected
