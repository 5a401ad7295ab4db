"""Several archives as one dataset: which shard holds a row, and what all of them have in common.

Knows archives that do not change, not where their rows are placed. Locating costs O(batch), a search over the
shards; nothing is copied, and the same archive may stand in the list many times.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scdl_gpu.archive.features import VariableFeatureIndex
from scdl_gpu.archive.raw import RawArchive, open_raw
from scdl_gpu.backend import BATCH_DTYPES
from scdl_gpu.errors import ArchiveError

Ints = NDArray[np.int64]


class Extents(NamedTuple):
    """Where rows lie: `shard` (b,) int32 (empty where there is one), `starts` (b,) int64 there, `indptr` (b + 1,) int64 of their batch."""

    shard: NDArray[np.int32]
    starts: Ints
    indptr: Ints


class Shards:
    """Raw archives with equal genes, one after the other. Raises ValueError naming the first gene that differs."""

    def __init__(self, archives: Sequence[RawArchive]) -> None:
        if not archives:
            raise ValueError("no dataset was given; pass a dataset, a path, or a list of either")
        self.archives = tuple(archives)
        self.ends: Ints = np.cumsum([archive.n_rows for archive in archives], dtype=np.int64)
        self.n_rows = int(self.ends[-1])
        self.n_vars = _common_width(archives)
        self.dtype = _common_dtype(archives)
        self._nnz = [archive.nnz for archive in archives]
        self._indptr = [np.asarray(archive.indptr) for archive in archives]
        self.nnz = sum(self._nnz)

    @property
    def var(self) -> VariableFeatureIndex:
        """Features of the genes that all shards share."""
        return self.archives[0].var

    def locate(self, rows: Ints) -> tuple[NDArray[np.int32], Ints]:
        """Return the shard of each row, (b,) int32, and its number there, (b,) int64. Raises IndexError naming a row out of range."""
        if rows.size and not (int(rows.min()) >= 0 and int(rows.max()) < self.n_rows):
            outside = rows[(rows < 0) | (rows >= self.n_rows)]
            raise IndexError(f"row {outside[0]} is out of range: the dataset has {self.n_rows} rows")
        if len(self.archives) == 1:
            return np.zeros(rows.size, np.int32), rows
        shard = np.searchsorted(self.ends, rows, side="right")
        first = self.ends[shard] - np.array([archive.n_rows for archive in self.archives])[shard]
        return shard.astype(np.int32), rows - first

    def extents(self, rows: Ints) -> "Extents":
        """Find where the elements of `rows` lie. Raises IndexError for a row out of range, ArchiveError for damaged row pointers."""
        from scdl_gpu.kernels.pointers import row_pointers

        shard, local = self.locate(rows)
        starts, indptr = np.empty(rows.size, np.int64), np.zeros(rows.size + 1, np.int64)
        if len(self.archives) == 1:
            self._raise_pointers(0, local, row_pointers(self._indptr[0], local, self._nnz[0], starts, indptr))
            return Extents(np.empty(0, np.int32), starts, indptr)
        lengths = np.empty(rows.size, np.int64)
        for number in np.unique(shard).tolist():
            at = np.flatnonzero(shard == number)
            part_starts, part = np.empty(at.size, np.int64), np.empty(at.size + 1, np.int64)
            self._raise_pointers(number, local[at], row_pointers(self._indptr[number], local[at], self._nnz[number], part_starts, part))
            starts[at], lengths[at] = part_starts, np.diff(part)
        np.cumsum(lengths, out=indptr[1:])
        return Extents(shard, starts, indptr)

    def _raise_pointers(self, number: int, rows: Ints, bad: int) -> None:
        if bad >= 0:
            indptr, row = self._indptr[number], int(rows[bad])
            raise ArchiveError(
                f"{self.archives[number].path}: row {row} runs from {indptr[row]} to {indptr[row + 1]}, "
                f"expected 0 <= start <= stop <= {self._nnz[number]}; the file is damaged: copy it again, or convert the source anew"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        """Carry paths, never data; an archive that stands in the list often is opened once again."""
        return _reopened, ([str(archive.path.resolve()) for archive in self.archives],)

    def gene_numbers(self, genes: Sequence[str | int]) -> Ints:
        """Return the columns of `genes`, names or numbers, in their order.

        Raises ValueError naming one that is not there or is there twice.
        """
        names = self.var.block_names(0) if len(self.var) else None
        known = {} if names is None else {str(name): number for number, name in enumerate(names)}
        repeated = set() if names is None or len(known) == len(names) else _repeated(names)
        numbers = []
        for gene in genes:
            if isinstance(gene, str):
                if gene not in known:
                    raise ValueError(f"gene {gene!r} is not in var_names; see dataset.var_names")
                if gene in repeated:
                    raise ValueError(f"gene {gene!r} stands more than once in var_names; choose it by number")
                numbers.append(known[gene])
            else:
                number = int(gene)
                if not 0 <= number < self.n_vars:
                    raise ValueError(f"gene {number} is out of range, expected 0..{self.n_vars - 1}")
                numbers.append(number)
        if len(set(numbers)) < len(numbers):
            twice = next(number for k, number in enumerate(numbers) if number in numbers[:k])
            raise ValueError(f"gene {twice} is asked for twice")
        return np.array(numbers, np.int64)


def _reopened(paths: list[str]) -> Shards:
    opened = {path: open_raw(Path(path)) for path in dict.fromkeys(paths)}
    return Shards([opened[path] for path in paths])


def _repeated(names: NDArray[Any]) -> set[str]:
    seen: set[str] = set()
    return {str(name) for name in names if str(name) in seen or seen.add(str(name))}  # type: ignore[func-returns-value]


def _common_width(archives: Sequence[RawArchive]) -> int:
    """Return the number of genes of all archives. Raises ValueError naming the first difference."""
    for archive in archives:
        if len(archive.var) != 1:
            raise ValueError(
                f"{archive.path} has {len(archive.var)} blocks of genes; a loader needs one set of genes: "
                f"convert the source with its var, or keep archives with different genes apart"
            )
    width, first = archives[0].var.column_dims()[0], archives[0]
    for archive in archives[1:]:
        if archive is first or archive.var is first.var:
            continue
        if archive.var.column_dims()[0] != width:
            raise ValueError(
                f"{archive.path} has {archive.var.column_dims()[0]} genes, {first.path} has {width}; they must have the same genes"
            )
        _compare_genes(first, archive)
    return width


def _compare_genes(first: RawArchive, other: RawArchive) -> None:
    tables = [_gene_table(archive) for archive in (first, other)]
    for name in [name for name in tables[0] if name in tables[1]]:
        a, b = tables[0][name], tables[1][name]
        different = np.flatnonzero(np.asarray(a != b))
        if different.size:
            k = int(different[0])
            raise ValueError(
                f"{other.path} has gene {k} {b[k]!r} where {first.path} has {a[k]!r} ({name}); "
                f"they must have the same genes in the same order"
            )
        return


def _gene_table(archive: RawArchive) -> dict[str, NDArray[Any]]:
    """What tells the genes of an archive apart: their names, or without names each column of var."""
    names = archive.var.block_names(0)
    if names is not None:
        return {"var_names": names}
    block = archive.var.blocks[0]
    return {name: block.column(name).to_numpy() for name in block.columns}


def _common_dtype(archives: Sequence[RawArchive]) -> np.dtype[Any]:
    """Return the dtype of the values of a batch: what torch computes in for what is stored, and the widest of several."""
    stored = {archive.data.dtype.name: archive.data.dtype for archive in archives}
    dtypes = [np.dtype(np.int64) if name == "uint64" else BATCH_DTYPES.get(name, dtype) for name, dtype in stored.items()]
    return np.result_type(*dtypes)
