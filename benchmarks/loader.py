"""Cells per second of GPUBatchLoader on the CPU, beside bionemo-scdl's DataLoader and beside its own limit.

    python benchmarks/loader.py ARCHIVE|H5AD [--batch-size 64 1024] [--rounds 5] [--cells 40000]

CSR batches: the limit is the same gather, by the same kernel, into buffers made before, on as many threads. Dense float32
batches: the limit is to fill eight such outputs in turn on as many threads; bionemo-scdl's batches are densified by
`to_dense()`. Alternatives take turns in one process, page cache warm; ratios are to bionemo-scdl, the last line.
"""

import argparse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dataloader import archive_of, drain
from torch.utils.data import DataLoader, Subset

from scdl_gpu import GPUBatchLoader, SingleCellMemMapDataset, bench
from scdl_gpu.kernels import cpu, pointers, shards


def gather_limit(dataset: SingleCellMemMapDataset, batches: np.ndarray, threads: int) -> Callable[[], None]:
    """Make a run of the kernel over all batches, into buffers of its own for each thread."""
    indptr, indices, data = (np.asarray(array) for array in (dataset.row_index, dataset.col_index, dataset.data))
    table, nothing, kind = shards.entry(indices, data, is_sorted=True), np.empty(0, np.int32), shards.kind_of(data.dtype)
    n_vars, b = dataset.number_of_variables()[0], batches.shape[1]
    most = max(int(np.diff(indptr.astype(np.int64))[rows].sum()) for rows in batches)

    def run(part: np.ndarray) -> None:
        starts, pointer, fault = np.empty(b, np.int64), np.empty(b + 1, np.int64), np.full(shards.FAULTS, shards.NO_FAULT, np.int32)
        columns, values = np.empty(most, np.int32), np.empty(most, data.dtype)
        for rows in part:
            pointers.row_pointers(indptr, rows, data.size, starts, pointer)
            short = pointer.astype(np.int32)
            cpu.gather_csr(table, nothing, starts, nothing, short, n_vars, short, kind, columns, values, fault)

    return lambda: _in_threads(run, batches, threads)


def fill_limit(n_batches: int, batch_size: int, width: int, threads: int) -> Callable[[], None]:
    """Make a run that fills a ring of eight dense outputs."""
    ring = [np.empty((batch_size, width), np.float32) for _ in range(8)]

    def run(part: np.ndarray) -> None:
        for number in part:
            ring[number % 8].fill(1.0)

    return lambda: _in_threads(run, np.arange(n_batches), threads)


def _in_threads(run: Callable[[np.ndarray], None], work: np.ndarray, threads: int) -> None:
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, np.array_split(work, threads)))


def alternatives(archive: Path, batch_size: int, cells: int, output: str) -> dict[str, Callable[[], Any]]:
    """Make the runs: each is one pass over about `cells` rows."""
    dataset = SingleCellMemMapDataset(archive)
    rows = np.random.default_rng(0).permutation(len(dataset))[: cells // batch_size * batch_size]
    batches = rows.reshape(-1, batch_size)
    loader = GPUBatchLoader(dataset, batch_sampler=batches.tolist(), device="cpu", output=output)
    threads = torch.get_num_threads()
    limit = (
        gather_limit(dataset, batches, threads)
        if output == "csr"
        else fill_limit(len(batches), batch_size, dataset.number_of_variables()[0], threads)
    )
    found: dict[str, Callable[[], Any]] = {f"limit ({threads} threads)": limit, f"GPUBatchLoader {output}": lambda: drain(loader)}
    try:
        from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset as Reference
        from bionemo.scdl.util.torch_dataloader_utils import collate_sparse_matrix_batch
    except ImportError:
        print("bionemo-scdl is not installed: pip install 'scdl-gpu[bench]' to compare with it")
        return found
    part = Subset(Reference(str(archive)), rows.tolist())

    def reference() -> None:
        for batch in DataLoader(part, batch_size=batch_size, shuffle=True, collate_fn=collate_sparse_matrix_batch):
            if output == "dense":
                batch.to_dense()

    return found | {"bionemo-scdl": reference}


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
    dataset = SingleCellMemMapDataset(archive)
    mean = dataset.number_nonzero_values() / len(dataset)
    for output in arguments.output:
        for batch_size in arguments.batch_size:
            cells = min(arguments.cells, len(dataset)) // batch_size * batch_size
            row_bytes = mean * (dataset.data.itemsize + 4) if output == "csr" else 4 * dataset.number_of_variables()[0]
            runs = alternatives(archive, batch_size, cells, output)
            results = bench.interleaved(runs, count=cells, rounds=arguments.rounds, size_bytes=int(cells * row_bytes))
            for result in results:
                print(bench.json_line(result, batch_size=batch_size, output=output, cache="warm", archive=archive.name))
            print(f"\n{output}, batch size {batch_size}, {cells:,} cells a round\n{bench.table(results)}\n")


if __name__ == "__main__":
    main()
