"""GPUBatchLoader: shuffled training batches, assembled where they are needed.

Knows the order of batches and who is waiting for them; what assembles a batch is the backend's, where rows lie is
placement's. On the CPU whole batches are assembled ahead, in other threads: splitting each batch over the threads instead
would wake them all for 100 us of work. Of small batches a run is assembled as one, and cut: otherwise what Python and the
threads do for each would take as long as the kernel.
"""

import os
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from scdl_gpu.archive.mirror import open_remote
from scdl_gpu.archive.packed import open_archive
from scdl_gpu.archive.parts import Archive
from scdl_gpu.arguments import whole
from scdl_gpu.assembly import Assembler, CpuAssembler, Output, Wanted
from scdl_gpu.batch import Batch
from scdl_gpu.cuda_assembly import STAYS, assembler_for
from scdl_gpu.device import Device
from scdl_gpu.errors import ArchiveError
from scdl_gpu.obs import Obs
from scdl_gpu.order import Order, Place, mixed, ranks
from scdl_gpu.rows import ArchiveRows
from scdl_gpu.runs import RUN_BYTES, Run, ahead, joined
from scdl_gpu.sampler import SampledOrder
from scdl_gpu.shards import Shards
from scdl_gpu.transport import is_url
from scdl_gpu.windows import STAYS as WINDOWS_STAY
from scdl_gpu.windows import Stream, Streaming, Windows

Source = ArchiveRows | str | os.PathLike[str]


class GPUBatchLoader(IterableDataset[Batch]):
    """Batches of rows of one or several archives, in an order that follows from (seed, epoch) alone.

    dataset: a SingleCellMemMapDataset, the path or the URL of an archive, or a list of these (equal genes; nothing is copied, but of
        an archive behind a URL all but its rows: see docs/remote.md).
    batch_size: rows of a batch, for each rank. shuffle: None means True, unless a sampler is given.
    sampler: yields rows; batch_sampler: yields lists of rows, and excludes batch_size, drop_last and shuffle. Both are
        used as they are, without a split over ranks; on the CPU they are drawn from at most 16 batches ahead for each thread,
        32 and `prefetch` more. What they gave before an error of theirs is yielded first.
    device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:N" or N; or a `scdl_gpu.device.Device` of one's own.
    output: "csr" or "dense"; dtype: torch dtype of the values (csr: as stored; dense: float32).
    var: genes to keep, names or numbers, in their order. normalize_total: scale each row to this sum over all genes;
        log1p: the logarithm of 1 + value, after it. All three need output="dense".
    gene_order: "stored" leaves rows of packed archives in the order in which they lie there, which is faster; it must be the
        same for all of them. `var_order` tells which gene a column of a batch is.
    obs: columns to carry, see `Batch`; `categories[name]` names the codes.
    drop_last: leave out the last, incomplete step; otherwise it wraps around and `is_padding` marks what repeats.
    rank, world_size: of torch.distributed where it is initialised.
    placement: "auto", "device", "node", "pinned" or "host"; "node" divides the rows over the devices of the ranks on this node,
        which all make it at the same point, and close it. memory_budget, host_budget: bytes (int) or fractions of what is free (float).
    windows: True streams rows through two windows, see `streaming`; False: all rows must be resident; None streams what fits
        nowhere, on one rank only.
    prefetch: batches made ahead beyond what each thread makes: one batch, or on the CPU as many small ones as 8 MiB hold together.

    Iterating starts the epoch set by `set_epoch`, else the next one, 0 first. `len` is the number of batches of an epoch.
    Use it as it is, or through `DataLoader(loader, batch_size=None)`. Worker processes get a copy at the start of each
    epoch and do not count epochs for this process: with num_workers call `set_epoch` before each. Persistent workers keep their
    copy, which goes on with the next epoch by itself: set_epoch does not reach them.
    """

    def __init__(
        self,
        dataset: Source | Sequence[Source],
        batch_size: int = 1024,
        *,
        shuffle: bool | None = None,
        sampler: Iterable[int] | None = None,
        batch_sampler: Iterable[Sequence[int]] | None = None,
        device: str | int | torch.device | Device = "auto",
        output: str = "csr",
        dtype: torch.dtype | None = None,
        var: Sequence[str | int] | None = None,
        gene_order: str = "var",
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
        _check_samplers(sampler, batch_sampler, batch_size=batch_size, shuffle=shuffle, drop_last=drop_last, ranks=(rank, world_size))
        self._prefetch = whole("prefetch", prefetch, 0)
        self._shards = Shards(_archives(dataset), gene_order=gene_order)
        self._genes = None if var is None else self._shards.gene_numbers(var)
        self._output = Output.of(output, dtype, self._shards, self._genes, normalize_total, log1p=log1p)
        is_sampled = sampler is not None or batch_sampler is not None
        shuffle = not is_sampled if shuffle is None else shuffle
        batch_size = whole("batch_size", getattr(batch_sampler, "batch_size", None) or batch_size, 1)
        self._order = Order(self._shards.n_rows, batch_size, seed, *ranks(rank, world_size), shuffle, drop_last)
        self._sampled = SampledOrder(sampler, batch_sampler, batch_size=batch_size, drop_last=drop_last) if is_sampled else None
        self._obs = Obs(self._shards, obs)
        self._place, self._is_closed = Place(), False
        self._assembler, self._windows = assembler_for(
            self._shards,
            self._output,
            device=device,
            placement=placement,
            windows=windows,
            budgets=(memory_budget, host_budget),
            order=self._order,
            may_stream=not is_sampled,
            is_divided=rank is None and world_size is None and not is_sampled,
        )
        if self._assembler.is_cuda or self._windows is not None:
            weakref.finalize(self, _close_here, self._windows, self._assembler, os.getpid())
        self._take_windows(is_asked=windows is True)

    def _take_windows(self, *, is_asked: bool) -> None:
        """Order the windows. Raises ValueError where other ranks may not stream: each chose by what is free to it; rows would be missed."""
        if self._windows is None:
            return
        if self._order.world_size > 1 and not is_asked:
            self.close()
            raise ValueError(
                f"the rows fit into no memory of rank {self._order.rank}, and would stream; ranks must all stream, or none: "
                f"give windows=True on every one of them"
            )
        self._window_order = self._windows.order(self._order)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows of the dataset, and columns of a batch."""
        return self._shards.n_rows, self._output.width

    @property
    def device(self) -> torch.device:
        """Where batches lie."""
        return self._assembler.torch_device

    @property
    def categories(self) -> dict[str, NDArray[Any]]:
        """What the codes of each coded obs column stand for: `categories[name][code]`."""
        return self._obs.categories

    @property
    def var_order(self) -> NDArray[np.int64]:
        """The number in var of each column of a batch: as `var` asks for, or all, in the order of `gene_order`."""
        return self._shards.numbers if self._genes is None else self._genes

    @property
    def streaming(self) -> Streaming | None:
        """What was read so far, how, and how long this process waited for batches; None where all rows are resident."""
        return None if self._windows is None else self._windows.report

    def __len__(self) -> int:
        return self._order.steps() if self._sampled is None else len(self._sampled)

    def __getitem__(self, index: object) -> NoReturn:
        raise TypeError("a GPUBatchLoader is iterated, not indexed: next(iter(loader)) is a batch; SingleCellMemMapDataset.rows gives rows")

    def __repr__(self) -> str:
        shards, batches = self._shards, f"batches of {f'a {self._sampled.name}' if self._sampled else self._order.batch_size}"
        order = "" if shards.gene_order == "var" else f" in {shards.gene_order} order"
        archives = f"{shards.listed.size:,} archive{'s' if shards.listed.size > 1 else ''}"
        return (
            f"GPUBatchLoader({shards.n_rows:,} rows x {shards.n_vars:,} genes, {shards.nnz:,} nonzeros in {archives}; "
            f"{batches} as {self._output}{order}; {self._assembler}{'' if self._windows is None else f'; {self._windows!r}'}"
            f"{'; closed' if self._is_closed else ''})"
        )

    # Iterating

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration starts."""
        self._place.set_epoch(epoch)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of an epoch; in worker w of k of a DataLoader, batches w, w + k, ..."""
        self._raise_closed()
        worker = get_worker_info()
        if worker is not None and (self._assembler.is_cuda or self._windows is not None):
            raise RuntimeError(STAYS if self._windows is None else WINDOWS_STAY)
        worker_of = None if worker is None else (worker.id, worker.num_workers)
        epoch, start, number = self._place.begin(worker_of)
        first, stride = worker_of or (0, 1)
        if self._place.worker is not None:  # the place is where this worker's own next batch begins
            first = 0
        seed = None if worker is None else mixed(worker.seed - worker.id, epoch)
        with ExitStack() as left:
            left.callback(self._place.leave, number)
            self._assembler.check()
            stream = None
            if self._windows is not None:
                stream = left.enter_context(closing(self._windows.stream(self._window_order.left(epoch, start))))
            runs = self._runs(epoch, start, first, stride, seed=seed) if stream is None else self._window_runs(epoch, start, stream)
            batches = left.enter_context(closing(self._made(runs, stream, alone=worker is not None)))
            for batch, position in batches:
                self._place.advance(number, position, worker_of)
                yield batch
            self._assembler.check()
            self._place.finish(number)

    def _window_runs(self, epoch: int, start: int, stream: Stream) -> Iterator[Run]:
        """Give the batches of windows, in runs as `_runs` does; none needs two windows."""
        order, size = self._order, self._order.batch_size
        length = max(1, self._run_rows() // size)
        for number, window in enumerate(stream.todo):
            for step in range(max(window.step, -(-start // order.step_rows)), window.step + window.n_steps, length):
                count = min(length, window.step + window.n_steps - step)
                numbers, rows, is_padding = self._window_order.draw(window, epoch, step, count)
                positions = [(step + k + 1) * order.step_rows for k in range(count)]
                is_last = step + count == window.step + window.n_steps
                yield Run(rows, is_padding, [size] * count, positions, number, numbers, is_last)

    def _runs(self, epoch: int, start: int, first: int, stride: int, *, seed: int | None) -> Iterator[Run]:
        """Give the batches that this iteration makes, in runs of those that are made as one.

        start: rows that are consumed; first, stride: which of the steps left are this worker's. In a worker the position is
        where its own next step begins. seed: what all workers have in common.
        """
        if self._sampled is not None:
            yield from joined(self._sampled.steps(start, first, stride, seed=seed), self._run_rows(stride))
            return
        order = self._order
        n_steps, size = order.steps(start), order.batch_size
        length = max(1, self._run_rows(stride) // size)
        for step in range(first, n_steps, length * stride):
            position, count = start + step * order.step_rows, min(length, n_steps - step)
            positions = [position + (k + 1) * stride * order.step_rows for k in range(count)]
            yield Run(*order.batch(epoch, position, count), [size] * count, positions)

    def _run_rows(self, stride: int = 1) -> int:
        """How many rows are made as one, where batches follow each other: one, where they do not."""
        is_one = stride > 1 or self._assembler.is_cuda
        return 1 if is_one else max(1, RUN_BYTES // self._output.row_bytes(self._shards))

    def _made(self, runs: Iterator[Run], stream: Stream | None, *, alone: bool) -> Generator[tuple[Batch, int], None, None]:
        """Make the batches of `runs`, ahead of who asks, in their order; `alone` in a worker process, which is ahead itself."""
        if alone:
            for run in runs:
                yield from map(self._finish, self._prepare(run), run.positions)
            return
        threads, prepare = self._assembler.threads, partial(self._prepare, stream=stream)
        with ThreadPoolExecutor(threads, thread_name_prefix="scdl-batch") as pool, ExitStack() as left:
            if stream is not None:
                left.callback(stream.cancel)  # else a thread might wait for a window, and the pool for the thread
            for run, future in ahead(pool, prepare, runs, threads, self._prefetch, waited=self._waited):
                self._raise_closed()  # a thread that was late finds the memory gone, which is no error of its own
                if stream is not None:
                    stream.reached(run.window)
                if future.exception() is None:
                    prepared = future.result()
                    for position in run.positions:
                        is_over = run.is_last and len(prepared) == 1  # of a window
                        done = partial(stream.reached, run.window + 1) if stream is not None and is_over else None
                        yield self._finish(prepared.popleft(), position, done)  # not kept here, so that its memory is used again
                else:  # once more, one by one, so that the error comes after the batches before it
                    for part in run.parts():
                        yield self._finish(prepare(part)[0], part.positions[0])

    def _waited(self, seconds: float) -> None:
        if self._windows is not None:
            self._windows.report.seconds_waited += seconds

    def _prepare(self, run: Run, stream: Stream | None = None) -> deque[Any]:
        """Do what threads may do ahead: on the CPU the gather itself. Waits for the window, where rows stream."""
        window = None if stream is None else stream.window(run.window).result()
        wanted = Wanted(run.rows, run.is_padding, self._obs.of(run.rows), window, run.numbers)
        if len(run.sizes) == 1 or not isinstance(self._assembler, CpuAssembler):
            return deque([self._assembler.prepare(wanted)])
        return deque(self._assembler.prepare_run(wanted, run.sizes))

    def _finish(self, prepared: Any, position: int, done: Callable[[], None] | None = None) -> tuple[Batch, int]:
        """Make the batch, on a GPU without a wait; call `done` after the last one of a window, which may be filled anew then."""
        self._raise_closed()
        made = self._assembler.make(prepared)
        if done is not None:
            done()
        return Batch(made.x, made.rows, made.obs, made.is_padding), position

    def _raise_closed(self) -> None:
        if self._is_closed:
            raise ValueError("the loader is closed; make a new one")

    # State and life

    def state_dict(self) -> dict[str, Any]:
        """Return where in which epoch this loader is: {version, seed, epoch, position, n_rows, order}.

        position: rows of the epoch in batches that were yielded, over all ranks (in a worker process: where its next batch
        begins); with a sampler what was drawn of it, rows or lists. Under another world or batch size a loader continues exactly
        there, but of a worker's state; a sampler must be seeded, so that it gives the same sequence again.
        """
        state = self._order.state(self._place.epoch, self._place.position)
        if self._windows is not None:
            state |= self._window_order.state()
        if self._sampled is not None:
            state |= {"order": self._sampled.name, "position": self._place.position}
        return state | ({} if self._place.worker is None else {"worker": list(self._place.worker)})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue, at the next iteration, where `state` was taken; its seed is taken over.

        Raises ValueError for a state of other rows or of another order, or that stands beyond its end.
        """
        loaded = self._order.check_state(state, self._other_order())
        if self._windows is not None:
            self._window_order.check_state(state)
        if self._sampled is None:
            self._order = self._order.with_seed(loaded.seed)
        if self._windows is not None:
            self._window_order = self._windows.order(self._order)
        self._place.resume(loaded.epoch, loaded.position, loaded.worker)

    def _other_order(self) -> tuple[str, int | None] | None:
        """Name and length of the order, where it is not that of the seed alone."""
        if self._windows is not None:
            return self._window_order.name, self._shards.n_rows
        return None if self._sampled is None else (self._sampled.name, self._sampled.length)

    def close(self) -> None:
        """Give back the memory that holds the rows; harmless when repeated. The loader yields no more batches."""
        if not self._is_closed:
            self._is_closed = True
            _close(self._windows, self._assembler)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None and not self._is_closed:
                self._assembler.check()  # of the batches of an epoch that was left early
        finally:
            self.close()


def _close_here(windows: Windows | None, assembler: Assembler, pid: int) -> None:
    """Close what a loader left open when it went away; in a forked child, which has no device, nothing."""
    if os.getpid() == pid:
        _close(windows, assembler)


def _close(windows: Windows | None, assembler: Assembler) -> None:
    if windows is not None:
        windows.close()
    assembler.close()


def _archives(dataset: Source | Sequence[Source]) -> list[Archive]:
    """Open what is named, each once; no Python line is run for what stands in the list again."""
    sources = list(dataset) if isinstance(dataset, Sequence) and not isinstance(dataset, str) else [dataset]
    opened: dict[str, Archive] = {}
    each = dict(zip(map(id, sources), sources, strict=True))
    archives = {number: _archive(source, opened) for number, source in each.items()}
    return list(map(archives.__getitem__, map(id, sources)))


def _archive(source: Source, opened: dict[str, Archive]) -> Archive:
    """Open one archive, unless it is among those `opened`, by paths as they were given and as they are."""
    if isinstance(source, ArchiveRows):
        return source.archive
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"dataset is a {type(source).__name__}, expected a SingleCellMemMapDataset, the path of an archive, or a list of these"
        )
    given = os.fspath(source)
    if given not in opened and is_url(given):
        opened[given] = open_remote(given)
    elif given not in opened:
        path = os.path.realpath(given)
        if os.path.isfile(path):  # noqa: PTH113
            raise ArchiveError(f"{given} is a file, expected the directory of an archive; `scdl-gpu convert FILE.h5ad DIRECTORY` makes one")
        opened[given] = opened.setdefault(path, opened.get(path) or open_archive(Path(given)))
    return opened[given]


def _check_samplers(
    sampler: Any, batch_sampler: Any, *, batch_size: int, shuffle: bool | None, drop_last: bool, ranks: tuple[Any, Any]
) -> None:
    if batch_sampler is not None and (sampler is not None or batch_size != 1024 or shuffle is not None or drop_last):
        raise ValueError("batch_sampler excludes sampler, batch_size, shuffle and drop_last: it decides all of them")
    if sampler is not None and shuffle:
        raise ValueError("sampler excludes shuffle=True: it decides the order")
    if (sampler is not None or batch_sampler is not None) and ranks != (None, None):
        kind = "sampler" if batch_sampler is None else "batch_sampler"
        raise ValueError(f"{kind} excludes rank and world_size: it is used as it is; give each rank one of its own rows")
