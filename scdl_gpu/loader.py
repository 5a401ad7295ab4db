"""GPUBatchLoader: shuffled training batches, assembled where they are needed.

Knows the order of batches and who is waiting for them; what assembles a batch is the backend's, where rows lie is
placement's. On the CPU whole batches are assembled ahead, one a thread: splitting each batch over the threads instead
would wake them all for 100 us of work.
"""

import itertools
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from scdl_gpu.archive.raw import RawArchive, open_raw
from scdl_gpu.assembly import Assembler, Output
from scdl_gpu.batch import Batch
from scdl_gpu.cuda_assembly import assembler_for
from scdl_gpu.device import Device
from scdl_gpu.obs import obs_columns
from scdl_gpu.order import Order, Place, ranks
from scdl_gpu.rows import ArchiveRows
from scdl_gpu.shards import Shards

logger = logging.getLogger(__name__)

Source = ArchiveRows | str | os.PathLike[str]
Step = tuple[NDArray[np.int64], NDArray[np.bool_], int]
Item = TypeVar("Item")
Made = TypeVar("Made")


class GPUBatchLoader(IterableDataset[Batch]):
    """Batches of rows of one or several archives, in an order that follows from (seed, epoch) alone.

    dataset: a SingleCellMemMapDataset, the path of an archive, or a list of either (equal genes; nothing is copied).
    batch_size: rows of a batch, for each rank. shuffle: None means True, unless a sampler is given.
    sampler: yields rows; batch_sampler: yields lists of rows, and excludes batch_size, drop_last and shuffle. Both are
        used as they are, without a split over ranks.
    device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N"; or a `scdl_gpu.device.Device` of one's own.
    output: "csr" or "dense"; dtype: torch dtype of the values (csr: as stored; dense: float32).
    var: genes to keep, names or numbers, in their order. normalize_total: scale each row to this sum over all genes;
        log1p: the logarithm of 1 + value, after it. All three need output="dense".
    obs: columns to carry, see `Batch`; `categories[name]` names the codes.
    drop_last: leave out the last, incomplete step; otherwise it wraps around and `is_padding` marks what repeats.
    rank, world_size: of torch.distributed where it is initialised.
    placement: "auto", "device", "pinned" or "host"; windows: False: all rows must be resident; memory_budget,
        host_budget: bytes or fractions of what is free. prefetch: batches made ahead, beyond one a thread.

    Iterating starts the epoch set by `set_epoch`, else the next one, 0 first. `len` is the number of batches of an epoch.
    Use it as it is, or through `DataLoader(loader, batch_size=None)`.
    """

    def __init__(
        self,
        dataset: Source | Sequence[Source],
        batch_size: int = 1024,
        *,
        shuffle: bool | None = None,
        sampler: Iterable[int] | None = None,
        batch_sampler: Iterable[Sequence[int]] | None = None,
        device: str | torch.device | Device = "auto",
        output: str = "csr",
        dtype: torch.dtype | None = None,
        var: Sequence[str | int] | None = None,
        normalize_total: float | None = None,
        log1p: bool = False,
        obs: Sequence[str] = (),
        drop_last: bool = False,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        placement: str = "auto",
        windows: bool | None = None,
        memory_budget: float | None = None,
        host_budget: float | None = None,
        prefetch: int = 2,
    ) -> None:
        _check_samplers(sampler, batch_sampler, batch_size=batch_size, shuffle=shuffle, drop_last=drop_last)
        self._shards = Shards(_archives(dataset))
        genes = None if var is None else self._shards.gene_numbers(var)
        self._output = Output.of(output, dtype, self._shards, genes, normalize_total, log1p=log1p)
        rank, world_size = ranks(rank, world_size)
        shuffle = sampler is None if shuffle is None else shuffle
        self._order = Order(self._shards.n_rows, batch_size, seed, rank, world_size, shuffle, drop_last)
        self._sampler, self._batch_sampler = sampler, batch_sampler
        self._obs = obs_columns(self._shards, obs)
        self._assembler: Assembler = assembler_for(
            self._shards,
            self._output,
            device=device,
            placement=placement,
            windows=windows,
            budgets=(memory_budget, host_budget),
            batch_size=batch_size,
        )
        self._labels = {name: torch.from_numpy(column.values).to(self._assembler.torch_device) for name, column in self._obs.items()}
        if prefetch < 0:
            raise ValueError(f"prefetch is {prefetch}, expected at least 0")
        self._prefetch = prefetch
        self._place = Place()
        self._worker_state = False

    @property
    def categories(self) -> dict[str, NDArray[Any]]:
        """What the codes of each coded obs column stand for: `categories[name][code]`."""
        return {name: column.categories for name, column in self._obs.items() if column.categories is not None}

    def __len__(self) -> int:
        if self._batch_sampler is not None:
            return _length(self._batch_sampler, "batch_sampler")
        if self._sampler is not None:
            n = _length(self._sampler, "sampler")
            return n // self._order.batch_size if self._order.drop_last else -(-n // self._order.batch_size)
        return self._order.steps()

    def __repr__(self) -> str:
        return (
            f"GPUBatchLoader({self._shards.n_rows:,} rows x {self._shards.n_vars:,} genes, {self._shards.nnz:,} nonzeros in "
            f"{len(self._shards.archives)} archives; batches of {self._order.batch_size} as {self._output}; {self._assembler})"
        )

    # Iterating

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration starts."""
        self._place.set_epoch(epoch)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of an epoch; in worker w of k of a DataLoader, batches w, w + k, ..."""
        worker = get_worker_info()
        if worker is not None and self._assembler.is_cuda:
            raise RuntimeError(
                "a loader on cuda cannot run in a DataLoader's worker process: iterate it directly, or use "
                "DataLoader(loader, batch_size=None, num_workers=0); it assembles ahead by itself"
            )
        first, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        resumed_in_worker, self._worker_state = self._worker_state, worker is not None
        epoch, start = self._place.begin()
        steps = self._steps(epoch, start, 0 if resumed_in_worker else first, stride)
        self._assembler.check()
        for batch, position in self._made(steps, alone=worker is not None):
            self._place.advance(position)
            yield batch
        self._assembler.check()
        self._place.finish()

    def _steps(self, epoch: int, start: int, first: int, stride: int) -> Iterator[Step]:
        """Give rows, padding marks and the position after each step that this iteration makes.

        start: rows that are consumed; first, stride: which of the steps left are this worker's. In a worker the position is
        where its own next step begins.
        """
        if self._batch_sampler is not None or self._sampler is not None:
            yield from self._sampled(start, first, stride)
            return
        order = self._order
        for step in range(first, order.steps(start), stride):
            position = start + step * order.step_rows
            rows, is_padding = order.batch(epoch, position)
            yield rows, is_padding, position + stride * order.step_rows

    def _sampled(self, start: int, first: int, stride: int) -> Iterator[Step]:
        """Give the batches of the samplers; `start` counts the batches of a batch_sampler or the rows of a sampler to skip."""
        if self._batch_sampler is not None:
            batches: Iterator[Sequence[int]] = iter(self._batch_sampler)
            size = 1
        else:
            size = self._order.batch_size
            batches = _grouped(iter(self._sampler or ()), size, drop_last=self._order.drop_last)
        for number, chosen in enumerate(itertools.islice(batches, start // size, None)):
            if number % stride == first:
                rows = np.asarray(chosen, np.int64)
                yield rows, np.zeros(rows.size, bool), start + (number + stride) * size

    def _made(self, steps: Iterator[Step], *, alone: bool) -> Iterator[tuple[Batch, int]]:
        """Make the batches of `steps`, ahead of who asks, in their order; `alone` in a worker process, which is ahead itself."""
        if alone:
            yield from (self._finish(*self._prepare(step)) for step in steps)
            return
        threads = self._assembler.threads
        with ThreadPoolExecutor(threads, thread_name_prefix="scdl-batch") as pool:
            for prepared in _ahead(pool, self._prepare, steps, threads + self._prefetch):
                yield self._finish(*prepared)

    def _prepare(self, step: Step) -> tuple[Any, int]:
        """Do what threads may do ahead: on the CPU the gather itself."""
        rows, is_padding, position = step
        return self._assembler.prepare(rows, is_padding), position

    def _finish(self, prepared: Any, position: int) -> tuple[Batch, int]:
        """Make the batch, on a GPU without a wait, and take the obs values of its rows."""
        made = self._assembler.make(prepared)
        obs = {name: self._labels[name][made.rows].to(column.dtype) for name, column in self._obs.items()}
        return Batch(made.x, made.rows, obs, made.is_padding), position

    # State and life

    def state_dict(self) -> dict[str, Any]:
        """Return where in which epoch this loader is: {version, seed, epoch, position, n_rows, order}.

        position: rows of the epoch in batches that were yielded, over all ranks (in a worker process: where its next batch
        begins). Under another world or batch size a loader continues exactly there.
        """
        state = self._order.state(self._place.epoch, self._place.position)
        return (
            state
            | {"order": self._order_name(), "position": self._place.position if self._is_sampled else state["position"]}
            | ({"in_worker": True} if self._worker_state else {})
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue, at the next iteration, where `state` was taken; its seed is taken over.

        Raises ValueError for a state of other rows or of another order.
        """
        if self._is_sampled != (state.get("order") == "sampler"):
            raise ValueError(
                f"the state has order {state.get('order')!r}, expected {self._order_name()!r}: it belongs to another loader; start anew"
            )
        if not self._is_sampled:
            self._order.check_state(state)
            self._order = self._order.with_seed(state["seed"])
        self._worker_state = bool(state.get("in_worker", False))
        self._place.resume(state["epoch"], state["position"])

    @property
    def _is_sampled(self) -> bool:
        return self._sampler is not None or self._batch_sampler is not None

    def _order_name(self) -> str:
        return "sampler" if self._is_sampled else "shuffled" if self._order.shuffle else "sequential"

    def close(self) -> None:
        """Give back the memory that holds the rows; harmless when repeated."""
        self._assembler.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _archives(dataset: Source | Sequence[Source]) -> list[RawArchive]:
    sources = dataset if isinstance(dataset, Sequence) and not isinstance(dataset, str) else [dataset]
    opened: dict[str, RawArchive] = {}
    archives = []
    for source in sources:
        if isinstance(source, ArchiveRows):
            archives.append(source.archive)
        elif isinstance(source, str | os.PathLike):
            path = os.path.realpath(source)
            archives.append(opened.setdefault(path, opened.get(path) or open_raw(Path(source))))
        else:
            raise TypeError(
                f"dataset is a {type(source).__name__}, expected a SingleCellMemMapDataset, the path of an archive, or a list of these"
            )
    return archives


def _check_samplers(sampler: Any, batch_sampler: Any, *, batch_size: int, shuffle: bool | None, drop_last: bool) -> None:
    if batch_sampler is not None and (sampler is not None or batch_size != 1024 or shuffle is not None or drop_last):
        raise ValueError("batch_sampler excludes sampler, batch_size, shuffle and drop_last: it decides all of them")
    if sampler is not None and shuffle:
        raise ValueError("sampler excludes shuffle=True: it decides the order")


def _length(sampler: Any, name: str) -> int:
    try:
        return len(sampler)
    except TypeError as error:
        raise TypeError(f"the {name} has no length, so the loader has none either") from error


def _grouped(rows: Iterator[int], size: int, *, drop_last: bool) -> Iterator[Sequence[int]]:
    while group := list(itertools.islice(rows, size)):
        if len(group) == size or not drop_last:
            yield group


def _ahead(pool: ThreadPoolExecutor, make: Callable[[Item], Made], items: Iterator[Item], depth: int) -> Iterator[Made]:
    """Make things in the pool's threads, `depth` at a time, and give them in order; what was begun is finished on leaving."""
    pending: deque[Future[Made]] = deque(pool.submit(make, item) for item in itertools.islice(items, depth))
    try:
        while pending:
            made = pending.popleft().result()
            pending.extend(pool.submit(make, item) for item in itertools.islice(items, 1))
            yield made
    finally:
        for future in pending:
            future.cancel()
