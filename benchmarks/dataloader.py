"""Cells per second of a shuffled torch DataLoader over an archive, beside bionemo-scdl over the same archive.

    python benchmarks/dataloader.py ARCHIVE|H5AD [--batch-size 64 1024] [--rounds 5] [--cells 40000] [--workers 0]

An h5ad file is converted first, values as float32 (what bionemo-scdl stores), beside itself. Alternatives take turns in
one process, page cache warm; the last line of the table is bionemo-scdl, ratios are to it. Limits in the same run: a
SciPy CSR in RAM indexed by the same rows, and the kernel alone into fresh arrays. Every loader's batches are summed once
and compared before anything is timed.
"""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch.utils.data import DataLoader, Subset

from scdl_gpu import SingleCellMemMapDataset, bench, collate_sparse_matrix_batch


def loaders(archive: Path, cells: int, batch_size: int, workers: int) -> dict[str, Callable[[], Iterable[Any]]]:
    """Make the alternatives: each call gives one epoch of batches over the first `cells` rows."""
    dataset = SingleCellMemMapDataset(archive)
    part = range(min(cells, len(dataset)))
    matrix = dataset.rows(slice(0, len(part)))
    order = np.random.default_rng(0).permutation(len(part))

    def torch_loader(source: Any, collate: Callable[[Any], Any]) -> Callable[[], Iterable[Any]]:
        return lambda: DataLoader(
            Subset(source, part), batch_size=batch_size, shuffle=True, drop_last=True, collate_fn=collate, num_workers=workers
        )

    batches = order[: len(part) // batch_size * batch_size].reshape(-1, batch_size)
    found: dict[str, Callable[[], Iterable[Any]]] = {
        "limit: SciPy CSR in RAM": lambda: (matrix[rows] for rows in batches),
        "limit: kernel alone": lambda: (dataset.__getitems__(rows) for rows in batches),
        "scdl_gpu": torch_loader(dataset, collate_sparse_matrix_batch),
    }
    try:
        from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset as Reference
        from bionemo.scdl.util.torch_dataloader_utils import collate_sparse_matrix_batch as collate
    except ImportError:
        print("bionemo-scdl is not installed: pip install '.[bench]' in a checkout to compare with it")
        return found
    return found | {"bionemo-scdl": torch_loader(Reference(str(archive)), collate)}


def checked_sum(batches: Iterable[Any]) -> float:
    """Sum all values of an epoch, whatever holds them."""
    total = 0.0
    for batch in batches:
        values = batch.data if sp.issparse(batch) else (batch if isinstance(batch, torch.Tensor) else batch.to_sparse()).values()
        total += float(values.sum(dtype=np.float64 if isinstance(values, np.ndarray) else torch.float64))
    return total


def drain(batches: Iterable[Any]) -> None:
    """Consume an epoch."""
    for _ in batches:
        pass


def archive_of(path: Path) -> Path:
    """Return the archive at `path`, or that of an h5ad file, converted beside it if need be."""
    if path.is_dir():
        return path
    archive = path.with_suffix(".float32.scdl")
    if not archive.exists():
        SingleCellMemMapDataset(archive, h5ad_path=path, use_X_not_raw=True)
    return archive


def main() -> None:
    """Parse the arguments, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cells", type=int, default=40_000, help="rows of an epoch")
    parser.add_argument("--workers", type=int, default=0)
    arguments = parser.parse_args()
    archive = archive_of(arguments.source)
    dataset = SingleCellMemMapDataset(archive)
    for batch_size in arguments.batch_size:
        alternatives = loaders(archive, arguments.cells, batch_size, arguments.workers)
        cells = min(arguments.cells, len(dataset)) // batch_size * batch_size
        if cells == min(arguments.cells, len(dataset)):
            sums = {what: checked_sum(make()) for what, make in alternatives.items()}
            if len({round(value, 1) for value in sums.values()}) != 1:
                raise SystemExit(f"the loaders disagree: {sums}")
        size_bytes = int(dataset.row_index[cells]) * (dataset.data.itemsize + 4)
        runs = {what: lambda make=make: drain(make()) for what, make in alternatives.items()}  # type: ignore[misc]
        results = bench.interleaved(runs, count=cells, rounds=arguments.rounds, size_bytes=size_bytes)
        for result in results:
            print(bench.json_line(result, batch_size=batch_size, workers=arguments.workers, cache="warm", archive=archive.name))
        print(f"\nbatch size {batch_size}, {arguments.workers} workers, {cells:,} cells a round\n{bench.table(results)}\n")


if __name__ == "__main__":
    main()
