"""What a dataset of 100 million or a billion rows costs that one of few rows does not: time to open, memory, cells per second.

    python benchmarks/scale.py ARCHIVE [--rows 100000000 1000000000] [--batch-size 1024] [--obs plate] [--batches 16] [--rounds 60]

One archive, raw or packed, stands in a list as often as it takes; its rows are the same pages of memory however often, so that what
is measured is opening, ordering and locating. Opening is from the list of paths to the loader, all imports and kernels being there;
private memory (RssAnon) is told, and what Python and NumPy hold for the loader (tracemalloc, of a second opening), less what a
loader of the archive alone holds: the first grows by whole pages only, and not where memory was free.

Then all take turns in one process, page cache warm, and short ones: some tenths of a second, in which a noisy machine changes little.
A turn is the first --batches of a shuffled epoch, another one each round; what was begun ahead is finished in it, so that no thread
works on in the turn of the next. Each round has an order of its own. It gives a ratio to the archive alone by the clock, and one by
the CPU time of all threads; told are the medians of the rounds' ratios with the interval that holds the true median with 95 % (by
order statistics, whatever noise is like), and whether that shows "at least 90 % of the archive alone", refutes it, or leaves it open:
then more rounds are needed. The archive alone takes part twice: its ratio to itself is what this machine shows where there is no
difference, and where that interval is far from 1 the run is worth nothing.
"""

import argparse
import gc
import itertools
import json
import statistics
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from dataloader import drain

from scdl_gpu import GPUBatchLoader, SingleCellMemMapDataset, bench

ENOUGH = 0.9
"""Of the archive alone: what a dataset of any size is to give."""


def opened(archive: Path, times: int, **options: Any) -> tuple[GPUBatchLoader, dict[str, Any]]:
    """Make a loader of a list of `times` times the archive; returns it, and what it took."""
    sources = [str(archive)] * times
    gc.collect()
    before, start = bench.private_bytes(), time.perf_counter()
    loader = GPUBatchLoader(sources, device="cpu", **options)
    seconds = time.perf_counter() - start
    gc.collect()
    growth = bench.private_bytes() - before
    tracemalloc.start()
    again = GPUBatchLoader(sources, device="cpu", **options)
    gc.collect()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    again.close()
    facts = {"rows": loader.shape[0], "listed": times, "open_seconds": round(seconds, 4), "private_bytes": growth, "held_bytes": held}
    return loader, facts


def turns(loaders: dict[str, GPUBatchLoader], n_batches: int, rounds: int) -> dict[str, tuple[list[float], list[float]]]:
    """Let loaders take turns of so many batches; give the seconds and the CPU seconds of each round."""
    found: dict[str, tuple[list[float], list[float]]] = {what: ([], []) for what in loaders}
    random = np.random.default_rng(0)
    for number in range(-1, rounds):  # the first, unmeasured one makes buffers
        for what in random.permutation(list(loaders)).tolist():
            loaders[what].set_epoch(number + 1)
            cpu, start = time.process_time(), time.perf_counter()
            drain(itertools.islice(loaders[what], n_batches))  # leaving it waits for what was begun
            seconds = time.perf_counter() - start, time.process_time() - cpu
            for kept, one in zip(found[what], seconds, strict=True):
                kept.extend([one] if number >= 0 else [])
    return found


def ratio(base: Sequence[float], own: Sequence[float]) -> dict[str, Any]:
    """Give the median of the rounds' base / own, the interval that holds the true one with 95 %, and what that says of ENOUGH."""
    ratios = sorted(one / other for one, other in zip(base, own, strict=True))
    rank = max(0, int(len(ratios) / 2 - 0.98 * len(ratios) ** 0.5))  # of a binomial distribution, 1.96 of its deviations below n / 2
    low, high = ratios[rank], ratios[-1 - rank]
    says = "shown" if low >= ENOUGH else "refuted" if high < ENOUGH else "open"
    return {"median": round(statistics.median(ratios), 3), "low": round(low, 3), "high": round(high, 3), "at_least_90_percent": says}


def main() -> None:
    """Parse the arguments, open, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000_000, 1_000_000_000], help="at least so many rows")
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--output", default="csr", choices=["csr", "dense"])
    parser.add_argument("--obs", nargs="*", default=[], help="columns that batches carry")
    parser.add_argument("--batches", type=int, default=16, help="of a turn")
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args()
    options = {"batch_size": arguments.batch_size, "output": arguments.output, "obs": arguments.obs}
    n_rows = len(SingleCellMemMapDataset(arguments.archive))
    n_batches = max(1, min(arguments.batches, n_rows // arguments.batch_size))
    drain(itertools.islice(opened(arguments.archive, 2, **options)[0], 2))  # compiles
    loaders: dict[str, GPUBatchLoader] = {}
    alone, base = opened(arguments.archive, 1, **options)
    for rows in arguments.rows:
        loader, facts = opened(arguments.archive, -(-rows // n_rows), **options)
        grown = facts["held_bytes"] - base["held_bytes"]
        facts |= {"bytes_per_row": round(grown / facts["rows"], 6), "bytes_per_listed": round(grown / facts["listed"], 2)}
        print(json.dumps({"what": "open", **facts, "archive": arguments.archive.name, **bench.machine()}), flush=True)
        loaders[f"{facts['rows']:,} rows, listed {facts['listed']:,} times"] = loader
    loaders["the archive alone, again"] = opened(arguments.archive, 1, **options)[0]
    loaders[f"{n_rows:,} rows"] = alone
    taken, cells = turns(loaders, n_batches, arguments.rounds), n_batches * arguments.batch_size
    results = [bench.Result(what, tuple(seconds), cells) for what, (seconds, _) in taken.items()]
    compared = {what: [ratio(base, own) for base, own in zip(taken[results[-1].what], taken[what], strict=True)] for what in taken}
    for result in results:
        by_clock, by_cpu = compared[result.what]
        cpu = {"cpu_us_per_cell": round(1e6 * statistics.median(taken[result.what][1]) / cells, 3), "cpu_ratio": by_cpu}
        print(bench.json_line(result, cache="warm", archive=arguments.archive.name, ratio=by_clock, **cpu, **options))
    print(f"\n{arguments.output}, batch size {arguments.batch_size}, {cells:,} cells a turn\n{bench.table(results)}")
    for what, kinds in compared.items():
        words = [f"{one['median']:.3f} ({one['low']:.3f} to {one['high']:.3f}), {one['at_least_90_percent']}" for one in kinds]
        print(f"{what}: by the clock {words[0]}; by CPU time {words[1]}")


if __name__ == "__main__":
    main()
