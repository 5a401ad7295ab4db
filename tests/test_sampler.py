"""Batches come as a sampler gives them, whatever it is, alike in every worker; what is no row is refused."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, RandomSampler, WeightedRandomSampler

from scdl_gpu.sampler import SampledOrder


def order(sampler: Any = None, batch_sampler: Any = None, batch_size: int = 3, *, drop_last: bool = False) -> SampledOrder:
    """Make one of batches of three."""
    return SampledOrder(sampler, batch_sampler, batch_size=batch_size, drop_last=drop_last)


def rows_of(order: SampledOrder, position: int = 0, first: int = 0, stride: int = 1, **options: Any) -> list[list[int]]:
    """List the rows of each batch."""
    return [rows.tolist() for rows, _, _ in order.steps(position, first, stride, **options)]


class Dice:
    """A sampler that draws each row from one of the global generators, as it is asked."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __iter__(self) -> Iterator[int]:
        """Yield ten rows."""
        for _ in range(10):
            if self.kind == "torch":
                yield int(torch.randint(1000, (1,)))
            elif self.kind == "numpy":
                yield int(np.random.randint(1000))
            else:
                yield random.randrange(1000)


def test_rows_are_grouped() -> None:
    """A sampler's rows come batch_size at a time; the last batch is what is left, or left out; nothing is padding."""
    whole, dropped = order(range(8)), order(range(8), drop_last=True)

    steps = list(whole.steps(0, 0, 1))

    assert [rows.tolist() for rows, _, _ in steps] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert [position for _, _, position in steps] == [3, 6, 8]
    assert [is_padding.tolist() for _, is_padding, _ in steps] == [[False] * 3, [False] * 3, [False] * 2]
    assert rows_of(dropped) == [[0, 1, 2], [3, 4, 5]]
    assert (len(whole), len(dropped)) == (3, 2)


def test_lists_are_taken_as_they_are() -> None:
    """A batch_sampler's lists may have any length; its positions count lists."""
    lists = [[5], [1, 1, 1, 1], [], [9, 2]]
    found = order(batch_sampler=lists)

    assert rows_of(found) == lists
    assert [position for _, _, position in found.steps(0, 0, 1)] == [1, 2, 3, 4]
    assert len(found) == 4
    assert len(order(batch_sampler=BatchSampler(range(7), 3, drop_last=True))) == 2


@pytest.mark.parametrize(
    "chosen", [(4, 2), np.array([4, 2], np.uint8), torch.tensor([4, 2]), [torch.tensor(4), torch.tensor(2)], range(4, 0, -2)]
)
def test_rows_of_any_kind(chosen: Any) -> None:
    """Lists, tuples, arrays and tensors of whole numbers are rows, of the batch's own."""
    ((rows, _, _),) = order(batch_sampler=[chosen]).steps(0, 0, 1)

    rows[0] += 1

    assert rows.tolist() == [5, 2]
    assert int(chosen[0]) == 4


@pytest.mark.parametrize("chosen", [[1.5], ["a"], 3, [[1, 2]], [True, False], [None]], ids=str)
def test_what_is_no_row_is_refused(chosen: Any) -> None:
    """Fractions, masks and nested lists raise TypeError that shows what was given, instead of being cut to something."""
    with pytest.raises(TypeError, match="expected a list of row numbers"):
        rows_of(order(batch_sampler=[chosen]))


def test_a_sampler_that_has_no_length() -> None:
    """One without a length is iterated all the same; the length itself is refused, naming it."""
    endless = order(iter(range(4)))

    assert rows_of(endless) == [[0, 1, 2], [3]]
    with pytest.raises(TypeError, match="the sampler has no length"):
        len(endless)
    with pytest.raises(TypeError, match="the batch_sampler has no length"):
        len(order(batch_sampler=iter([[1]])))


def test_a_position_skips_what_was_consumed() -> None:
    """Resuming at the position after a batch gives the batches that follow it, for workers too."""
    found = order(range(20))
    for k, (_, _, position) in enumerate(found.steps(0, 0, 1)):
        assert rows_of(found, position) == rows_of(found)[k + 1 :]
    for worker in range(3):
        own = rows_of(found, 0, worker, 3)
        for k, (_, _, position) in enumerate(found.steps(0, worker, 3)):
            assert rows_of(found, position, 0, 3) == own[k + 1 :]


@pytest.mark.parametrize("position", [0, 1, 10, 16, 19, 20, 24])
def test_a_position_holds_for_another_batch_size(position: int) -> None:
    """A sampler continues at the very row, though earlier batches were of another size; lists are counted, not rows."""
    steps = list(order(range(20), batch_size=8).steps(position, 0, 1))

    assert [row for rows, _, _ in steps for row in rows.tolist()] == list(range(20))[position:]
    assert [after for _, _, after in steps] == [min(position + 8 * (k + 1), 20) for k in range(len(steps))]
    assert rows_of(order(batch_sampler=[[1], [2, 3], [4]], batch_size=8), 2) == [[4]]


@pytest.mark.parametrize("sampler", [torch.arange(5), np.arange(5), (0, 1, 2, 3, 4)], ids=["tensor", "array", "tuple"])
def test_a_sampler_of_any_kind(sampler: Any) -> None:
    """Whatever can be iterated is a sampler, also where its truth is ambiguous."""
    assert rows_of(order(sampler)) == [[0, 1, 2], [3, 4]]


@pytest.mark.parametrize(
    "sampler",
    [RandomSampler(range(10)), WeightedRandomSampler([1.0] * 10, 10), Dice("torch"), Dice("numpy"), Dice("python")],
    ids=["random", "weighted", "torch", "numpy", "python"],
)
def test_workers_draw_alike(sampler: Any) -> None:
    """With a common seed each worker draws the same rows, whatever else it draws meanwhile, whose numbers go on undisturbed."""
    found = order(sampler, batch_size=2)
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    undisturbed = [(float(torch.rand(1)), np.random.random(), random.random()) for _ in range(6)]
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)

    whole = rows_of(found, seed=77)
    shares, meanwhile = [], []
    for worker in range(2):
        for rows, _, _ in found.steps(0, worker, 2, seed=77):
            shares.append((worker, rows.tolist()))
            meanwhile.append((float(torch.rand(1)), np.random.random(), random.random()))

    assert [rows for worker, rows in shares if worker == 0] == whole[::2]
    assert [rows for worker, rows in shares if worker == 1] == whole[1::2]
    assert meanwhile == undisturbed[:5]
    assert rows_of(found, seed=78) != whole
