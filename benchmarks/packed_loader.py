"""Cells per second of GPUBatchLoader on the CPU from packed rows, beside the same rows raw, page cache warm and cold.

    python benchmarks/packed_loader.py RAW [PACKED] [--batch-size 1024] [--output csr dense] [--cache warm cold] [--cells 40000]

RAW is an archive; PACKED is what `scdl-gpu pack RAW PACKED` makes of it, made beside it where it is not given. Alternatives
take turns in one process; ratios are to the raw rows, the last line. In a cold round the files' pages are dropped first
(posix_fadvise, after their maps are gone: every round opens the archive), and what is read comes from the disk, one page
at a time; GB/s are always of the raw rows. What is compared is checked to be equal first. --threads: torch's.
"""

import argparse
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dataloader import drain

from scdl_gpu import GPUBatchLoader, SingleCellMemMapDataset, bench


def packed_of(raw: Path) -> Path:
    """Return the packed archive beside a raw one, made if need be."""
    from scdl_gpu.pack import pack

    packed = raw.with_name(f"{raw.name}.packed")
    if not packed.exists():
        pack(raw, packed)
    return packed


def drop_pages(archives: list[Path]) -> None:
    """Let the page cache forget the files of archives; nobody may have them mapped."""
    gc.collect()
    for file in (file for archive in archives for file in archive.rglob("*") if file.is_file()):
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def alternatives(raw: Path, packed: Path, batches: list[list[int]], *, output: str, is_cold: bool) -> dict[str, Callable[[], Any]]:
    """Make the runs: each is one pass over the batches, by a loader that is made before, or cold in the run."""

    def run(archive: Path, gene_order: str) -> Callable[[], Any]:
        def loader() -> GPUBatchLoader:
            return GPUBatchLoader(archive, batch_sampler=batches, device="cpu", output=output, gene_order=gene_order)

        if is_cold:
            return lambda: drain(loader())
        made = loader()
        return lambda: drain(made)

    found = {f"packed, {order} order": run(packed, order) for order in ("var", "stored")}
    return found | {"raw": run(raw, "var")}


def check_equal(raw: Path, packed: Path, rows: list[int]) -> None:
    """Raise SystemExit unless a batch of both is equal bit for bit, in stored order once its columns are renumbered."""
    batches = {}
    for name, archive, order in (("raw", raw, "var"), ("var", packed, "var"), ("stored", packed, "stored")):
        loader = GPUBatchLoader(archive, batch_sampler=[rows], device="cpu", output="dense", gene_order=order)
        (batch,) = loader
        made = torch.empty_like(batch.x)
        made[:, torch.from_numpy(loader.var_order)] = batch.x
        batches[name] = made
    if not all(torch.equal(batches["raw"], batch) for batch in batches.values()):
        raise SystemExit(f"{packed} does not hold the rows of {raw}")


def compare(raw: Path, packed: Path, *, batch_size: int, output: str, cache: str, cells: int, rounds: int) -> None:
    """Measure one kind of batch, and print it."""
    dataset = SingleCellMemMapDataset(raw)
    rows = np.random.default_rng(0).permutation(len(dataset))[: cells // batch_size * batch_size]
    n_vars, stored = dataset.number_of_variables()[0], dataset.data.itemsize + dataset.col_index.itemsize
    size_bytes = int(rows.size * dataset.number_nonzero_values() / len(dataset) * stored)
    del dataset
    check_equal(raw, packed, rows[:64].tolist())
    runs = alternatives(raw, packed, rows.reshape(-1, batch_size).tolist(), output=output, is_cold=cache == "cold")
    before = (lambda: drop_pages([raw, packed])) if cache == "cold" else lambda: None
    results = bench.interleaved(runs, count=rows.size, rounds=rounds, size_bytes=size_bytes, before=before)
    facts = {"batch_size": batch_size, "output": output, "cache": cache, "threads": torch.get_num_threads(), "genes": n_vars}
    for result in results:
        print(bench.json_line(result, archive=raw.name, **facts))
    print(f"\n{output}, batch size {batch_size}, {cache}, {rows.size:,} cells a round; GB/s of raw rows\n{bench.table(results)}\n")


def main() -> None:
    """Parse the arguments, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path)
    parser.add_argument("packed", type=Path, nargs="?")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1024])
    parser.add_argument("--output", nargs="+", default=["csr"], choices=["csr", "dense"])
    parser.add_argument("--cache", nargs="+", default=["warm", "cold"], choices=["warm", "cold"])
    parser.add_argument("--cells", type=int, default=40_000, help="rows of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    packed = arguments.packed or packed_of(arguments.raw)
    for output in arguments.output:
        for batch_size in arguments.batch_size:
            for cache in arguments.cache:
                compare(
                    arguments.raw, packed, batch_size=batch_size, output=output, cache=cache, cells=arguments.cells, rounds=arguments.rounds
                )


if __name__ == "__main__":
    main()
