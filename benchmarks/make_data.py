"""Write an h5ad file of random counts whose rows and genes look like a full-transcriptome experiment.

    python benchmarks/make_data.py OUT.h5ad --cells 200000 --genes 36000 --nnz 1500 [--layout csr|csc|dense] [--compression gzip]
    python benchmarks/make_data.py tahoe OUT --cells 1000000 [--plates 14] [--genes 62710] [--compression gzip]

The second writes plates like those of Tahoe-100M into the folder OUT (scdl_gpu/bench/plates.py says how). In the first row lengths are
log-normal (sigma 0.46), genes are drawn by a log-normal popularity (sigma 1.8), counts are geometric with mean 1.6. Written in blocks:
memory does not grow with --cells. CSC is made from all of it in memory.
"""

import argparse
import sys
import time
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

BLOCK = 2_000


def block(rng: np.random.Generator, n_rows: int, n_vars: int, nnz: int, popularity: np.ndarray) -> sp.csr_matrix:
    """Draw `n_rows` rows; duplicates of a gene within a row are drawn once."""
    lengths = np.clip(rng.lognormal(np.log(nnz * 1.12) - 0.46**2 / 2, 0.46, n_rows), 1, n_vars // 2).astype(np.int64)
    genes = np.searchsorted(popularity, rng.random(lengths.sum()))
    rows = np.repeat(np.arange(n_rows), lengths)
    keys = np.unique(rows * n_vars + genes)
    rows, genes = np.divmod(keys, n_vars)
    indptr = np.concatenate(([0], np.cumsum(np.bincount(rows, minlength=n_rows))))
    values = rng.geometric(1 / 1.6, keys.size).astype(np.float32)
    return sp.csr_matrix((values, genes.astype(np.int32), indptr), shape=(n_rows, n_vars))


def write(path: Path, cells: int, genes: int, nnz: int, *, layout: str = "csr", compression: str | None = None, seed: int = 0) -> None:
    """Write the file; a function of the arguments alone."""
    rng = np.random.default_rng(seed)
    weights = rng.permutation(np.exp(1.8 * rng.standard_normal(genes)))
    popularity = np.cumsum(weights / weights.sum())
    obs = pd.DataFrame(
        {"plate": pd.Categorical([f"plate{i * 14 // cells}" for i in range(cells)]), "depth": rng.random(cells)},
        index=[f"cell{i}" for i in range(cells)],
    )
    ad.AnnData(obs=obs, var=pd.DataFrame(index=[f"gene{i}" for i in range(genes)])).write_h5ad(path)
    sizes = [min(BLOCK, cells - start) for start in range(0, cells, BLOCK)]
    blocks = (block(np.random.default_rng([seed, number]), size, genes, nnz, popularity) for number, size in enumerate(sizes))
    with h5py.File(path, "a") as file:
        if "X" in file:
            del file["X"]
        if layout == "dense":
            x = file.create_dataset("X", (cells, genes), np.float32, chunks=True, compression=compression)
            x.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
            start = 0
            for part in blocks:
                x[start : start + part.shape[0]] = part.toarray()
                start += part.shape[0]
            return
        group = file.create_group("X")
        group.attrs.update({"encoding-type": f"{layout}_matrix", "encoding-version": "0.1.0", "shape": (cells, genes)})
        if layout == "csc":
            whole = sp.vstack(list(blocks), format="csr").tocsc()
            for name in ("data", "indices", "indptr"):
                group.create_dataset(name, data=getattr(whole, name), compression=compression)
            return
        data, indices = (group.create_dataset(name, (0,), dtype, maxshape=(None,), chunks=(1 << 17,), compression=compression)
                         for name, dtype in (("data", np.float32), ("indices", np.int32)))  # fmt: skip
        indptr = [np.zeros(1, np.int64)]
        for part in blocks:
            end = data.shape[0] + part.nnz
            for target, values in ((data, part.data), (indices, part.indices)):
                target.resize((end,))
                target[end - part.nnz :] = values
            indptr.append(part.indptr[1:].astype(np.int64) + end - part.nnz)
        group.create_dataset("indptr", data=np.concatenate(indptr))


def write_tahoe(words: list[str]) -> None:
    """Parse the arguments that follow `tahoe`, write plates, say how fast."""
    from scdl_gpu.bench.plates import GENES, PLATES, write_plates

    parser = argparse.ArgumentParser(prog="make_data.py tahoe", description=write_plates.__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cells", type=int, default=20_000)
    parser.add_argument("--plates", type=int, default=PLATES)
    parser.add_argument("--genes", type=int, default=GENES)
    parser.add_argument("--compression", choices=["gzip", "lzf"])
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(words)
    start = last = time.perf_counter()

    def told(done: int, total: int) -> None:
        nonlocal last
        if time.perf_counter() - last > 5 or done == total:
            last = time.perf_counter()
            print(f"{done:,} of {total:,} cells, {done / (last - start):,.0f} cells/s", flush=True)

    paths = write_plates(
        given.out, given.cells, n_plates=given.plates, n_vars=given.genes, seed=given.seed, compression=given.compression, told=told
    )
    print(f"{len(paths)} plates, {sum(path.stat().st_size for path in paths) / 1e6:,.0f} MB, {time.perf_counter() - start:.1f} s")


def main() -> None:
    """Parse the arguments and write."""
    if sys.argv[1:2] == ["tahoe"]:
        write_tahoe(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cells", type=int, default=200_000)
    parser.add_argument("--genes", type=int, default=36_000)
    parser.add_argument("--nnz", type=int, default=1_500, help="mean nonzeros a cell")
    parser.add_argument("--layout", choices=["csr", "csc", "dense"], default="csr")
    parser.add_argument("--compression", choices=["gzip", "lzf"])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write(arguments.out, arguments.cells, arguments.genes, arguments.nnz,
          layout=arguments.layout, compression=arguments.compression, seed=arguments.seed)  # fmt: skip


if __name__ == "__main__":
    main()
