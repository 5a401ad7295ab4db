"""Bytes per nonzero of packed archives, beside the h5ad, bionemo-scdl's layout, and zarr with lz4 and zstd.

    python benchmarks/packed_size.py FILE.h5ad ... [--out DIRECTORY]

Files whose values are not all whole numbers of 1 and more are left out. "rows" are payload and row table of the packed archive,
"files" its shards whole, with gene orders and padding; both without obs and var. bionemo-scdl's three arrays are float32, uint32
and uint64, as its constructor writes them. zarr holds the same CSR (float32, int32, int64) in chunks of 65,536 elements, byte
shuffle, Blosc's lz4 and zstd at level 5. The h5ad is the whole file, tables included. Every archive is unpacked, and compared.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from scdl_gpu import bench, convert_h5ad
from scdl_gpu.archive.raw import RawArchive, open_raw
from scdl_gpu.pack import pack, unpack

CHUNK = 1 << 16


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


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, help="where archives are written; a temporary directory of the system otherwise")
    arguments = parser.parse_args()
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
