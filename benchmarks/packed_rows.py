"""Nonzeros per second of the kernels of packed rows on one CPU thread, beside the gather of the same raw rows.

    python benchmarks/packed_rows.py [ARCHIVE|H5AD] [--batch-size 256] [--rounds 15] [--cells 6000]

Without a source, cells with Tahoe-like popularity of genes are drawn from a seed. Batches of random rows become int32 columns
and float32 values, in the gene order learnt on the same rows, row checks included; all outputs are compared before anything
is measured. The alternatives take turns in one process, rows warm in memory; a line's ratio is to the raw gather, the last.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scdl_gpu import bench
from scdl_gpu.kernels import cpu, encode, packed, shards

NOTHING = np.empty(0, np.int32)
KIND = shards.kind_of("float32")


class Rows(NamedTuple):
    """Canonical rows: (n + 1,) int64, (nnz,) uint32, (nnz,) of a source dtype; and the number of genes."""

    indptr: np.ndarray
    columns: np.ndarray
    values: np.ndarray
    n_vars: int


def drawn(n_rows: int, n_vars: int = 62_710, expressed: int = 20_000, depth: int = 2_300) -> Rows:
    """Draw cells: a log-normal popularity of genes (sigma 1.84, as in Tahoe-100M) and about `depth` molecules a cell."""
    random = np.random.default_rng(0)
    popularity = np.zeros(n_vars)
    popularity[random.choice(n_vars, min(expressed, n_vars), replace=False)] = random.lognormal(0, 1.84, min(expressed, n_vars))
    bounds = np.cumsum(popularity / popularity.sum())
    cells = []
    for _ in range(n_rows):
        molecules = random.random(max(1, int(depth * random.lognormal(0, 0.4))))
        cells.append(np.unique(np.minimum(np.searchsorted(bounds, molecules), n_vars - 1), return_counts=True))
    indptr = np.cumsum([0, *(len(columns) for columns, _ in cells)])
    columns, values = (np.concatenate([cell[k] for cell in cells]) for k in (0, 1))
    return Rows(indptr, columns.astype(np.uint32), values.astype(np.float32), n_vars)


def loaded(source: Path, n_rows: int) -> Rows:
    """Read the first rows of an archive, or of what an h5ad is converted to, beside it."""
    from dataloader import archive_of

    from scdl_gpu import SingleCellMemMapDataset

    dataset = SingleCellMemMapDataset(archive_of(source))
    indptr = np.asarray(dataset.row_index)[: n_rows + 1].astype(np.int64)
    n_vars = dataset.number_of_variables()[0]
    return Rows(indptr, np.asarray(dataset.col_index[: indptr[-1]], np.uint32), np.asarray(dataset.data[: indptr[-1]]), n_vars)


class Encoded:
    """The rows packed, in the order of how many cells express each gene, or with `orders` of the identity only."""

    def __init__(self, rows: Rows, *, is_ranked: bool) -> None:
        by_cells = np.argsort(-np.bincount(rows.columns, minlength=rows.n_vars), kind="stable")
        self.table = by_cells.astype(np.uint16 if rows.n_vars <= 1 << 16 else np.uint32) if is_ranked else None
        self.ranks = np.argsort(by_cells).astype(np.uint32) if is_ranked else np.empty(0, np.uint32)
        self.source, self.rows = packed.source_code(rows.values.dtype), rows
        self.words = np.zeros(sum(packed.most_words(int(n), self.source) for n in np.diff(rows.indptr)) + 64, np.uint32)
        self.entries = np.zeros(rows.indptr.size, packed.ENTRY)
        self.n_words = int(self.encode())
        self.entries[-1]["offset"] = self.n_words

    def encode(self) -> Any:
        """Encode all rows; returns the words they take."""
        rows = self.rows
        return encode.encode_rows(
            rows.indptr, rows.columns, rows.values, self.source, self.ranks, 0, 0, self.words[:-64], self.entries[:-1]
        )  # fmt: skip

    def decoder(self, batches: np.ndarray, indptrs: list[np.ndarray], out: tuple[np.ndarray, np.ndarray], *, is_stored: bool) -> Any:
        """Make a run over all batches. is_stored: leave ranks as they are."""
        table = packed.shard_entry(self.words, self.n_words, self.source)
        orders = packed.order_entry(None if is_stored else self.table)
        described = [packed.rows_of(self.entries, batch)[0] for batch in batches]
        fault = np.full(shards.FAULTS, shards.NO_FAULT, np.int32)

        def run() -> None:
            for rows, indptr in zip(described, indptrs, strict=True):
                nnz = indptr[-1]
                cpu.decode_csr(
                    table, orders, NOTHING, rows, NOTHING, indptr, self.rows.n_vars, indptr, KIND, out[0][:nnz], out[1][:nnz], fault
                )  # fmt: skip
            if fault.min() < shards.NO_FAULT:
                raise ValueError(f"rows do not decode: faults {fault}")

        return run


def raw_gather(rows: Rows, batches: np.ndarray, indptrs: list[np.ndarray], out: tuple[np.ndarray, np.ndarray]) -> Callable[[], None]:
    """Make a run of gather_csr over all batches, from columns of 16 bits where these suffice."""
    columns = rows.columns.astype(np.uint16) if rows.n_vars <= 1 << 16 else rows.columns
    values = rows.values if rows.values.dtype.kind in "uf" else rows.values.astype(np.float32)
    table = shards.entry(columns, values, is_sorted=True)
    starts = [rows.indptr[batch] for batch in batches]
    fault = np.full(shards.FAULTS, shards.NO_FAULT, np.int32)

    def run() -> None:
        for start, indptr in zip(starts, indptrs, strict=True):
            nnz = indptr[-1]
            cpu.gather_csr(
                table, NOTHING, start, NOTHING, indptr, rows.n_vars, indptr, KIND, out[0][:nnz], out[1][:nnz], fault
            )  # fmt: skip

    run.columns = columns  # type: ignore[attr-defined]  # the table holds addresses only
    run.values = values  # type: ignore[attr-defined]
    return run


def alternatives(rows: Rows, batch_size: int) -> tuple[dict[str, Callable[[], Any]], dict[str, Callable[[], Any]], int, float]:
    """Make the runs over batches of random rows, and those over all rows; the nonzeros of the first, bytes a nonzero when packed."""
    n_rows = rows.indptr.size - 1
    batches = np.random.default_rng(1).permutation(n_rows)[: n_rows // batch_size * batch_size].reshape(-1, batch_size)
    lengths = np.diff(rows.indptr)
    indptrs = [np.concatenate([[0], np.cumsum(lengths[batch])]).astype(np.int32) for batch in batches]
    nnz = int(sum(indptr[-1] for indptr in indptrs))
    out = np.zeros(int(max(indptr[-1] for indptr in indptrs)), np.int32), np.zeros(int(max(indptr[-1] for indptr in indptrs)), np.float32)
    ranked, plain = Encoded(rows, is_ranked=True), Encoded(rows, is_ranked=False)
    decodes = {
        "decode_csr, var order": ranked.decoder(batches, indptrs, out, is_stored=False),
        "decode_csr, stored order": ranked.decoder(batches, indptrs, out, is_stored=True),
        "decode_csr, identity order": plain.decoder(batches, indptrs, out, is_stored=False),
        "gather_csr, raw": raw_gather(rows, batches, indptrs, out),
    }
    made = []
    for name in ("decode_csr, var order", "decode_csr, identity order", "gather_csr, raw"):
        decodes[name]()
        made.append([part[: indptrs[-1][-1]].copy() for part in out])
    if not all(np.array_equal(a, b) for other in made[:2] for a, b in zip(other, made[2], strict=True)):
        raise ValueError("packed and raw rows differ")
    encodes = {"encode_rows, ranked": ranked.encode, "encode_rows, identity": plain.encode}
    return decodes, encodes, nnz, (4 * ranked.n_words + ranked.entries.nbytes) / rows.indptr[-1]


def main() -> None:
    """Parse the arguments, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, nargs="?")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cells", type=int, default=6_000, help="rows to use")
    arguments = parser.parse_args()
    rows = drawn(arguments.cells) if arguments.source is None else loaded(arguments.source, arguments.cells)
    batch_size = min(arguments.batch_size, rows.indptr.size - 1)
    decodes, encodes, nnz, packed_bytes = alternatives(rows, batch_size)
    results = bench.interleaved(decodes, count=nnz, rounds=arguments.rounds)
    written = bench.interleaved(encodes, count=int(rows.indptr[-1]), rounds=arguments.rounds)
    for result in (*written, *results):
        print(bench.json_line(result, batch_size=batch_size, source="drawn" if arguments.source is None else arguments.source.name))
    print(f"\n{rows.indptr.size - 1:,} rows of {rows.indptr[-1] / (rows.indptr.size - 1):.0f} nonzeros, {packed_bytes:.3f} B/nnz packed")
    for result in (*written, *results):
        print(f"{result.what:28} {result.per_second / 1e9:6.3f} G nonzeros/s  {result.per_second / results[-1].per_second:5.2f}")


if __name__ == "__main__":
    main()
