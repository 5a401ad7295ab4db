"""Cells per second of GPUBatchLoader on the CPU, beside bionemo-scdl's DataLoader and beside its own limit.

    python benchmarks/loader.py ARCHIVE|H5AD [--batch-size 64 1024] [--rounds 5] [--cells 40000]

All alternatives read the same rows, shuffled, and take turns in one process, page cache warm. CSR batches: the limit is
the same gather, by the same kernel, into buffers made and touched before, on as many threads. Dense float32 batches: the
limit is to fill eight such outputs in turn on as many threads; bionemo-scdl's batches are densified by `to_dense()`.
Ratios are to bionemo-scdl, the last line; the share of the limit is the median of the rounds' shares, and stands beside
the seconds of CPU that each took, which other work on the machine changes less.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dataloader import archive_of, drain
from torch.utils.data import DataLoader, Subset

from scdl_gpu import GPUBatchLoader, SingleCellMemMapDataset, bench
from scdl_gpu.kernels import cpu, pointers, shards


def gather_limit(dataset: SingleCellMemMapDataset, batches: np.ndarray, dtype: np.dtype[Any], threads: int) -> Callable[[], None]:
    """Make a run of the kernel over all batches, into buffers of its own for each thread, with values of `dtype`."""
    indptr, indices, data = (np.asarray(array) for array in (dataset.row_index, dataset.col_index, dataset.data))
    table, nothing, kind = shards.entry(indices, data, is_sorted=True), np.empty(0, np.int32), shards.kind_of(dtype)
    n_vars, b = dataset.number_of_variables()[0], batches.shape[1]
    most = max(int(np.diff(indptr.astype(np.int64))[rows].sum()) for rows in batches)
    buffers = [(np.full(most, -1, np.int32), np.ones(most, dtype)) for _ in range(threads)]

    def run(number: int) -> None:
        columns, values = buffers[number]
        starts, pointer, fault = np.empty(b, np.int64), np.empty(b + 1, np.int64), np.full(shards.FAULTS, shards.NO_FAULT, np.int32)
        for rows in batches[number::threads]:
            pointers.row_pointers(indptr, rows, data.size, starts, pointer)
            short = pointer.astype(np.int32)
            cpu.gather_csr(table, nothing, starts, nothing, short, n_vars, short, kind, columns, values, fault)

    return lambda: _in_threads(run, threads)


def fill_limit(n_batches: int, batch_size: int, width: int, threads: int) -> Callable[[], None]:
    """Make a run that fills a ring of eight dense outputs."""
    ring = [np.ones((batch_size, width), np.float32) for _ in range(8)]

    def run(first: int) -> None:
        for number in range(first, n_batches, threads):
            ring[number % 8].fill(1.0)

    return lambda: _in_threads(run, threads)


def _in_threads(run: Callable[[int], None], threads: int) -> None:
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, range(threads)))


def alternatives(archive: Path, batch_size: int, cells: int, output: str) -> dict[str, Callable[[], Any]]:
    """Make the runs, the limit first: each is one pass over the first `cells` rows of the loader's epoch 0."""
    dataset = SingleCellMemMapDataset(archive)
    loader, n = GPUBatchLoader(dataset, batch_size, device="cpu", output=output), cells // batch_size
    threads, width = torch.get_num_threads(), loader.shape[1]

    def epoch() -> Iterator[Any]:
        loader.set_epoch(0)
        return itertools.islice(loader, n)

    batches = np.stack([batch.rows.numpy() for batch in epoch()])
    dtype = next(epoch()).x.values().numpy().dtype if output == "csr" else np.dtype(np.float32)
    limit = gather_limit(dataset, batches, dtype, threads) if output == "csr" else fill_limit(n, batch_size, width, threads)
    rows = batches.ravel()
    found: dict[str, Callable[[], Any]] = {f"limit ({threads} threads)": limit, f"GPUBatchLoader {output}": lambda: drain(epoch())}
    try:
        from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset as Reference
        from bionemo.scdl.util.torch_dataloader_utils import collate_sparse_matrix_batch
    except ImportError:
        print("bionemo-scdl is not installed: pip install '.[bench]' in a checkout to compare with it")
        return found
    part = Subset(Reference(str(archive)), rows.tolist())

    def reference() -> None:
        for batch in DataLoader(part, batch_size=batch_size, shuffle=True, collate_fn=collate_sparse_matrix_batch):
            if output == "dense":
                batch.to(torch.float32).to_dense()  # of uint16 there is none

    return found | {"bionemo-scdl": reference}


def with_cpu_seconds(runs: dict[str, Callable[[], Any]]) -> tuple[dict[str, Callable[[], Any]], dict[str, list[float]]]:
    """Let each run note the seconds of CPU that it took, of all threads."""
    noted: dict[str, list[float]] = {what: [] for what in runs}

    def noting(what: str) -> Callable[[], None]:
        def run() -> None:
            start = time.process_time()
            runs[what]()
            noted[what].append(time.process_time() - start)

        return run

    return {what: noting(what) for what in runs}, noted


def shares(limit: Sequence[float], seconds: Sequence[float]) -> float:
    """Give the median of the rounds' limit / seconds."""
    return statistics.median(best / taken for best, taken in zip(limit, seconds, strict=True))


def compare(archive: Path, batch_size: int, output: str, cells: int, rounds: int) -> None:
    """Measure one output at one batch size, and print."""
    dataset = SingleCellMemMapDataset(archive)
    cells = min(cells, len(dataset)) // batch_size * batch_size
    mean = dataset.number_nonzero_values() / len(dataset)
    row_bytes = mean * (dataset.data.itemsize + 4) if output == "csr" else 4 * dataset.number_of_variables()[0]
    runs, cpu_seconds = with_cpu_seconds(alternatives(archive, batch_size, cells, output))
    results = bench.interleaved(runs, count=cells, rounds=rounds, size_bytes=int(cells * row_bytes))
    limit, ours = results[:2]
    of_limit = shares(limit.seconds, ours.seconds)
    of_limit_cpu = shares(cpu_seconds[limit.what][-rounds:], cpu_seconds[ours.what][-rounds:])
    for result in results:
        facts = {"of_limit": round(of_limit, 3), "of_limit_cpu": round(of_limit_cpu, 3)} if result is ours else {}
        print(bench.json_line(result, batch_size=batch_size, output=output, cache="warm", archive=archive.name, **facts))
    print(f"\n{output}, batch size {batch_size}, {cells:,} cells a round\n{bench.table(results)}")
    print(f"{ours.what}: {100 * of_limit:.0f} % of the limit by the clock, {100 * of_limit_cpu:.0f} % by CPU time\n")


def main() -> None:
    """Parse the arguments, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--output", nargs="+", default=["csr", "dense"], choices=["csr", "dense"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cells", type=int, default=40_000, help="rows of a round")
    arguments = parser.parse_args()
    archive = archive_of(arguments.source)
    for output in arguments.output:
        for batch_size in arguments.batch_size:
            compare(archive, batch_size, output, arguments.cells, arguments.rounds)


if __name__ == "__main__":
    main()
