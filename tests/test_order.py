"""The order of an epoch: a permutation, divided over ranks, that any job can take up anywhere."""

import re
from collections import Counter
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from frozen import reference
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from scdl_gpu.order import Order, RowSampler, permuted, ranks

DOCUMENT = Path(__file__).parents[1] / "docs" / "order.md"
GOLDEN = [
    ((0, 0, 10), [8, 6, 1, 7, 5]),
    ((0, 1, 10), [6, 8, 9, 1, 4]),
    ((42, 7, 10), [4, 0, 9, 8, 7]),
    ((0, 0, 100_648_790), [78916077, 26418857, 2051397, 20205439, 23539885]),
    ((42, 7, 100_648_790), [31967144, 23207653, 91102710, 42953601, 14861026]),
    ((0, 0, 2**40), [908031782630, 978812665455, 150800008948, 666910860489, 167570840669]),
]


def epoch_rows(order: Order, epoch: int = 0) -> tuple[list[int], list[bool]]:
    """Return all rows and padding marks that one rank yields."""
    steps = [order.batch(epoch, step * order.step_rows) for step in range(order.steps())]
    return [row for rows, _ in steps for row in rows.tolist()], [mark for _, marks in steps for mark in marks.tolist()]


@pytest.mark.parametrize(("place", "rows"), GOLDEN)
def test_permuted_gives_the_golden_rows(place: tuple[int, int, int], rows: list[int]) -> None:
    """The order never changes: these values are frozen, and the document states the same ones."""
    found = permuted(*place, np.arange(5))

    assert found.tolist() == rows
    assert ", ".join(map(str, rows)) in re.sub(r"\s+", " ", DOCUMENT.read_text())


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40), st.integers(1, 2**45), st.integers(0, 2**45))
def test_permuted_follows_the_document(seed: int, epoch: int, n: int, position: int) -> None:
    """The kernel does what docs/order.md says, in any place."""
    position %= n

    assert permuted(seed, epoch, n, np.array([position])).tolist() == [reference(seed, epoch, n, position)]


@pytest.mark.parametrize("n", [1, 5, 1_025, 200_000, 2**40])
def test_permuted_gives_many_rows_as_it_gives_one(n: int) -> None:
    """Positions that are asked for together, repeated and in any order, walk as far as each does alone."""
    positions = np.random.default_rng(n).integers(0, n, 300)

    together = permuted(3, 1, n, positions)

    assert together.tolist() == [reference(3, 1, n, position) for position in positions.tolist()]


def test_steps_that_follow_each_other_come_at_once() -> None:
    """Rows and marks of several steps are those of each, one after the other, the wrapping last one too."""
    order = Order(50, 4, 9, rank=1, world_size=3)
    steps = [order.batch(2, position) for position in range(12, 50, 12)]

    rows, is_padding = order.batch(2, 12, len(steps))

    np.testing.assert_array_equal(rows, np.concatenate([step[0] for step in steps]))
    np.testing.assert_array_equal(is_padding, np.concatenate([step[1] for step in steps]))
    assert is_padding.any()


@pytest.mark.parametrize("n", [*range(1, 130), 1023, 1024, 1025, 4097])
def test_permuted_is_a_permutation(n: int) -> None:
    """Every row comes exactly once."""
    assert sorted(permuted(5, 3, n, np.arange(n)).tolist()) == list(range(n))


def test_permuted_reaches_every_order_of_few_rows_equally() -> None:
    """Over 24,000 seeds the 120 orders of 5 rows are as frequent as chance allows (chi-square, 119 degrees, p > 0.001)."""
    counts = Counter(tuple(permuted(seed, 0, 5, np.arange(5)).tolist()) for seed in range(24_000))

    assert sum((counts[order] - 200) ** 2 / 200 for order in permutations(range(5))) < 173.6


def test_permuted_spreads_neighbours() -> None:
    """Differences of neighbours in the order are uniform over 2,000 seeds of 1,000 rows (chi-square, 998 degrees, p > 0.001)."""
    counts = np.zeros(1000)
    for seed in range(2000):
        rows = permuted(seed, 0, 1000, np.arange(1000))
        counts += np.bincount((rows[1:] - rows[:-1]) % 1000, minlength=1000)

    assert ((counts[1:] - 2000) ** 2 / 2000).sum() < 1140


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("n_rows", "batch_size", "world_size"), [(10, 3, 1), (10, 3, 2), (100, 7, 3), (1, 4, 3), (64, 8, 2), (5, 100, 4)])
def test_batches_are_disjoint_and_complete_over_ranks(n_rows: int, batch_size: int, world_size: int, shuffle: bool) -> None:
    """All ranks yield equally many full batches; without padding they hold every row once, and padding repeats the epoch's start."""
    orders = [Order(n_rows, batch_size, 1, rank, world_size, shuffle) for rank in range(world_size)]
    yielded = [epoch_rows(order) for order in orders]

    assert len({len(rows) for rows, _ in yielded}) == 1
    real = sorted(row for rows, marks in yielded for row, padded in zip(rows, marks, strict=True) if not padded)
    assert real == list(range(n_rows))
    dealt = [row for together in zip(*(rows for rows, _ in yielded), strict=True) for row in together]
    assert dealt == [dealt[k % n_rows] for k in range(len(dealt))]


def test_drop_last_drops_the_incomplete_step_on_all_ranks() -> None:
    """With drop_last no rank pads and all yield the same number of batches."""
    yielded = [epoch_rows(Order(100, 8, 0, rank, 3, drop_last=True)) for rank in range(3)]

    assert [len(rows) for rows, _ in yielded] == [32, 32, 32]
    assert not any(mark for _, marks in yielded for mark in marks)


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 4), st.integers(1, 9), st.integers(1, 4), st.integers(0, 9))
def test_resuming_in_another_world_repeats_and_loses_nothing(n: int, b: int, w: int, b2: int, w2: int, stop: int) -> None:
    """A job that stops after some steps and goes on with other ranks and batch sizes sees the epoch's remaining rows once."""
    first = [Order(n, b, 9, rank, w) for rank in range(w)]
    stop = min(stop, first[0].steps())
    state = first[0].state(4, stop * first[0].step_rows)
    second = [Order(n, b2, 9, rank, w2) for rank in range(w2)]

    seen = [row for order in first for step in range(stop) for row in _real(order, 4, step * order.step_rows)]
    for order in second:
        order.check_state(state)
        for step in range(order.steps(state["position"])):
            seen += _real(order, 4, state["position"] + step * order.step_rows)

    assert sorted(seen) == list(range(n))


def _real(order: Order, epoch: int, position: int) -> list[int]:
    rows, padding = order.batch(epoch, position)
    return rows[~padding].tolist()


def test_sampler_gives_the_batches_of_the_order() -> None:
    """A plain DataLoader with RowSampler and the same batch size yields the order's batches, a new order each epoch."""
    sampler = RowSampler(range(10), 4, seed=2)
    loader = DataLoader(range(10), batch_size=4, sampler=sampler)  # type: ignore[arg-type]

    epochs = [[batch.tolist() for batch in loader] for _ in range(2)]

    order = Order(10, 4, 2)
    assert epochs == [[order.batch(epoch, 4 * step)[0].tolist() for step in range(3)] for epoch in range(2)]
    assert epochs[0] != epochs[1]
    assert len(sampler) == 12


def test_sampler_resumes_where_its_state_was_taken() -> None:
    """The state counts rows drawn; another sampler goes on with the next one, and then with the next epoch."""
    sampler = RowSampler(range(20), 4, seed=3)
    sampler.set_epoch(5)
    draws = iter(sampler)
    head = [next(draws) for _ in range(7)]
    state = sampler.state_dict()
    resumed = RowSampler(range(20), 4, seed=99)

    resumed.load_state_dict(state)
    resumed.set_epoch(5)
    tail = list(resumed)[:13]

    assert (state["epoch"], state["position"]) == (5, 7)
    assert head + tail == permuted(3, 5, 20, np.arange(20)).tolist()
    assert list(resumed) == permuted(3, 6, 20, np.arange(20)).tolist()


def test_state_of_other_rows_is_refused() -> None:
    """A state of another number of rows, another order or of something else names what differs."""
    order = Order(10, 2)

    with pytest.raises(ValueError, match="n_rows 11, expected 10"):
        order.check_state(Order(11, 2).state(0, 0))
    with pytest.raises(ValueError, match="order 'sequential', expected 'shuffled'"):
        order.check_state(Order(10, 2, shuffle=False).state(0, 0))
    with pytest.raises(ValueError, match="lacks epoch"):
        order.check_state({"version": 1, "n_rows": 10})


def test_bad_arguments_are_refused() -> None:
    """Batch size, rank and world size say what they should be."""
    with pytest.raises(ValueError, match="batch_size is 0"):
        Order(10, 0)
    with pytest.raises(ValueError, match="rank is 2 and world_size 2"):
        Order(10, 1, rank=2, world_size=2)
    with pytest.raises(ValueError, match="give both, or neither"):
        ranks(1, None)


def test_ranks_come_from_torch_distributed(tmp_path: Path) -> None:
    """Rank and world size are those of the initialised process group, unless they are given."""
    assert ranks(None, None) == (0, 1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert ranks(None, None) == (0, 1)
        assert ranks(1, 3) == (1, 3)
    finally:
        torch.distributed.destroy_process_group()
