"""Packed archives for the tests of datasets and loaders: shards of few rows, gene orders at random, the cells of `cells`.

Needs no anndata, and nothing of `scdl_gpu.pack`: rows are packed by the kernel alone.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from cells import genes, obs_of

from scdl_gpu.archive.features import ObservedFeatureIndex, VariableFeatureIndex
from scdl_gpu.archive.packed import finish_packed
from scdl_gpu.archive.packed_shard import order_dtype
from scdl_gpu.archive.packed_writer import ShardWriter, shard_name
from scdl_gpu.kernels.encode import encode_rows
from scdl_gpu.kernels.packed import ENTRY, most_words, source_code

ROWS = 40
"""Of a shard."""


def orders_of(n: int, n_vars: int, seed: int = 0) -> list[np.ndarray | None]:
    """Draw n gene orders; 0: the identity alone."""
    random = np.random.default_rng(seed)
    return [random.permutation(n_vars).astype(order_dtype(n_vars)) for _ in range(n)] or [None]


def write_packed(
    path: Path, x: sp.csr_matrix, source: str = "float32", *, orders: int | Sequence[np.ndarray | None] = 1, rows: int = ROWS, seed: int = 0
) -> Path:
    """Write a packed archive of `x`, with names and obs columns as `cells.write` has them.

    source: the dtype of values, x has them in any that holds them. orders: gene orders, row i has order i % len(orders), or how many
    are to be drawn. rows: of a shard. seed: of obs, as of `cells.write`.
    """
    path.mkdir()
    tables = orders_of(orders, x.shape[1]) if isinstance(orders, int) else list(orders)
    records = []
    for number, first in enumerate(range(0, x.shape[0], rows)):
        with ShardWriter(path, shard_name(number), source=source_code(source), n_vars=x.shape[1]) as writer:
            for row in range(first, min(first + rows, x.shape[0])):
                _append(writer, x[row], source, row % len(tables), tables)
            records.append(writer.finish(tables))
    table = obs_of(x.shape[0], seed)
    var, obs = VariableFeatureIndex(), ObservedFeatureIndex()
    var.append_features(x.shape[0], {"symbol": np.array(genes(x.shape[1]))}, names=genes(x.shape[1]))
    obs.append_features({name: table[name] for name in table.columns}, names=list(table.index))
    finish_packed(path, shards=records, var=var, obs=obs)
    return path


def _append(writer: ShardWriter, row: sp.csr_matrix, source: str, number: int, tables: Sequence[np.ndarray | None]) -> None:
    table = tables[number]
    ranks = np.zeros(0, np.uint32) if table is None else np.argsort(table).astype(np.uint32)
    code = source_code(source)
    words, entries = np.zeros(most_words(row.nnz, code), np.uint32), np.zeros(1, ENTRY)
    values = row.data.astype(source)
    bits = values.view({"bool": np.uint8, "float16": np.uint16}.get(source, source))
    n_words = encode_rows(
        np.array([0, row.nnz]), row.indices.astype(np.uint32), bits, code, ranks, number, 0, words, entries
    )  # fmt: skip
    writer.append(words[:n_words], entries)


def flip(path: Path, at: int, mask: int = 1) -> None:
    """Change bits of one byte of a file."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ mask]))


def byte_of(shard: Any, row: int) -> int:
    """Where in the file of a shard its row begins."""
    return int(shard.payload_start + 4 * shard.entries["offset"][row])
