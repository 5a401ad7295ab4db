"""Batches that are made as one, and making them ahead of who asks.

Knows the order of the work and the threads that do it, not what makes a batch. Of small batches a run is made as one, and cut:
otherwise what Python and the threads do for each would take as long as the kernel.
"""

import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from scdl_gpu.sampler import Step

RUN_BYTES = 8 << 20
"""Small batches of about so many bytes together are one run (benchmarks/LOG.md, 2026-11-24)."""
Made = TypeVar("Made")


class Run(NamedTuple):
    """Batches that follow each other and are made as one: their rows, which are padding, sizes, and the position after each.

    window: the number of the window that they are made of, of a stream; numbers: of the rows there.
    """

    rows: NDArray[np.int64]
    is_padding: NDArray[np.bool_]
    sizes: list[int]
    positions: list[int]
    window: int = 0
    numbers: NDArray[np.int64] | None = None

    def parts(self) -> Iterator["Run"]:
        """Give each batch as a run of its own."""
        starts = itertools.accumulate(self.sizes, initial=0)
        for start, size, position in zip(starts, self.sizes, self.positions, strict=False):
            where = slice(start, start + size)
            numbers = None if self.numbers is None else self.numbers[where]
            yield Run(self.rows[where], self.is_padding[where], [size], [position], self.window, numbers)


def joined(steps: Iterator[Step], n_rows: int) -> Iterator[Run]:
    """Join steps that follow each other, as many as hold `n_rows` together, one at least."""
    steps = iter(steps)
    held = next(steps, None)
    while held is not None:
        joined, size = [held], held[0].size
        while (held := next(steps, None)) is not None and size + held[0].size <= n_rows:
            joined.append(held)
            size += held[0].size
        rows, is_padding, positions = zip(*joined, strict=True)
        yield Run(np.concatenate(rows), np.concatenate(is_padding), [part.size for part in rows], list(positions))


def ahead(
    pool: ThreadPoolExecutor,
    make: Callable[[Run], Made],
    runs: Iterator[Run],
    threads: int,
    prefetch: int,
    *,
    waited: Callable[[float], None],
) -> Generator[tuple[Run, Future[Made]], None, None]:
    """Make runs in the pool's threads, one a thread and `prefetch` batches more; give them, made, in their order.

    What was begun is finished on leaving.
    """
    pending: deque[tuple[Run, Future[Made]]] = deque()

    def begin() -> None:
        while sum(len(run.sizes) for run, _ in itertools.islice(pending, threads, None)) < prefetch or len(pending) < threads:
            run = next(runs, None)
            if run is None:
                return
            pending.append((run, pool.submit(make, run)))

    try:
        begin()
        while pending:
            run, future = pending.popleft()
            since = time.perf_counter()
            wait([future])
            waited(time.perf_counter() - since)
            begin()
            yield run, future
    finally:
        for _, future in pending:
            future.cancel()
