"""Facts about an opened archive: counts, dtypes, sizes, columns.

Knows what is worth telling, not how it is printed. Only what opening has read is used: it takes milliseconds, however
many rows there are.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scdl_gpu.archive.packed import PackedArchive
    from scdl_gpu.archive.parts import Archive
    from scdl_gpu.archive.raw import RawArchive

GENERATIONS = {
    "A": "without header (bionemo-scdl 0.0.7 and older)",
    "B": "one feature index (bionemo-scdl 0.1.0 to 0.1.2)",
    "C": "labels.npy (bionemo-scdl 0.1.3)",
    "D": "labels.json (bionemo-scdl's main, scdl_gpu)",
}
"""The four kinds of raw archives in the wild, by what tells them apart."""

ARRAYS = {"data": "data.npy", "indices": "col_ptr.npy", "indptr": "row_ptr.npy"}


def facts(archive: "Archive") -> dict[str, Any]:
    """Describe an archive: values that JSON knows, by name."""
    from scdl_gpu.archive.kinds import kinds, partial

    n_vars = archive.var.column_dims()
    n_values = sum(archive.var.number_of_values())
    var_names = [block.has_names for block in archive.var.blocks]
    return {
        "path": str(archive.path),
        "cells": archive.n_rows,
        "genes": n_vars,
        "blocks": _blocks(archive),
        "nonzeros": archive.nnz,
        "sparsity": 1 - archive.nnz / n_values if n_values else None,
        **_rows(archive),
        "obs": kinds(archive.obs),
        "var": kinds(archive.var),
        "obs_blocks": {"count": len(archive.obs.blocks), "partial": partial(archive.obs)},
        "obs_names": any(block.has_names for block in archive.obs.blocks),
        "var_names": bool(var_names) and all(var_names),
        **_extras(archive),
        "canonical": True if archive.canonical else None,
        "matrix": archive.metadata.get("x"),
        "source": archive.metadata.get("source"),
        "schema_version": None if archive.header is None else str(archive.header.version),
        "written_by": _written_by(archive.path),
    }


def _rows(archive: "Archive") -> dict[str, Any]:
    """Tell how the rows are stored, and in how many bytes: columns and values, and what says where each row is."""
    from scdl_gpu.archive.raw import RawArchive

    found = _raw(archive) if isinstance(archive, RawArchive) else _packed(archive)
    found["size_bytes"] = sum(file.stat().st_size for file in archive.path.rglob("*") if file.is_file())
    return found | {"bytes_per_nonzero": found["array_bytes"] / archive.nnz if archive.nnz else None}


def _raw(archive: "RawArchive") -> dict[str, Any]:
    return {
        "dtypes": {name: archive.dtypes[file] for name, file in ARRAYS.items()},
        "array_bytes": sum(array.nbytes for array in (archive.data, archive.indices, archive.indptr)),
        "generation": archive.generation,
        "packed": None,
    }


def _packed(archive: "PackedArchive") -> dict[str, Any]:
    orders = {order.digest for shard in archive.shards for order in shard.orders}
    return {
        "dtypes": {"data": archive.dtype.name},
        "array_bytes": sum(4 * shard.n_words + shard.entries.nbytes for shard in archive.shards),
        "generation": None,
        "packed": {"version": archive.metadata["packed"]["version"], "shards": len(archive.shards), "gene_orders": len(orders)},
    }


def _blocks(archive: "Archive") -> list[dict[str, int | str | None]]:
    """Count cells and genes of each run of rows with the same genes, and name the first source of each."""
    counts = zip(archive.var.number_of_values(), archive.var.column_dims(), archive.var._labels, strict=False)
    return [{"cells": values // width if width else None, "genes": width, "source": label} for values, width, label in counts]


def _extras(archive: "Archive") -> dict[str, Any]:
    graph = archive.neighbors
    return {
        "neighbors": None if graph is None else {"key": archive.metadata.get("neighbor_key"), "connections": int(graph.indices.size)},
        "obsm": {key: {"shape": list(array.shape), "dtype": array.dtype.name} for key, array in archive.obsm.items()},
        "obsp": {key: {"connections": int(graph.indices.size), "dtype": graph.data.dtype.name} for key, graph in archive.obsp.items()},
    }


def _written_by(path: Path) -> str | None:
    """Read which version of its writer's package made the archive."""
    try:
        version = json.loads((path / "version.json").read_bytes())
    except (OSError, ValueError):
        return None
    return version if isinstance(version, str) else None
