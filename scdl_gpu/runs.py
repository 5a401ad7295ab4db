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
RUN_BATCHES = 16
"""Batches of a run at most, where a sampler gives them: 8 MiB of small ones could be all that a sampler has, drawn at once."""
Made = TypeVar("Made")


class Run(NamedTuple):
    """Batches that follow each other and are made as one: their rows, which are padding, sizes, and the position after each.

    window: the number of the window that they are made of, of a stream; numbers: of the rows there; is_last: no more follow of it.
    """

    rows: NDArray[np.int64]
    is_padding: NDArray[np.bool_]
    sizes: list[int]
    positions: list[int]
    window: int = 0
    numbers: NDArray[np.int64] | None = None
    is_last: bool = False

    def parts(self) -> Iterator["Run"]:
        """Give each batch as a run of its own."""
        starts = itertools.accumulate(self.sizes, initial=0)
        for start, size, position in zip(starts, self.sizes, self.positions, strict=False):
            where = slice(start, start + size)
            numbers = None if self.numbers is None else self.numbers[where]
            yield Run(self.rows[where], self.is_padding[where], [size], [position], self.window, numbers)


def joined(steps: Iterator[Step], n_rows: int) -> Iterator[Run]:
    """Join steps that follow each other, as many as hold `n_rows` together, one at least and RUN_BATCHES at most; of 1 row, no two.

    A step is drawn when the run before it was taken. An error of the sampler comes after what it gave, but for an interrupt.
    """
    most = 1 if n_rows == 1 else RUN_BATCHES
    held: list[Step] = []
    size = 0
    try:
        for step in steps:
            if held and size + step[0].size > n_rows:
                yield _run(held)
                held, size = [], 0
            held.append(step)
            size += step[0].size
            if size >= n_rows or len(held) == most:
                yield _run(held)
                held, size = [], 0
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException:
        if held:
            yield _run(held)
        raise
    if held:
        yield _run(held)


def _run(steps: list[Step]) -> Run:
    rows, is_padding, positions = zip(*steps, strict=True)
    return Run(np.concatenate(rows), np.concatenate(is_padding), [part.size for part in rows], list(positions))


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

    An error of `runs` comes after what they gave, but for an interrupt. What was begun is finished on leaving.
    """
    pending: deque[tuple[Run, Future[Made]]] = deque()
    done: deque[tuple[Run, Future[Made]]] = deque()

    def begin() -> None:
        while sum(len(run.sizes) for run, _ in itertools.islice(pending, threads, None)) < prefetch or len(pending) < threads:
            run = next(runs, None)
            if run is None:
                return
            pending.append((run, pool.submit(make, run)))

    try:
        begin()
        while pending:
            since = time.perf_counter()
            wait([pending[0][1]])
            waited(time.perf_counter() - since)
            done.append(pending.popleft())
            begin()
            yield done.popleft()
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException:
        yield from (*done, *pending)
        raise
    finally:
        for _, future in pending:
            future.cancel()
