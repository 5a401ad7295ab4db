"""Bytes per nonzero of packed archives, beside the h5ad, bionemo-scdl's layout, and zarr with lz4 and zstd.

    python benchmarks/packed_size.py FILE.h5ad ... [--out DIRECTORY]
    python benchmarks/packed_size.py --tahoe PLATE.h5ad ... [--like REAL.h5ad IMITATION.h5ad] ... [--out DIRECTORY]

Files whose values are not all whole numbers of 1 and more are left out. "rows" are payload and row table of the packed archive,
"files" its shards whole, with gene orders and padding; both without obs and var. bionemo-scdl's three arrays are float32, uint32
and uint64, as its constructor writes them. zarr holds the same CSR (float32, int32, int64) in chunks of 65,536 elements, byte
shuffle, Blosc's lz4 and zstd at level 5. The h5ad is the whole file, tables included. Every archive is unpacked, and compared.

--tahoe extrapolates to Tahoe-100M, whose cells and nonzeros are known exactly, from plates like its own (two files or more). Each
is packed whole, and every second and fourth row of it. Payload bytes per nonzero grow as the gene order, learnt on up to 4,096
rows, knows fewer of the rows: a line through the largest two, over the share of rows that it knows, ends at share 0, as for a plate
of millions. A second line, over nonzeros per row, gives the mean row of Tahoe. The row table is exact, gene orders and padding are
those of shards of 512 MiB. The error bar adds up in squares: the spread of plates about the second line, half of what the first one
added, and how far imitations of real files are from these (--like, the largest), since plates that are made are imitations.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import scipy.sparse as sp

from scdl_gpu import bench, convert_h5ad
from scdl_gpu.archive.raw import RawArchive, open_raw
from scdl_gpu.pack import pack, unpack
from scdl_gpu.pack.archive import Options, pack_sources
from scdl_gpu.pack.sample import ROWS

CHUNK = 1 << 16
TAHOE_ROWS, TAHOE_NNZ, TAHOE_GENES = 100_648_790, 145_997_980_995, 62_710
SHARD = 512 << 20
PADDING = 4096 + 3 * 4096
"""Bytes of a shard beside orders, rows and payload: the header, and at most a page after each section."""
STEPS = (4, 2, 1)


def is_counts(archive: RawArchive) -> bool:
    """Tell whether all values are whole numbers of 1 and more."""
    return bool(archive.data.dtype.kind == "u" and archive.nnz)


def zarr_bytes(archive: RawArchive, folder: Path, codec: str) -> int:
    """Write the CSR to a zarr store; return the bytes of its files."""
    import zarr
    from zarr.codecs import BloscCodec

    store = zarr.open_group(folder, mode="w")
    for name, array, dtype in (("indptr", archive.indptr, "i8"), ("indices", archive.indices, "i4"), ("data", archive.data, "f4")):
        values = np.asarray(array).astype(dtype)
        compressor = BloscCodec(cname=codec, clevel=5, shuffle="shuffle", typesize=values.itemsize)
        store.create_array(name, data=values, chunks=(min(CHUNK, values.size),), compressors=[compressor])
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def check(raw: RawArchive, packed: Path, folder: Path) -> None:
    """Raise SystemExit unless the packed archive unpacks to the raw one."""
    again = open_raw(unpack(packed, folder / "again", progress=False))
    for name in ("indptr", "indices", "data"):
        if not np.array_equal(getattr(raw, name), getattr(again, name)):
            raise SystemExit(f"{packed}: {name} differs after unpacking")


def measure(source: Path, folder: Path) -> dict[str, Any] | None:
    """Return the bytes of each form of a file, None where it holds no counts."""
    raw = open_raw(convert_h5ad(source, folder / "raw", progress=False))
    if not is_counts(raw):
        return None
    report = pack(raw.path, folder / "packed", progress=False)
    check(raw, folder / "packed", folder)
    sizes = {
        "rows": report.packed_bytes,
        "files": report.shard_bytes,
        "h5ad": source.stat().st_size,
        "scdl": 8 * raw.nnz + 8 * (raw.n_rows + 1),
        "zarr lz4": zarr_bytes(raw, folder / "lz4.zarr", "lz4"),
        "zarr zstd": zarr_bytes(raw, folder / "zstd.zarr", "zstd"),
    }
    each = {what: round(size / raw.nnz, 4) for what, size in sizes.items()}
    return {"file": source.name, "rows": raw.n_rows, "genes": report.n_vars, "nonzeros": raw.nnz, "bytes_per_nonzero": each, "bytes": sizes}


def payload(source: Any, folder: Path) -> tuple[float, int, int]:
    """Pack a matrix or a file; return payload bytes per nonzero, nonzeros and rows."""
    report = pack_sources([source], folder / "packed", Options(progress=False))
    return (report.packed_bytes - 16 * (report.n_rows + report.n_shards)) / report.nnz, report.nnz, report.n_rows


def plate(source: Path, out: Path | None) -> dict[str, Any]:
    """Measure a plate at each of STEPS, and extrapolate to rows that the gene order has not seen."""
    x = sp.csr_matrix(anndata.read_h5ad(source).X)
    x = sp.csr_matrix((x.data, x.indices.astype(x.indptr.dtype), x.indptr), x.shape)  # SciPy slices by rows only where both agree
    each, known = [], []
    for step in STEPS:
        with tempfile.TemporaryDirectory(dir=out) as folder:
            found, nnz, n_rows = payload(x[::step], Path(folder))
        each.append(found)
        known.append(min(1.0, ROWS / n_rows))
    slope = (each[-1] - each[-2]) / (known[-1] - known[-2]) if known[-1] != known[-2] else 0.0
    return {"file": source.name, "nnz_per_row": nnz / n_rows, "rows": n_rows, "payload": each, "unseen": each[-1] - slope * known[-1]}


def imitation(real: Path, made: Path, out: Path | None) -> float:
    """Return by which share the payload bytes per nonzero of a real file exceed those of its imitation."""
    sizes = []
    for source in (real, made):
        with tempfile.TemporaryDirectory(dir=out) as folder:
            sizes.append(payload(source, Path(folder))[0])
    print(json.dumps({"real": real.name, "payload": round(sizes[0], 4), "imitation": round(sizes[1], 4)}))
    return sizes[0] / sizes[1] - 1


def tahoe(plates: list[Path], pairs: list[tuple[Path, Path]], out: Path | None) -> None:
    """Extrapolate to Tahoe-100M, and print it with its error bar."""
    if len(plates) < 2:
        raise SystemExit("--tahoe needs two plates or more: their spread is part of the error")
    found = [plate(source, out) for source in plates]
    print(
        f"payload bytes per nonzero\n{'':24}{'rows':>9}{'nnz/row':>9}" + "".join(f"{f'1/{step}':>9}" for step in STEPS) + f"{'unseen':>9}"
    )
    for one in found:
        numbers = "".join(f"{size:9.4f}" for size in (*one["payload"], one["unseen"]))
        print(f"{one['file']:24}{one['rows']:9,}{one['nnz_per_row']:9.0f}{numbers}")
    depths, unseen = (np.array([one[name] for one in found]) for name in ("nnz_per_row", "unseen"))
    degree = 1 if len(found) > 3 else 0
    line = np.polynomial.Polynomial.fit(depths, unseen, degree)
    each = float(line(np.clip(TAHOE_NNZ / TAHOE_ROWS, depths.min(), depths.max())))  # a line says nothing beyond its plates
    seen = np.array([one["payload"][-1] for one in found])
    errors = {
        "plates": float(np.sqrt(np.sum((unseen - line(depths)) ** 2) / (len(found) - degree - 1))),
        "rows the order knows": float(np.mean(unseen - seen)) / 2,
        "imitation": each * max((abs(imitation(*pair, out)) for pair in pairs), default=0.0),
    }
    error = float(np.sqrt(sum(value**2 for value in errors.values())))
    rows = 16 * TAHOE_ROWS
    total = each * TAHOE_NNZ + rows
    files = total + -(-total // SHARD) * (2 * TAHOE_GENES + PADDING)
    result = {
        "what": "Tahoe-100M", "payload_per_nonzero": each, "error_per_nonzero": error, "errors": errors, "row_table_bytes": rows,
        "rows_bytes": total, "files_bytes": files, "error_bytes": error * TAHOE_NNZ,
    }  # fmt: skip
    print(json.dumps(result | bench.machine()))
    print(
        f"Tahoe-100M, {TAHOE_NNZ:,} nonzeros: {each:.3f} +- {error:.3f} bytes each and {rows / 1e9:.2f} GB of row tables: "
        f"{total / 1e9:.1f} +- {error * TAHOE_NNZ / 1e9:.1f} GB ({total / TAHOE_NNZ:.3f} bytes per nonzero), "
        f"{files / 1e9:.1f} GB of files without obs"
    )


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, help="where archives are written; a temporary directory of the system otherwise")
    parser.add_argument("--tahoe", action="store_true", help="extrapolate from plates to Tahoe-100M")
    parser.add_argument("--like", type=Path, nargs=2, action="append", default=[], metavar=("REAL", "IMITATION"))
    arguments = parser.parse_args()
    if arguments.like and not arguments.tahoe:
        parser.error("--like belongs to --tahoe")
    if arguments.tahoe:
        tahoe(arguments.files, arguments.like, arguments.out)
        return
    found = []
    for source in arguments.files:
        with tempfile.TemporaryDirectory(dir=arguments.out) as folder:
            result = measure(source, Path(folder))
        if result is None:
            print(f"{source.name}: no counts, left out")
            continue
        found.append(result)
        print(json.dumps(result | bench.machine()))
    if not found:
        raise SystemExit("no file of counts")
    columns = list(found[0]["bytes_per_nonzero"])
    width = max(len(one["file"]) for one in found)
    print(f"\nbytes per nonzero\n{'':{width}}  {'nnz/row':>8}" + "".join(f"  {name:>9}" for name in columns))
    for one in found:
        each = "".join(f"  {one['bytes_per_nonzero'][name]:9.3f}" for name in columns)
        print(f"{one['file']:{width}}  {one['nonzeros'] / max(1, one['rows']):8.0f}{each}")


if __name__ == "__main__":
    main()
