"""What packing did, in numbers and in words.

Knows sizes and counts; who prints them is the command's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scdl_gpu.archive.packed_shard import PackedShard
from scdl_gpu.pack.canonical import Mended
from scdl_gpu.pack.gene_orders import LEAST_GAIN, Gain

MOST_GROUPS = 10
"""Groups that are named for people."""


@dataclass(frozen=True)
class Report:
    """What packing did.

    packed_bytes: payloads and row tables; shard_bytes: whole files; source_bytes: the arrays of a raw archive, or the h5ad files,
    None in memory. mended: what was not canonical. gains: of the groups that were tried, None where none were asked for.
    taken_over: shards that a writer who died had finished.
    """

    path: Path
    n_rows: int
    n_vars: int
    nnz: int
    dtype: str
    n_shards: int
    packed_bytes: int
    shard_bytes: int
    source_bytes: int | None
    mended: Mended
    gains: tuple[Gain, ...] | None = None
    gain: float = 0.0
    n_orders: int = 1
    taken_over: int = 0

    @property
    def bytes_per_nonzero(self) -> float:
        """Payload and row table, per nonzero."""
        return self.packed_bytes / max(1, self.nnz)

    def words(self) -> dict[str, str]:
        """Put it into words: facts by name."""
        nnz = max(1, self.nnz)
        before = "" if self.source_bytes is None or not self.nnz else f", {self.source_bytes / nnz:.2f} in the source"
        facts = {
            "rows": f"{self.n_rows:,} of {self.n_vars:,} genes, {self.nnz:,} nonzeros, as {self.dtype}",
            "shards": f"{self.n_shards:,}" + (f", {self.taken_over:,} of them finished by a writer that died" if self.taken_over else ""),
            "packed": f"{self.bytes_per_nonzero:.3f} bytes per nonzero, {self.shard_bytes / nnz:.3f} with tables and padding{before}",
            "canonical": _mended(self.mended),
        }
        return facts | ({} if self.gains is None else {"groups": _groups(self.gains, self.gain)})


def report_of(shards: Sequence[PackedShard]) -> dict[str, int]:
    """Add up what is told of shards."""
    return {
        "nnz": sum(shard.nnz for shard in shards),
        "n_shards": len(shards),
        "packed_bytes": sum(4 * shard.n_words + shard.entries.nbytes for shard in shards),
        "shard_bytes": sum(shard.size_bytes for shard in shards),
    }


def _mended(mended: Mended) -> str:
    if not mended.rows:
        return "all rows were"
    return f"{mended.rows:,} rows were put so: {mended.duplicates:,} duplicates summed, {mended.zeros:,} zeros dropped, columns sorted"


def _groups(gains: Sequence[Gain], gain: float) -> str:
    if not gains:
        return "one gene order for all: no group could be tried; the column has no value in any row, or the genes are too many"
    kept = [one for one in gains if one.is_kept]
    named = sorted(kept or gains, key=lambda one: -one.gain)
    lines = [f"{one.name}: {one.gain:.1%} of {one.rows:,} rows" for one in named[:MOST_GROUPS]]
    lines += [f"... and {len(named) - MOST_GROUPS:,} more"] if len(named) > MOST_GROUPS else []
    if kept:
        head = f"{len(kept):,} of {len(gains):,} have a gene order of their own, {gain:.1%} saved in all:"
    else:
        head = f"one gene order for all: orders of their own would save {gain:.1%} in all, less than {LEAST_GAIN:.0%}:"
    return "\n".join([head, *lines])
