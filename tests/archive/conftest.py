"""Raw archives built byte by byte from their description, without the package's writer.

What a file holds is written here as the format says it; tests change one file and say what must come of it.
"""

import json
import pickle
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse
import xxhash

from scdl_gpu.archive.raw import RawArchive

INDPTR = (0, 2, 3, 3, 5, 8, 9)
INDICES = (0, 3, 1, 2, 4, 0, 1, 4, 3)
VALUES = (1, 2, 3, 4, 5, 6, 7, 8, 9)
GENES = ("g0", "g1", "g2", "g3", "g4")
BATCHES = ("x", "y", "x", None, "z", "x")
DEPTHS = (1.5, 2.5, 3.5, 4.5, 5.5, 6.5)
CODES = {"uint8": 1, "uint16": 2, "uint32": 3, "uint64": 4, "float16": 5, "float32": 6, "float64": 7}


def text(value: str) -> bytes:
    """Write a string as the header holds it."""
    return struct.pack("!I", len(value.encode())) + value.encode()


def header_bytes(
    arrays: Sequence[tuple[str, int, int]],
    indices: Sequence[tuple[str, int, Sequence[str]]] | None,
    *,
    version: tuple[int, int, int] = (0, 1, 0),
    backend: int = 1,
    tail: bytes = b"",
) -> bytes:
    """Write a header. arrays: (name, length, dtype code); indices: (name, rows, files), None for an older header without them."""
    out = b"SCDL" + bytes(version) + b"\x01" + struct.pack("!II", backend, len(arrays))
    for name, length, code in arrays:
        out += text(name) + struct.pack("!QIB", length, code, 0)
    if indices is not None:
        out += struct.pack("!I", len(indices))
        for name, length, files in indices:
            out += text(name) + struct.pack("!QII", length, 8, len(files)) + b"".join(map(text, files)) + b"\x00"
    return out + tail


def write_features(
    directory: Path, tables: Sequence[Mapping[str, Any]], n_rows: Sequence[int], *, labels: Sequence[Any], kind: str
) -> None:
    """Write a feature directory. n_rows: of the dataset, for each table; kind of labels: json, text or pickle."""
    directory.mkdir()
    np.save(directory / "cumulative_sum_index.npy", np.array([-1, *np.cumsum(n_rows)], dtype=np.int64))
    np.save(directory / "version.npy", np.array("0.1.3"))
    if kind == "json":
        (directory / "labels.json").write_text(json.dumps(labels))
    elif kind == "text":
        np.save(directory / "labels.npy", np.array(labels))
    else:
        items = np.empty(len(labels), dtype=object)
        items[:] = [Path(label) for label in labels]
        with (directory / "labels.npy").open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": items.shape})
            pickle.dump(items, file, protocol=4)
    digits = len(str(len(tables)))
    for number, table in enumerate(tables):
        pq.write_table(pa.table(dict(table)), directory / f"dataframe_{number:0{digits}d}.parquet")


def build_archive(path: Path, generation: str, *, data_dtype: str = "float32", recorded: str | None = None, labels: str = "") -> Path:
    """Write the archive of the constants above as generation A, B, C or D writes it.

    recorded: dtype of data.npy in the header, where it is to be another one. labels: json, text or pickle.
    """
    path.mkdir()
    row_dtype, col_dtype = ("uint64", "uint32") if generation in "AB" else ("uint8", "uint8")
    np.array(INDPTR, dtype=row_dtype).tofile(path / "row_ptr.npy")
    np.array(INDICES, dtype=col_dtype).tofile(path / "col_ptr.npy")
    np.array(VALUES, dtype=data_dtype).tofile(path / "data.npy")
    (path / "metadata.json").write_text('{"num_rows": 6}')
    (path / "version.json").write_text('"0.1.3"')
    kind = labels or ("json" if generation == "D" else "text")
    directories = ["features"] if generation in "AB" else ["var_features", "obs_features"]
    write_features(path / directories[0], [{"gene": GENES}], [6], labels=["a.h5ad"], kind=kind)
    if generation in "CD":
        write_features(path / "obs_features", [{"batch": BATCHES, "depth": DEPTHS}], [6], labels=["a.h5ad"], kind=kind)
    if generation != "A":
        arrays = [("DATA", 9, CODES[recorded or data_dtype]), ("ROWPTR", 7, CODES[row_dtype]), ("COLPTR", 9, CODES[col_dtype])]
        indices = [(name, 6, [f"{name}/cumulative_sum_index.npy"]) for name in directories]
        (path / "header.sch").write_bytes(header_bytes(arrays, indices))
    return path


def value_record(path: Path, dtype: str) -> dict[str, str]:
    """Return what metadata.json records of a small data.npy."""
    return {"data_dtype": dtype, "data_head": xxhash.xxh3_64_hexdigest((path / "data.npy").read_bytes())}


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Path]:
    """Give `build(generation, name="archive", ...)`: arguments as `build_archive` above."""

    def make(generation: str = "D", name: str = "archive", **options: Any) -> Path:
        return build_archive(tmp_path / name, generation, **options)

    return make


def csr_archive(
    path: Path,
    csr: Any,
    *,
    dtypes: tuple[str, str, str] = ("float32", "uint32", "uint16"),
    genes: Sequence[str] | None = None,
    obs: Mapping[str, Any] | None = None,
    graph: Any = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write the archive of a SciPy CSR matrix or of (indptr, indices, data, n_vars). dtypes: of values, pointers and columns."""
    indptr, indices, data, n_vars = csr if isinstance(csr, tuple) else (csr.indptr, csr.indices, csr.data, csr.shape[1])
    path.mkdir()
    n_rows = len(indptr) - 1
    for name, array, dtype in zip(("data.npy", "row_ptr.npy", "col_ptr.npy"), (data, indptr, indices), dtypes, strict=True):
        np.asarray(array).astype(dtype).tofile(path / name)
    lengths = (len(data), len(indptr), len(indices))
    arrays = [(name, n, CODES[dtype]) for name, n, dtype in zip(("DATA", "ROWPTR", "COLPTR"), lengths, dtypes, strict=True)]
    (path / "header.sch").write_bytes(header_bytes(arrays, []))
    record = {"num_rows": n_rows, "nnz": len(data)} | (value_record(path, dtypes[0]) if metadata else {})
    (path / "metadata.json").write_text(json.dumps(record | dict(metadata or {})))
    (path / "version.json").write_text('"0.1.3"')
    genes = [f"g{i}" for i in range(n_vars)] if genes is None else genes
    write_features(path / "var_features", [{"gene": genes}], [n_rows], labels=[path.name], kind="json")
    if n_rows:
        obs = {"name": [f"{path.name}{i}" for i in range(n_rows)]} if obs is None else obs
        write_features(path / "obs_features", [obs], [n_rows], labels=[path.name], kind="json")
    if graph is not None:
        for name, array, dtype in zip(
            ("indptr", "indices", "values"), (graph.indptr, graph.indices, graph.data), (8, 4, "f4"), strict=True
        ):
            array.astype(dtype if isinstance(dtype, str) else f"u{dtype}").tofile(path / f"neighbor_{name}.npy")
    return path


@pytest.fixture
def make_csr(tmp_path: Path) -> Callable[..., Path]:
    """Give `make_csr(name, csr, ...)`: arguments as `csr_archive` above."""
    return lambda name, csr, **options: csr_archive(tmp_path / name, csr, **options)


@pytest.fixture
def counts() -> Callable[..., Any]:
    """Give `counts(n_rows, n_vars, seed)`: a SciPy CSR of counts 1 to 9."""

    def make(n_rows: int = 20, n_vars: int = 12, seed: int = 0, density: float = 0.3) -> scipy.sparse.csr_matrix:
        random = np.random.default_rng(seed)
        dense = random.integers(1, 10, (n_rows, n_vars)) * (random.random((n_rows, n_vars)) < density)
        return scipy.sparse.csr_matrix(dense.astype("float32"))

    return make


@pytest.fixture
def make_header() -> Callable[..., bytes]:
    """Give `header_bytes` above."""
    return header_bytes


@pytest.fixture
def make_features() -> Callable[..., None]:
    """Give `write_features` above."""
    return write_features


@pytest.fixture
def expected() -> dict[str, Any]:
    """Give what every built archive holds."""
    return {"indptr": INDPTR, "indices": INDICES, "data": VALUES, "genes": GENES, "batches": BATCHES, "depths": DEPTHS}


@pytest.fixture
def assert_holds() -> Callable[[RawArchive], None]:
    """Give the function that compares the arrays and the genes of an archive with those of every built one."""

    def compare(archive: RawArchive) -> None:
        assert archive.indptr.tolist() == list(INDPTR)
        assert archive.indices.tolist() == list(INDICES)
        assert archive.data.tolist() == list(VALUES)
        [genes] = archive.var.lookup(5, ["gene"])[0]
        assert genes.tolist() == list(GENES)

    return compare
