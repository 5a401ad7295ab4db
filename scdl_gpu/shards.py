"""Several archives as one dataset: which rows there are, and what all of them have in common.

Knows archives that do not change, not where their rows are placed, nor where in an archive they lie (`archive.parts`).
Nothing is copied, and the same archive may stand in the list many times, which costs 12 bytes a time. Genes are compared by
what names them, not by statistics of them, which differ between archives of the same genes.
"""

import os
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scdl_gpu.archive.blocks import Block
from scdl_gpu.archive.columns import Column
from scdl_gpu.archive.cuts import Cuts, cut
from scdl_gpu.archive.dtypes import exact_dtype
from scdl_gpu.archive.features import VariableFeatureIndex
from scdl_gpu.archive.packed import open_archive
from scdl_gpu.archive.parts import Archive, Extents, Part, Parts, distinct
from scdl_gpu.archive.raw import RawArchive, check_identity, identity
from scdl_gpu.arguments import check_list, is_truth, shown, whole
from scdl_gpu.backend import BATCH_DTYPES, PACKED_DTYPES

Ints = NDArray[np.int64]
NAMES, UNNAMED = "var_names", "var_feature_id"
"""What errors call the names of genes; the column that has them in archives of bionemo-scdl without other columns of var."""
CHECKED = {"uint64": np.dtype(np.int64)}
"""What torch computes in for what it cannot: each value is checked when it is met."""
TEXT = ("categorical", "string", "mixed")
"""Kinds of columns that hold text."""


class Shards:
    """Archives, raw and packed, with equal genes, one after the other. Raises ValueError naming the first gene that differs.

    archives: those of the list, each once; listed: which of them stands at each place of it, int32.
    gene_order: "var", or "stored": columns of a batch are genes in the order of the packed archives, see `numbers`.
    """

    def __init__(self, archives: Sequence[Archive], *, gene_order: str = "var") -> None:
        if not archives:
            raise ValueError("no dataset was given; pass a dataset, a path, or a list of either")
        if gene_order not in ("var", "stored"):
            raise ValueError(f"gene_order is {gene_order!r}, expected 'var' or 'stored'")
        self.archives, self.listed = distinct(archives)
        self._paths = {path: os.path.realpath(path) for path in {one.path for one in self.archives}}  # of now: directories change
        self.n_vars = _common_width(self.archives)
        self.gene_order = gene_order
        self.parts = Parts.of(self.archives, self.n_vars, listed=self.listed, is_stored=gene_order == "stored")
        self._cuts: tuple[int, Cuts] | None = None
        self.n_rows = self.parts.n_rows
        self.nnz = int(np.array([archive.nnz for archive in self.archives], np.int64)[self.listed].sum())

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """Of the values of a sparse batch: the one that holds all that is stored, and that torch computes in.

        Raises ValueError where there is none: 64-bit integers and floats.
        """
        found = {(part.archive.dtype if part.shard is None else part.shard.dtype).name: part.archive.place for part in self.parts.parts}
        common = exact_dtype(CHECKED.get(name, np.dtype(name)) for name in found or ["float32"])
        if common is None:
            named = ", ".join(f"{path}: {name}" for name, path in found.items())
            raise ValueError(
                f"no dtype of a batch holds the values of all archives exactly ({named}); choose one: dtype=torch.float64 rounds integers "
                f"above 2^53, dtype=torch.int64 refuses values that are no integers"
            )
        made: np.dtype[Any] = (BATCH_DTYPES | PACKED_DTYPES).get(common.name, common)
        return made

    @property
    def var(self) -> VariableFeatureIndex:
        """Features of the genes that all shards share."""
        return self.archives[0].var

    @property
    def numbers(self) -> Ints:
        """The var number of each column of a row, (n_vars,): all in ascending order, but for gene_order="stored"."""
        return self.parts.orders.numbers

    def cuts(self, extent_bytes: int) -> Cuts:
        """Cut the rows into extents of this size; those that were asked for last are kept. Raises ArchiveError for damaged pointers."""
        if self._cuts is None or self._cuts[0] != extent_bytes:
            self._cuts = extent_bytes, cut(self.parts, extent_bytes)
        return self._cuts[1]

    def check(self, rows: Ints) -> None:
        """Raise IndexError naming a row out of range."""
        if rows.size and not (int(rows.min()) >= 0 and int(rows.max()) < self.n_rows):
            outside = rows[(rows < 0) | (rows >= self.n_rows)]
            raise IndexError(f"row {outside[0]} is out of range: the dataset has {self.n_rows} rows, expected 0 <= row < {self.n_rows}")

    def locate(self, row: int) -> tuple[Part, int]:
        """Return the part that holds a row, and its number there. Raises IndexError for a row out of range."""
        self.check(np.array([row], np.int64))
        return self.parts.locate(row)

    def extents(self, rows: Ints) -> Extents:
        """Find where `rows` lie. Raises IndexError for a row out of range, ArchiveError for a damaged one."""
        self.check(rows)
        return self.parts.extents(rows)

    def __reduce__(self) -> tuple[Any, ...]:
        """Carry paths and what tells the archives there, never data; an archive that stands in the list often is opened once again."""
        number: dict[tuple[Any, ...], int] = {}
        told: list[tuple[str, str | None, dict[str, Any]]] = []
        order = []
        for archive in self.archives:
            path, hint = self._paths[archive.path], archive.dtype.name if isinstance(archive, RawArchive) else None
            key = (path, hint, archive.stamp)  # of two states of an archive the older one will be missed
            if key not in number:
                number[key] = len(told)
                told.append((path, hint, identity(archive)))
            order.append(number[key])
        return _reopened, (told, np.array(order, np.int32)[self.listed], self.gene_order)

    def gene_numbers(self, genes: Sequence[str | int]) -> Ints:
        """Return the columns of `genes`, names or numbers, in their order.

        Raises ValueError naming one that is not there, or is there or asked for twice; TypeError for what is no gene.
        """
        check_list("var", genes, "genes")
        names = self.var.block_names(0)
        known = {} if names is None else {str(name): number for number, name in enumerate(names)}
        repeated = set() if names is None or len(known) == len(names) else _repeated(names)
        numbers: dict[int, None] = {}
        for gene in genes:
            number = self._gene_number(gene, known, repeated)
            if number in numbers:
                raise ValueError(f"gene {number} is asked for twice")
            numbers[number] = None
        if not numbers:
            raise ValueError("var is empty, expected at least one gene, or None for all")
        return np.array(list(numbers), np.int64)

    def _gene_number(self, gene: str | int, known: dict[str, int], repeated: set[str]) -> int:
        if isinstance(gene, str):
            if gene not in known:
                raise ValueError(f"gene {gene!r} is not in var_names; see dataset.var_names")
            if gene in repeated:
                raise ValueError(f"gene {gene!r} stands more than once in var_names; choose it by number")
            return known[gene]
        if is_truth(gene):
            raise TypeError(f"var holds {shown(gene)}, expected names or numbers of genes; those of a mask are np.flatnonzero(mask)")
        number = whole("a gene of var", gene)
        if not 0 <= number < self.n_vars:
            raise ValueError(f"gene {number} is out of range, expected 0..{self.n_vars - 1}")
        return number


def _reopened(told: list[tuple[str, str | None, dict[str, Any]]], order: NDArray[np.int32], gene_order: str) -> Shards:
    """Open archives again: path, dtype of raw values where no header has it, identity of each.

    Raises ArchiveError where another one, or another state of it, is there now.
    """
    opened = []
    for path, data_dtype, expected in told:
        archive = open_archive(Path(path), data_dtype=data_dtype)
        check_identity(archive, expected)
        opened.append(archive)
    return Shards([opened[number] for number in order.tolist()], gene_order=gene_order)


def _repeated(names: NDArray[Any]) -> set[str]:
    distinct, counts = np.unique([str(name) for name in names], return_counts=True)
    return set(distinct[counts > 1].tolist())


def _common_width(archives: Sequence[Archive]) -> int:
    """Return the number of genes of all archives. Raises ValueError naming the first difference."""
    for archive in archives:
        if len(archive.var) != 1:
            raise ValueError(
                f"{archive.place} has {len(archive.var)} blocks of genes; a loader needs one set of genes: "
                f"convert the source with its var, or keep archives with different genes apart"
            )
    first = archives[0]
    width = first.var.column_dims()[0]
    compared = {id(first.var)}
    for archive in archives[1:]:
        if id(archive.var) in compared:
            continue
        compared.add(id(archive.var))
        if archive.var.column_dims()[0] != width:
            raise ValueError(
                f"{archive.place} has {archive.var.column_dims()[0]} genes, {first.place} has {width}; they must have the same genes"
            )
        _compare_genes(first, archive)
    return width


def _compare_genes(first: Archive, other: Archive) -> None:
    """Raise ValueError naming the first gene that differs, by name or, where an archive has no names, by the text columns of both."""
    known = [_described(archive.var.blocks[0]) for archive in (first, other)]
    common = [name for name in known[0] if name in known[1]]
    if all(known) and not common:
        raise ValueError(
            f"the genes of {first.place} are told apart by {', '.join(known[0])}, those of {other.place} by {', '.join(known[1])}; "
            f"they cannot be compared: convert one of the sources anew, so that both have names"
        )
    columns = {name: (known[0][name](), known[1][name]()) for name in ([NAMES] if NAMES in common else common)}
    text = {name: pair for name, pair in columns.items() if pair[0].kind in TEXT and pair[1].kind in TEXT}
    for name, (a, b) in (text or columns).items():
        (values, missing), (others, others_missing) = a.comparable(), b.comparable()
        different = np.flatnonzero((missing != others_missing) | (~missing & np.asarray(values != others, bool)))
        if different.size:
            k = int(different[0])
            raise ValueError(
                f"{other.place} has gene {k} {b[k]!r} where {first.place} has {a[k]!r} ({name}); "
                f"they must have the same genes in the same order"
            )


def _described(block: Block) -> dict[str, Callable[[], Column]]:
    """List what is known of genes: their names first, then the columns; each is read when it is called."""
    columns: dict[str, Callable[[], Column]] = {name: partial(block.column, name) for name in block.columns}
    names = block.names()
    if names is None and UNNAMED in columns:
        return {NAMES: columns.pop(UNNAMED)} | columns
    return columns if names is None else {NAMES: lambda: names} | columns
