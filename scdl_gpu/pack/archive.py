"""Sources into one packed archive: the order of the work.

Knows stagings, the file that says how far packing has come, and who does what; not how. Sources are read twice in part: a
sample of rows, from which the gene orders are learnt, and then every row once.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scdl_gpu.archive.change import check_outside
from scdl_gpu.archive.commit import Staging, check_space
from scdl_gpu.archive.features import ObservedFeatureIndex, VariableFeatureIndex
from scdl_gpu.archive.packed import finish_packed
from scdl_gpu.archive.packed_writer import ShardRecord
from scdl_gpu.convert.block import ahead
from scdl_gpu.convert.matrix import Matrix
from scdl_gpu.convert.source import check_x
from scdl_gpu.convert.write import check_data_dtype, progress_bar
from scdl_gpu.errors import SourceError
from scdl_gpu.kernels.packed import source_code
from scdl_gpu.pack.canonical import Canon
from scdl_gpu.pack.encode import Encoder
from scdl_gpu.pack.gene_orders import GeneOrders, Size, learn, learn_groups
from scdl_gpu.pack.origin import Origin, Wanted, opened, spooled
from scdl_gpu.pack.record import Record, clean, resumed
from scdl_gpu.pack.report import Report, report_of
from scdl_gpu.pack.sample import sample
from scdl_gpu.pack.series import SHARD_BYTES, Series, check_shard_bytes
from scdl_gpu.version import __version__

SPOOL = "spool"
MARGIN = 1.05
"""Of the estimate of bytes: samples are not exact."""
FOLDER_BYTES = 1 << 20
CODED = ("categorical", "string", "mixed")
"""Kinds of columns that have codes already."""


@dataclass(frozen=True)
class Options:
    """What is asked of packing; see `pack` and `convert_h5ad`. data_dtype: of the values, "auto": the source's."""

    wanted: Wanted = field(default_factory=Wanted)
    group_by: str | None = None
    reorder_var: bool = False
    shard_bytes: int = SHARD_BYTES
    data_dtype: str = "auto"
    progress: bool | None = None

    @property
    def told(self) -> dict[str, Any]:
        """What decides on the bytes of shards, as JSON has it."""
        return {name: value for name, value in asdict(self).items() if name != "progress"}


def pack_sources(sources: Sequence[Any], packed: Path, options: Options) -> Report:
    """Pack sources, one after the other, into one archive at `packed`, which must not exist."""
    check_x(options.wanted.x)
    check_data_dtype(options.data_dtype)
    check_shard_bytes(options.shard_bytes)
    if options.reorder_var and options.group_by is not None:
        raise ValueError("reorder_var (--reorder-var) stores var in the one gene order there is; group_by (--group-by) makes several")
    if os.path.lexists(packed):
        raise FileExistsError(f"{packed} exists already; choose another path, or remove it first")
    check_outside(packed, [Path(source) for source in sources if isinstance(source, str | os.PathLike)])
    with ExitStack() as stack:
        origins = [stack.enter_context(opened(source, options.wanted)) for source in sources]
        return _Packing(origins, packed, options).run()


class _Packing:
    """One run."""

    def __init__(self, origins: Sequence[Origin], packed: Path, options: Options) -> None:
        self._origins, self._packed, self._options = origins, packed, options
        self._n_vars = _check_alike(origins, options)
        self._var, self._obs = VariableFeatureIndex(), ObservedFeatureIndex()
        for origin in origins:
            self._var.concat(origin.var)
            self._obs.concat(origin.obs)
        if len(origins) > 1 and len(self._var.column_dims()) > max(len(origin.var.column_dims()) for origin in origins):
            raise SourceError("the sources have different genes; a packed archive has the same throughout: convert each by itself")
        self._groups = None if options.group_by is None else groups_of(self._obs, options.group_by)
        widest = str(np.result_type(*(origin.matrix.dtype for origin in origins)))
        dtype = widest if options.data_dtype == "auto" else options.data_dtype
        self._canons = [Canon(origin.where, self._n_vars, origin.matrix.dtype, dtype) for origin in origins]
        self._what = {"program": __version__, "sources": [origin.stamp for origin in origins], "options": options.told}

    def run(self) -> Report:
        can_resume = all(origin.stamp is not None for origin in self._origins)
        resumes = (lambda directory: resumed(directory, self._what) is not None) if can_resume else None
        with Staging.create(self._packed, resumes=resumes) as staging:
            record = (resumed(staging.directory, self._what) if can_resume else None) or Record(staging.directory, self._what)
            clean(record)
            taken_over = len(record.shards)
            matrices = list(self._spooled(staging.directory))
            orders = self._learnt(matrices)
            self._check_space(staging.path, orders, record)
            self._write(matrices, orders, record)
            self._finish(record, orders)
            return self._report(record, orders, taken_over)

    def _spooled(self, directory: Path) -> Iterator[Matrix]:
        for number, origin in enumerate(self._origins):
            if origin.matrix.has_rows:
                yield origin.matrix
                continue
            check_space(
                self._packed.resolve(), origin.matrix.scratch_bytes + origin.matrix.estimated_nnz * (4 + origin.matrix.dtype.itemsize)
            )
            yield spooled(origin.matrix, directory / f"{SPOOL}-{number}")

    def _learnt(self, matrices: Sequence[Matrix]) -> GeneOrders:
        rows = sample(matrices, self._canons)
        size = Size(sum(matrix.estimated_nnz for matrix in matrices), self._options.shard_bytes)
        if self._groups is None:
            return learn(rows, self._n_vars, size, reorder_var=self._options.reorder_var)
        return learn_groups(rows, self._n_vars, *self._groups, size)

    def _check_space(self, path: Path, orders: GeneOrders, record: Record) -> None:
        nnz = sum(origin.matrix.estimated_nnz for origin in self._origins)
        tables = sum(0 if table is None else table.nbytes for table in orders.stored_tables)
        needed = nnz * orders.bytes_per_nonzero
        needed += tables * (1 + needed // self._options.shard_bytes)
        check_space(path, max(0, int(MARGIN * needed) - sum(shard["bytes"] for shard in record.shards)))

    def _write(self, matrices: Sequence[Matrix], orders: GeneOrders, record: Record) -> None:
        n_rows, done = sum(matrix.shape[0] for matrix in matrices), record.n_rows
        where = f"pack {self._packed.name}"
        before = 0
        with (
            Series(record, orders, source_code(self._canons[0].dtype), shard_bytes=self._options.shard_bytes) as series,
            progress_bar(n_rows, "rows", where, self._options.progress) as bar,
        ):
            bar.update(done)
            for matrix, canon in zip(matrices, self._canons, strict=True):
                end = before + matrix.shape[0]
                if done < end or not n_rows:
                    groups = None if orders.groups is None else orders.groups[before:end]
                    blocks = ahead(matrix.blocks(record.directory, max(0, done - before)))
                    for piece in Encoder(canon, orders.ranks, groups).pieces(blocks):
                        series.add(piece)
                        bar.update(piece.entries.size)
                before = end
            series.close()

    def _finish(self, record: Record, orders: GeneOrders) -> None:
        """Write what goes with the rows, and what makes it an archive."""
        directory = record.directory
        extra = self._extra(directory)
        var = self._var
        if orders.is_var_order and orders.tables[0] is not None:
            var = var.taken(orders.tables[0].astype(np.int64))
            extra["var_reordered"] = True
        for number in range(len(self._origins)):
            for file in sorted((directory / f"{SPOOL}-{number}").glob("*")):
                file.unlink()
            if (directory / f"{SPOOL}-{number}").exists():
                (directory / f"{SPOOL}-{number}").rmdir()
        shards = [ShardRecord(*(shard[key] for key in ("name", "rows", "nnz", "bytes", "hash"))) for shard in record.shards]
        finish_packed(directory, shards=shards, var=var, obs=self._obs, extra=extra)
        record.remove()

    def _extra(self, directory: Path) -> dict[str, Any]:
        if len(self._origins) == 1:
            [origin] = self._origins
            return origin.metadata | origin.beside(directory)
        sources = [one for origin in self._origins for one in origin.metadata.get("source", [None])]
        kinds = {origin.x for origin in self._origins}
        return {"source": sources} | ({"x": kinds.pop()} if len(kinds) == 1 and None not in kinds else {})

    def _report(self, record: Record, orders: GeneOrders, taken_over: int) -> Report:
        sizes = [origin.size_bytes for origin in self._origins]
        return Report(
            path=self._packed,
            n_rows=record.n_rows,
            n_vars=self._n_vars,
            dtype=str(self._canons[0].dtype),
            **report_of(record.finished()),
            source_bytes=None if None in sizes else sum(size for size in sizes if size is not None),
            mended=record.mended,
            gains=None if self._groups is None else orders.gains,
            gain=orders.gain,
            n_orders=len(orders.tables),
            taken_over=taken_over,
        )


def _check_alike(origins: Sequence[Origin], options: Options) -> int:
    """Return how many genes all sources have. Raises SourceError where they differ, or hold different matrices."""
    widths = {origin.matrix.shape[1]: origin.where for origin in origins}
    if len(widths) > 1:
        found = ", ".join(f"{width:,} in {where}" for width, where in widths.items())
        raise SourceError(f"the sources have different genes ({found}); a packed archive has the same throughout: convert each by itself")
    kinds = {origin.x: origin.where for origin in origins if origin.x is not None}
    if len(kinds) > 1:
        found = ", ".join(f"{x} in {where}" for x, where in kinds.items())
        raise SourceError(f"the sources do not have the same matrix ({found}); say which with x (--x)")
    if len(origins) > 1 and (options.wanted.obsm or options.wanted.obsp):
        raise SourceError("obsm and obsp of several sources cannot be packed at once; convert them into a raw archive first, and pack that")
    return max(1, *widths)


def groups_of(obs: ObservedFeatureIndex, column: str) -> tuple[NDArray[np.int64], list[str]]:
    """Number the groups that an obs column parts rows into: (n_rows,), -1 where it is missing, and their names."""
    values = obs.column(column)
    if values.kind in CODED:
        codes, names = values.codes()
        return codes, [str(name) for name in names]
    found, missing = values.comparable()
    codes = np.full(missing.size, -1, np.int64)
    names, codes[~missing] = np.unique(found[~missing], return_inverse=True)
    return codes, [str(name) for name in names]
