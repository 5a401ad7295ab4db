"""What a dataset of 100 million or a billion rows costs that one of few rows does not: time to open, memory, cells per second.

    python benchmarks/scale.py ARCHIVE [--rows 100000000 1000000000] [--batch-size 1024] [--obs plate] [--cells 40960] [--rounds 5]

One archive, raw or packed, stands in a list as often as it takes; its rows are the same pages of memory however often, so that what
is measured is opening, ordering and locating. Opening is from the list of paths to the loader, all imports and kernels being there;
private memory (RssAnon) is told, and what Python and NumPy hold for the loader (tracemalloc, of a second opening), less what a
loader of the archive alone holds: the first grows by whole pages only, and not where memory was free. Then all take turns in one
process, page cache warm, each drawing the same number of cells in its own shuffled order; ratios are to the archive alone, the last
line, by the clock and by the CPU time of all threads, which other work on the machine changes less.
"""

import argparse
import gc
import itertools
import json
import statistics
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dataloader import drain
from loader import with_cpu_seconds

from scdl_gpu import GPUBatchLoader, SingleCellMemMapDataset, bench


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


def epoch_of(loader: GPUBatchLoader, n_batches: int) -> Callable[[], None]:
    """Make a run: so many batches of the loader's first epoch."""

    def run() -> None:
        loader.set_epoch(0)
        drain(itertools.islice(loader, n_batches))

    return run


def main() -> None:
    """Parse the arguments, open, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000_000, 1_000_000_000], help="at least so many rows")
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--output", default="csr", choices=["csr", "dense"])
    parser.add_argument("--obs", nargs="*", default=[], help="columns that batches carry")
    parser.add_argument("--cells", type=int, default=40_960, help="rows of a round")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    options = {"batch_size": arguments.batch_size, "output": arguments.output, "obs": arguments.obs}
    n_rows = len(SingleCellMemMapDataset(arguments.archive))
    n_batches = max(1, min(arguments.cells, n_rows) // arguments.batch_size)
    epoch_of(opened(arguments.archive, 2, **options)[0], 2)()  # compiles
    runs: dict[str, Callable[[], None]] = {}
    alone, base = opened(arguments.archive, 1, **options)
    for rows in arguments.rows:
        loader, facts = opened(arguments.archive, -(-rows // n_rows), **options)
        grown = facts["held_bytes"] - base["held_bytes"]
        facts |= {"bytes_per_row": round(grown / facts["rows"], 6), "bytes_per_listed": round(grown / facts["listed"], 2)}
        print(json.dumps({"what": "open", **facts, "archive": arguments.archive.name, **bench.machine()}))
        runs[f"{facts['rows']:,} rows, listed {facts['listed']:,} times"] = epoch_of(loader, n_batches)
    runs[f"{n_rows:,} rows"] = epoch_of(alone, n_batches)
    cells = n_batches * arguments.batch_size
    runs, cpu_seconds = with_cpu_seconds(runs)
    results = bench.interleaved(runs, count=cells, rounds=arguments.rounds)
    used = {result.what: statistics.median(cpu_seconds[result.what][-arguments.rounds :]) for result in results}
    for result in results:
        own = used[result.what]
        cpu = {"cpu_us_per_cell": round(1e6 * own / cells, 3), "cpu_ratio": round(used[results[-1].what] / own, 3)}
        print(bench.json_line(result, cache="warm", archive=arguments.archive.name, **cpu, **options))
    print(f"\n{arguments.output}, batch size {arguments.batch_size}, {cells:,} cells a round\n{bench.table(results)}")
    print("by CPU time:", ", ".join(f"{used[results[-1].what] / seconds:.2f}" for seconds in used.values()))


if __name__ == "__main__":
    main()
