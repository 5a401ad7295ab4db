"""Batches of row numbers as a sampler gives them, in place of the order of the seed.

Knows somebody else's sampler, not what it samples: it is neither shuffled nor split over ranks. In worker processes every
worker draws all of it and leaves out what is the others'; that costs the drawing, and asks for the same random numbers in
each of them.
"""

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scdl_gpu.arguments import shown

Step = tuple[NDArray[np.int64], NDArray[np.bool_], int]
"""Rows of a batch, which of them are padding, and the position after it."""


class SampledOrder:
    """Batches from a sampler, which yields rows, or from a batch_sampler, which yields lists of rows.

    A position counts rows of a sampler, batches of a batch_sampler; it holds where the sampler gives the same sequence again.
    """

    def __init__(
        self, sampler: Iterable[int] | None, batch_sampler: Iterable[Sequence[int]] | None, *, batch_size: int, drop_last: bool
    ) -> None:
        self.name = "sampler" if batch_sampler is None else "batch_sampler"
        given = sampler if batch_sampler is None else batch_sampler
        if not hasattr(type(given), "__iter__") and not hasattr(type(given), "__getitem__"):
            kind = "rows" if batch_sampler is None else "lists of rows"
            raise TypeError(f"{self.name} is {shown(given)}, expected something that yields {kind}")
        self._sampler, self._batch_sampler = sampler, batch_sampler
        self._batch_size, self._drop_last = batch_size, drop_last

    @property
    def length(self) -> int | None:
        """Where an epoch ends, as a position: the length of the sampler, None where it has none."""
        try:
            return len(self._sampler if self._batch_sampler is None else self._batch_sampler)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):
            return None

    def __len__(self) -> int:
        n = self.length
        if n is None:
            raise TypeError(f"the {self.name} has no length, so the loader has none either")
        if self._batch_sampler is not None:
            return n
        return n // self._batch_size if self._drop_last else -(-n // self._batch_size)

    def steps(self, position: int, first: int, stride: int, *, seed: int | None = None) -> Iterator[Step]:
        """Give every stride-th batch from `first` on, of those after `position`.

        seed: of the random numbers that samplers take from torch, NumPy and Python while they are drawn from; None leaves them.
        """
        size = 1 if self._batch_sampler is not None else self._batch_size
        last = self.length
        batches = self._batches(position)
        if seed is not None:
            batches = _drawn_alike(batches, seed)
        for number, chosen in enumerate(batches):
            if number % stride == first:
                rows = _rows(chosen)
                end = position + number * size + (1 if self._batch_sampler is not None else rows.size)
                after = position + (number + stride) * size
                yield rows, np.zeros(rows.size, bool), after if last is None else max(end, min(after, last))

    def _batches(self, position: int) -> Iterator[Sequence[int]]:
        """Draw, lazily, what follows `position`: of a sampler to the row, whatever the size of the batches before it was."""
        if self._batch_sampler is not None:
            yield from itertools.islice(self._batch_sampler, position, None)
            return
        rows = itertools.islice(() if self._sampler is None else self._sampler, position, None)
        while group := list(itertools.islice(rows, self._batch_size)):
            if len(group) == self._batch_size or not self._drop_last:
                yield group


def _rows(chosen: Sequence[int]) -> NDArray[np.int64]:
    """Return row numbers as an array of their own. Raises TypeError for anything but whole numbers in a row."""
    rows = np.asarray(chosen)
    if rows.ndim != 1 or (rows.size and rows.dtype.kind not in "iu"):
        raise TypeError(f"a sampler gave {str(chosen)[:80]}, expected a list of row numbers")
    return rows.astype(np.int64)


def _drawn_alike(batches: Iterator[Sequence[int]], seed: int) -> Iterator[Sequence[int]]:
    """Draw with random numbers that follow from `seed` alone, so that all workers see the same batches, and give back their own."""
    generator = torch.Generator().manual_seed(seed).get_state()
    alike = (generator, np.random.RandomState(seed % 2**32).get_state(), random.Random(seed).getstate())
    while True:
        own = _random_state()
        _set_random_state(alike)
        try:
            batch = next(batches, None)
        finally:
            alike = _random_state()
            _set_random_state(own)
        if batch is None:
            return
        yield batch


def _random_state() -> tuple[Any, Any, Any]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002


def _set_random_state(state: tuple[Any, Any, Any]) -> None:
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])  # noqa: NPY002
    random.setstate(state[2])
