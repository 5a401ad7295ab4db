"""An h5ad becomes an archive, and the archive shuffled batches, as a training loop takes them: `make demo`.

Takes 10x Genomics' PBMC 1k from $SCDL_TEST_DATA (default: shared/data beside the repository), generated counts where it is
not there. What it leaves in demo-data/ it replaces when run again.
"""

import os
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
from torch.utils.data import DataLoader

from scdl_gpu import SingleCellMemMapDataset, collate_sparse_matrix_batch, convert_h5ad

ROOT = Path(__file__).resolve().parents[1]
H5AD = Path(os.environ.get("SCDL_TEST_DATA") or ROOT.parent / "shared" / "data") / "pbmc_1k_v2.h5ad"
ARCHIVE = ROOT / "demo-data" / "cells"
BATCH_SIZE = 64
SECONDS = 3


def source() -> Any:
    """Return the path of the real file, or a matrix of random counts: 1,000 cells x 30,000 genes, 1,000 of them expressed."""
    if H5AD.is_file():
        print(f"source:   {H5AD.name}, {H5AD.stat().st_size:,} bytes")
        return H5AD
    print(f"source:   generated counts, for there is no {H5AD} (set SCDL_TEST_DATA)")
    random = np.random.default_rng(0)
    genes = np.concatenate([random.choice(30_000, 1_000, replace=False) for _ in range(1_000)])
    counts = random.geometric(0.6, genes.size).astype(np.float32)
    return scipy.sparse.csr_matrix((counts, genes, np.arange(0, genes.size + 1, 1_000)), shape=(1_000, 30_000))


def main() -> None:
    """Convert, open, iterate."""
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")  # torch says so once a process
    shutil.rmtree(ARCHIVE, ignore_errors=True)
    start = time.perf_counter()
    convert_h5ad(source(), ARCHIVE)
    print(f"convert:  {time.perf_counter() - start:.1f} s, the first time mostly compiling; now in {ARCHIVE.relative_to(ROOT)}")

    dataset = SingleCellMemMapDataset(ARCHIVE)
    n_rows, n_vars = dataset.shape()
    nnz, size_bytes = dataset.number_nonzero_values(), sum(file.stat().st_size for file in ARCHIVE.rglob("*") if file.is_file())
    print(f"archive:  {n_rows:,} cells x {n_vars[0]:,} genes, {nnz:,} nonzeros ({100 * dataset.sparsity():.1f} % zeros)")
    print(f"          {size_bytes:,} bytes: values {dataset.dtypes['data.npy']}, columns {dataset.dtypes['col_ptr.npy']}")

    loader = DataLoader(dataset, batch_size=BATCH_SIZE, shuffle=True, collate_fn=collate_sparse_matrix_batch)
    batch = next(iter(loader))  # compiles the gather, once a machine
    print(f"batch:    {batch.layout}, {tuple(batch.shape)}, values {batch.dtype}, columns {batch.col_indices().dtype}")

    n_cells, n_epochs, start = 0, 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < SECONDS:
        n_cells += sum(batch.shape[0] for batch in loader)
        n_epochs += 1
    print(f"iterate:  {n_cells / elapsed:,.0f} cells/s (shuffled, {n_epochs} epochs, batch size {BATCH_SIZE}, no worker processes)")


if __name__ == "__main__":
    main()
