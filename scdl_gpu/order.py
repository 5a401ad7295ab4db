"""Which row comes when: a pure function of (seed, epoch) and the position, computed where it is needed.

Knows numbers of rows, ranks and steps, not data. The shuffled order is a keyed permutation (a Feistel network with
cycle walking; docs/order.md), so 100 M rows cost no array of 800 MB, any position is found in O(1), and every rank and
every resumed job computes the same. 7 to 12 ns a row (benchmarks/LOG.md, 2026-11-24): 1,024 rows of a batch in about
10 us, ahead of the batch.
"""

import os
from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler

from scdl_gpu.arguments import shown, truth, whole

ROUNDS = 8
"""Half-rounds of the network; with 4 a chi-square test of pairs of neighbours fails at 1,000 rows."""
LEAST_BITS = 10
"""Bits of the smallest network: one of 3 bits reaches few of the orders of 5 rows; a few rows walk longer instead."""
GOLDEN = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1
STATE_VERSION = 1


@lru_cache(maxsize=16)
def round_keys(seed: int, epoch: int) -> NDArray[np.uint32]:
    """Derive the ROUNDS keys of an epoch by splitmix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    state = (_mix((seed & MASK) + GOLDEN) ^ _mix((epoch & MASK) + 2 * GOLDEN)) & MASK
    return np.array([_mix(state + GOLDEN * (i + 1)) >> 32 for i in range(ROUNDS)], np.uint32)


def _mix(x: int) -> int:
    x &= MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def mixed(seed: int, epoch: int) -> int:
    """Return a seed of 64 bits for an epoch, for generators of others."""
    first, second = (int(key) for key in round_keys(seed, epoch)[:2])
    return first << 32 | second


def permuted(seed: int, epoch: int, n_rows: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the rows at `positions`, (k,) int64 each 0 <= position < n_rows, of the shuffled order of an epoch."""
    from scdl_gpu.kernels import permute

    rows = np.empty(positions.size, np.int64)
    permute.permute(positions, n_rows, max(LEAST_BITS, (n_rows - 1).bit_length()), round_keys(seed, epoch), rows)
    return rows


class State(NamedTuple):
    """What a state says, in plain numbers. worker: as of `Place`."""

    seed: int
    epoch: int
    position: int
    worker: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class Order:
    """The batches of one rank: step s of an epoch covers positions [s·B·W, (s+1)·B·W), rank r takes every W-th from r.

    The last step wraps to the epoch's start, so that all ranks yield equally many batches of equal length; drop_last leaves it out.
    """

    n_rows: int
    batch_size: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    shuffle: bool = True
    drop_last: bool = False

    def __post_init__(self) -> None:
        for name, least in (("n_rows", 0), ("batch_size", 1), ("seed", None)):
            object.__setattr__(self, name, whole(name, getattr(self, name), least))
        for name in ("shuffle", "drop_last"):
            object.__setattr__(self, name, truth(name, getattr(self, name)))
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank is {self.rank} and world_size {self.world_size}, expected 0 <= rank < world_size")

    @property
    def step_rows(self) -> int:
        """Rows that one step consumes, over all ranks."""
        return self.batch_size * self.world_size

    def steps(self, position: int = 0) -> int:
        """Count the steps left when `position` rows of the epoch are consumed."""
        left = max(0, self.n_rows - position)
        return left // self.step_rows if self.drop_last else -(-left // self.step_rows)

    def batch(self, epoch: int, position: int, count: int = 1) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return this rank's rows of the step that begins at `position`, (batch_size,) int64, and which of them are padding.

        count: steps, whose batches are to follow each other in what is returned.
        """
        positions = position + self.rank + self.world_size * np.arange(count * self.batch_size, dtype=np.int64)
        is_padding = positions >= self.n_rows
        positions %= self.n_rows
        rows = permuted(self.seed, epoch, self.n_rows, positions) if self.shuffle else positions
        return rows, is_padding

    @property
    def name(self) -> str:
        """What a state calls this order."""
        return "shuffled" if self.shuffle else "sequential"

    def with_seed(self, seed: int) -> "Order":
        """Return the same order under another seed."""
        return replace(self, seed=seed)

    def state(self, epoch: int, position: int) -> dict[str, Any]:
        """Describe a place in an epoch: `position` rows consumed, over all ranks. It holds for any world and batch size."""
        return {
            "version": STATE_VERSION,
            "seed": self.seed,
            "epoch": epoch,
            "position": min(position, self.n_rows),
            "n_rows": self.n_rows,
            "order": self.name,
        }

    def check_state(self, state: Mapping[str, Any], sampled: tuple[str, int | None] | None = None) -> State:
        """Return what `state` says. Raises ValueError unless it was taken from an order of the same rows, and stands within them.

        sampled: name and length of the order, where it is not this one; None: nobody knows the length.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"the state is {shown(state)}, expected what state_dict() of a loader or sampler returned")
        name, most = sampled or (self.name, self.n_rows)
        expected = {"version": STATE_VERSION, "n_rows": self.n_rows, "order": name}
        missing = sorted({*expected, "seed", "epoch", "position"} - set(state))
        if missing:
            raise ValueError(f"the state lacks {', '.join(missing)}; load what state_dict() of a loader or sampler returned")
        for key, value in expected.items():
            if state[key] != value:
                raise ValueError(
                    f"the state has {key} {state[key]!r}, expected {value!r}: it belongs to another dataset or order; start anew"
                )
        position = _state_number(state, "position", 0)
        if most is not None and position > most:
            raise ValueError(f"the state's position is {position}, expected 0..{most}: it belongs to another sampler or order; start anew")
        return State(_state_number(state, "seed"), _state_number(state, "epoch", 0), position, _state_worker(state.get("worker")))


def _state_number(state: Mapping[str, Any], key: str, least: int | None = None) -> int:
    try:
        return whole(f"the state's {key}", state[key], least)
    except TypeError as error:
        raise ValueError(str(error)) from error


def _state_worker(worker: Any) -> tuple[int, int] | None:
    if worker is None:
        return None
    try:
        number, count = (whole("worker", part) for part in worker)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the state's worker is {shown(worker)}, expected its number and of how many") from error
    if not 0 <= number < count:
        raise ValueError(f"the state's worker is {shown(worker)}, expected its number and of how many, 0 <= number < how many")
    return number, count


def ranks(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Return rank and world size: as given, else torch.distributed's where it is initialised, else 0 of 1."""
    if (rank is None) != (world_size is None):
        raise ValueError(f"rank is {rank} and world_size {world_size}; give both, or neither")
    if rank is not None and world_size is not None:
        return whole("rank", rank), whole("world_size", world_size, 1)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


@dataclass(slots=True)
class Place:
    """Where an iteration is: `position` rows of `epoch` are consumed; the next one starts `_next`, or resumes.

    worker: the number of the worker process, and of how many, whose place it is; None where it is everybody's. Of several
    iterations under way the last begun counts, and none after a place was loaded.
    """

    epoch: int = 0
    position: int = 0
    worker: tuple[int, int] | None = None
    _next: int = 0
    _resumed: bool = False
    _begun: int = 0
    _running: int | None = None

    def set_epoch(self, epoch: int) -> None:
        """Start `epoch` next, from its beginning; within the epoch that was resumed, or is running, nothing changes."""
        epoch = whole("epoch", epoch, 0)
        if self._resumed and epoch == self.epoch:
            return
        self._next, self._resumed = epoch, False
        if self._running is None:
            self.epoch, self.position, self.worker = epoch, 0, None

    def begin(self, worker: tuple[int, int] | None = None) -> tuple[int, int, int]:
        """Begin an iteration; returns its epoch, the position it starts at, and its number.

        Raises ValueError where the place that was loaded is another worker's.
        """
        if not self._resumed:
            self.epoch, self.position, self.worker = self._next, 0, None
        elif self.worker not in (None, worker):
            raise ValueError(f"the state was taken in worker {self.worker}, this is {worker} (number, of how many); load its own")
        self._resumed = False
        self._next = self.epoch + 1
        self._begun += 1
        self._running = self._begun
        return self.epoch, self.position, self._begun

    def advance(self, number: int, position: int, worker: tuple[int, int] | None = None) -> None:
        """Count rows of the epoch that iteration `number` yielded."""
        if number == self._running:
            self.position, self.worker = position, worker

    def resume(self, epoch: int, position: int, worker: tuple[int, int] | None = None) -> None:
        """Let the next iteration begin at `position` of `epoch`."""
        self.epoch, self.position, self.worker, self._next = epoch, position, worker, epoch
        self._resumed, self._running = True, None

    def finish(self, number: int) -> None:
        """End the epoch of iteration `number`: its end is the beginning of the next."""
        if number == self._running:
            self.epoch, self.position, self.worker, self._running = self._next, 0, None, None

    def leave(self, number: int) -> None:
        """Leave an iteration, finished or not: the place stays, for a state, until another epoch is chosen or begun."""
        if number == self._running:
            self._running = None


class RowSampler(Sampler[int]):
    """Rows of a dataset in the order of GPUBatchLoader, for a plain DataLoader of the same batch_size.

    `DataLoader(dataset, batch_size=B, sampler=RowSampler(dataset, B, seed=0))` gives the batches that GPUBatchLoader gives,
    rank by rank. Iterating starts the epoch set by `set_epoch`, else the next one. The position in `state_dict` counts rows
    that were drawn; a DataLoader with workers draws ahead of what it yields.
    """

    def __init__(
        self,
        dataset: Sized,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> None:
        if isinstance(dataset, str | bytes | os.PathLike) or not hasattr(type(dataset), "__len__"):
            raise TypeError(f"dataset is {shown(dataset)}, expected a dataset, which has a length: SingleCellMemMapDataset(path)")
        rank, world_size = ranks(rank, world_size)
        self._order = Order(len(dataset), batch_size, seed, rank, world_size, shuffle, drop_last)
        self._place = Place()

    def __len__(self) -> int:
        return self._order.steps() * self._order.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration starts."""
        self._place.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        """Yield this rank's rows of an epoch, from where the loaded state was taken."""
        epoch, start, number = self._place.begin()
        order = self._order
        try:
            for step in range(order.steps(start)):
                position = start + step * order.step_rows
                for drawn, row in enumerate(order.batch(epoch, position)[0].tolist(), 1):
                    self._place.advance(number, position + drawn * order.world_size)
                    yield row
            self._place.finish(number)
        finally:
            self._place.leave(number)

    def state_dict(self) -> dict[str, Any]:
        """Return where in which epoch this sampler is."""
        return self._order.state(self._place.epoch, self._place.position)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue, at the next iteration, where `state` was taken; its seed is taken over. Raises ValueError for another order."""
        loaded = self._order.check_state(state)
        self._order = self._order.with_seed(loaded.seed)
        self._place.resume(loaded.epoch, loaded.position, loaded.worker)
