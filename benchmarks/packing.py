"""Nonzeros per second of packing and unpacking an archive, warm, disk aside.

    python benchmarks/packing.py [ARCHIVE] [--rows 40000] [--genes 36000] [--per-row 1500] [--rounds 5] [--out DIRECTORY]

Without an archive, made-up counts: genes are drawn by a power law, values geometrically. Everything that takes turns runs in this
process, warmed up: "encode" is the whole way of rows from the maps of a raw archive through canonical form, ranking and encoding
by all threads, words dropped; "pack" writes an archive too, fsync included; "unpack" is the way back; "convert --packed" packs
the same rows from an uncompressed h5ad. --out: a directory in memory (/dev/shm) leaves the disk out of all of them.
"""

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import scipy.sparse as sp

from scdl_gpu import bench, convert_h5ad
from scdl_gpu.archive.raw import RawArchive, open_raw
from scdl_gpu.convert.archive_source import open_archive
from scdl_gpu.convert.block import ahead
from scdl_gpu.pack import pack, unpack
from scdl_gpu.pack.canonical import Canon
from scdl_gpu.pack.encode import Encoder
from scdl_gpu.pack.gene_orders import Size, learn
from scdl_gpu.pack.sample import sample
from scdl_gpu.pack.series import SHARD_BYTES


def made_up(rows: int, genes: int, per_row: int) -> sp.csr_matrix:
    """Make counts like those of cells; a few thousand rows, repeated."""
    random = np.random.default_rng(0)
    chance = 1 / np.arange(1, genes + 1) ** 0.9
    places = random.permutation(genes)
    drawn = [places[np.unique(random.choice(genes, int(1.5 * per_row), p=chance / chance.sum()))] for _ in range(min(rows, 500))]
    indices = [np.sort(random.choice(one, min(one.size, per_row), replace=False)) for one in drawn]
    indptr = np.cumsum([0, *(one.size for one in indices)])
    values = np.minimum(random.geometric(0.6, indptr[-1]), 255).astype(np.float32)
    part = sp.csr_matrix((values, np.concatenate(indices).astype(np.int32), indptr), shape=(len(indices), genes))
    return sp.vstack([part] * -(-rows // part.shape[0])).tocsr()[:rows]


def encoding(path: Path) -> Callable[[], None]:
    """Return what encodes all rows of a raw archive and drops the words."""
    archive, matrix = open_archive(path)
    canon = Canon(str(path), matrix.shape[1], archive.data.dtype)
    ranks = learn(sample([matrix], [canon]), matrix.shape[1], Size(archive.nnz, SHARD_BYTES)).ranks

    def run() -> None:
        for piece in Encoder(canon, ranks, None).pieces(ahead(matrix.blocks(path))):
            del piece

    return run


def alternatives(raw: RawArchive, h5ad: Path | None, folder: Path) -> dict[str, Callable[[], Any]]:
    """Return what is measured, by name."""

    def fresh(name: str) -> Path:
        shutil.rmtree(folder / name, ignore_errors=True)
        return folder / name

    pack(raw.path, fresh("packed"), progress=False)
    found: dict[str, Callable[[], Any]] = {
        "encode": encoding(raw.path),
        "pack": lambda: pack(raw.path, fresh("again"), progress=False),
        "unpack": lambda: unpack(folder / "packed", fresh("unpacked"), progress=False),
    }
    if h5ad is not None:
        found["convert --packed"] = lambda: convert_h5ad(h5ad, fresh("converted"), packed=True, progress=False)
    return found


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path, nargs="?")
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--genes", type=int, default=36_000)
    parser.add_argument("--per-row", type=int, default=1_500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="where archives are written; a temporary directory of the system otherwise")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.out) as name:
        folder, h5ad = Path(name), None
        if arguments.archive is None:
            h5ad = folder / "source.h5ad"
            anndata.AnnData(made_up(arguments.rows, arguments.genes, arguments.per_row)).write_h5ad(h5ad)
            convert_h5ad(h5ad, folder / "raw", progress=False)
        raw = open_raw(arguments.archive or folder / "raw")
        size = sum(array.nbytes for array in (raw.indptr, raw.indices, raw.data))
        results = bench.interleaved(alternatives(raw, h5ad, folder), count=raw.nnz, rounds=arguments.rounds, size_bytes=size)
        for result in results:
            print(bench.json_line(result, "nonzeros", rows=raw.n_rows, nonzeros=raw.nnz))
        print(f"\n{raw.n_rows:,} rows, {raw.nnz:,} nonzeros, {size / 1e9:.2f} GB raw\n{bench.table(results, 'nonzeros')}")


if __name__ == "__main__":
    main()
