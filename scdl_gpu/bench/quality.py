"""How well batches are shuffled, and whether their rows are true.

Knows fingerprints of rows and labels, not loaders. Two figures, since either alone is fooled: the entropy of the plate in a batch sees
long runs of one plate, and not that neighbours stay together; near pairs see that, and not what is offline-shuffled once and for all.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

NEAR = 50
"""Rows of the source that lie so far apart, or less, are neighbours."""


@dataclass(frozen=True, slots=True)
class Quality:
    """Of some batches: rows seen, rows that the source has not, and how they are shuffled.

    entropy: mean bits of the plate in a batch; perfect_entropy: that of batches drawn at random. near_pairs: how many times more often
    than by chance two cells of a batch are neighbours in the source; None where chance would give less than ten in all.
    """

    rows: int
    strange: int
    entropy: float
    perfect_entropy: float
    near_pairs: float | None


class Table:
    """The rows of the source by fingerprint. Rows that are equal cannot be told apart, and the first stands for all."""

    def __init__(self, fingerprints: NDArray[np.uint64], labels: NDArray[Any]) -> None:
        self._order = np.argsort(fingerprints, kind="stable")
        self._sorted, self._labels = fingerprints[self._order], labels

    def rows(self, fingerprints: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Find rows; -1 where the source has none such."""
        place = np.minimum(np.searchsorted(self._sorted, fingerprints), self._sorted.size - 1)
        return np.where(self._sorted[place] == fingerprints, self._order[place], -1)

    def judge(self, shown: Sequence[str]) -> Quality:
        """Judge batches by the fingerprints of their rows, uint64 in base64."""
        batches = [self.rows(np.frombuffer(base64.b64decode(batch), np.uint64)) for batch in shown]
        true = [rows[rows >= 0] for rows in batches]
        size = max((rows.size for rows in batches), default=0)
        return Quality(
            rows=sum(rows.size for rows in batches),
            strange=sum(int((rows < 0).sum()) for rows in batches),
            entropy=_mean([entropy(self._labels[rows]) for rows in true]),
            perfect_entropy=self._perfect(size),
            near_pairs=near_pairs(true, self._sorted.size),
        )

    def _perfect(self, size: int, draws: int = 200) -> float:
        random = np.random.default_rng(0)
        return _mean([entropy(self._labels[random.integers(0, self._labels.size, size)]) for _ in range(draws if size else 0)])


def entropy(labels: NDArray[Any]) -> float:
    """Give Shannon's entropy of some labels, in bits."""
    _, counts = np.unique(labels, return_counts=True)
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum())


def near_pairs(batches: Sequence[NDArray[np.int64]], n_rows: int) -> float | None:
    """Give the pairs of near rows within batches, over what chance would give."""
    near, expected = 0, 0.0
    reach = min(NEAR, n_rows - 1)
    chance = reach * (2 * n_rows - reach - 1) / (n_rows * (n_rows - 1)) if n_rows > 1 else 0.0
    for rows in batches:
        ascending = np.sort(rows)
        near += int((np.searchsorted(ascending, ascending + NEAR, side="right") - np.arange(rows.size) - 1).sum())
        expected += rows.size * (rows.size - 1) / 2 * chance
    return near / expected if expected >= 10 else None


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0
