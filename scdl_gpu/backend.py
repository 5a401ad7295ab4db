"""What assembles batches: the CPU, by kernels/cpu.py on as many threads as torch uses.

Knows arrays and threads, not archives or epochs. A batch is split over threads only where nothing runs
ahead of it: in a DataLoader's worker torch uses one thread, and so does this. Below SPLIT_ELEMENTS
one thread does it alone, since waking a second takes time too; that limit is an estimate, not measured.
"""

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Ints = NDArray[np.int64]

SPLIT_ELEMENTS = 1 << 15
BATCH_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype(np.int32), "uint32": np.dtype(np.int64)}
"""Values of a batch whose stored dtype torch cannot compute on; uint64 is checked and converted by its reader."""
PACKED_DTYPES = {name: np.dtype(made) for name, made in (("int8", np.int32), ("int16", np.int32), ("bool", np.uint8))}
"""The same for stored dtypes that only packed archives have."""


@dataclass(frozen=True, slots=True)
class Csr:
    """Gathered rows: indptr (b + 1,) and indices (nnz,) of one signed dtype, data (nnz,) in the batch's dtype."""

    indptr: NDArray[Any]
    indices: NDArray[Any]
    data: NDArray[Any]


OUTSIDE_CURE = (
    "the file is damaged, or bionemo-scdl put .raw.X beside .var, which has fewer genes: copy it again, or convert the source anew"
)


class GatherError(Exception):
    """A row of the source that cannot be gathered: `position` in the batch, `fault` and `cure` in words."""

    def __init__(self, position: int, fault: str, cure: str = "the file is damaged: copy it again, or convert the source anew") -> None:
        super().__init__(position, fault, cure)
        self.position, self.fault, self.cure = position, fault, cure


def index_dtype(n_rows: int, n_vars: int, nnz: int) -> np.dtype[Any]:
    """Choose one dtype for row pointers and columns of a batch: int32 if n_rows full rows fit, so that all batches agree.

    The longest row would be a closer bound, but to know it is to read all row pointers.
    """
    return np.dtype(np.int32 if max(n_rows * n_vars, nnz) < 2**31 else np.int64)


class CsrSource:
    """The arrays of a CSR, told to the kernels once: rows are then gathered from them again and again.

    indptr: (n + 1,) unsigned; indices, data: (nnz,) in stored dtypes. They are kept, and must not change their place.
    """

    __slots__ = ("_kind", "_made", "_nothing", "_table", "data", "indices", "indptr")

    def __init__(self, indptr: NDArray[Any], indices: NDArray[Any], data: NDArray[Any]) -> None:
        from scdl_gpu.kernels import shards

        self.indptr, self.indices, self.data = indptr, indices, data
        self._made = BATCH_DTYPES.get(data.dtype.name, data.dtype)
        self._kind = shards.kind_of(self._made)
        self._table, self._nothing = shards.entry(indices, data), np.empty(0, np.int32)

    def gather(self, rows: Ints, *, n_vars: int, duplicates: bool = False) -> Csr:
        """Gather `rows`, (b,) int64 each 0 <= row < n, into one CSR of `n_vars` columns, ascending within each row.

        duplicates: admit a column twice in a row. Returns arrays of its own.
        Raises GatherError at the first row with bad pointers, a column out of range, or one that is there twice.
        """
        from scdl_gpu.kernels import cpu, pointers, shards

        starts, ends = np.empty(rows.size, np.int64), np.empty(rows.size + 1, np.int64)
        bad = int(pointers.row_pointers(self.indptr, rows, self.indices.size, starts, ends))
        if bad != pointers.OK:
            start, stop = self.indptr[rows[bad]], self.indptr[rows[bad] + 1]
            raise GatherError(bad, f"row pointers {start} and {stop}, expected 0 <= start <= stop <= {self.indices.size}")
        nnz = int(ends[-1])
        chosen = np.dtype(np.int64) if self.indices.dtype == np.uint64 else index_dtype(rows.size, n_vars, nnz)
        out = Csr(ends.astype(chosen, copy=False), np.empty(nnz, chosen), np.empty(nnz, self._made))
        values = out.data.view(np.uint16) if self._made == np.float16 else out.data

        def copy(first: int, last: int) -> Ints:
            found = np.array([shards.NO_FAULT] * shards.FAULTS, np.int32)
            part, nothing = ends[first : last + 1], self._nothing
            cpu.gather_csr(
                self._table, nothing, starts[first:last], nothing, part, n_vars, part, self._kind, out.indices, values, found
            )  # fmt: skip
            return np.where(found < shards.NO_FAULT, found + np.int64(first), shards.NO_FAULT)

        faults = np.min(split(copy, ends), axis=0)
        if int(faults.min()) < shards.NO_FAULT:
            self._raise(faults, starts, out, n_vars, duplicates=duplicates)
        return out

    def _raise(self, faults: Ints, starts: Ints, out: Csr, n_vars: int, *, duplicates: bool) -> None:
        from scdl_gpu.kernels import shards

        outside, twice = int(faults[shards.OUT_OF_RANGE]), int(faults[shards.DUPLICATE])
        if outside < shards.NO_FAULT:
            columns = self.indices[starts[outside] : starts[outside] + int(out.indptr[outside + 1]) - int(out.indptr[outside])]
            raise outside_error(outside, columns, n_vars)
        if twice < shards.NO_FAULT and not duplicates:
            columns = out.indices[out.indptr[twice] : out.indptr[twice + 1]]
            repeated = columns[1:][columns[1:] == columns[:-1]][0]
            cure = "bring the rows into canonical form with `scdl-gpu convert --canonical`"
            raise GatherError(twice, f"column {repeated} is there twice", cure)


def outside_error(position: int, columns: NDArray[Any], n_vars: int) -> GatherError:
    """Make the error for a row, at `position` of a batch, whose `columns`, (nnz,), are not all below `n_vars`."""
    return GatherError(position, f"column {columns[columns >= n_vars][0]}, expected 0..{n_vars - 1}", OUTSIDE_CURE)


def split(work: Callable[[int, int], Ints], pointers: Ints) -> list[Ints]:
    """Run work(first, last) over all positions, on several threads with about as many elements each; returns what they return."""
    b, nnz = pointers.size - 1, int(pointers[-1])
    threads = min(torch.get_num_threads(), nnz // SPLIT_ELEMENTS, b)
    if threads < 2:
        return [work(0, b)]
    cuts = [0, *np.searchsorted(pointers, np.arange(1, threads) * (nnz / threads)).tolist(), b]
    futures = [_pool(os.getpid()).submit(work, first, last) for first, last in itertools.pairwise(cuts[1:])]
    return [work(cuts[0], cuts[1]), *(future.result() for future in futures)]


@cache
def _pool(pid: int) -> ThreadPoolExecutor:
    """Make the threads of process `pid`: a forked child has none of its parent's."""
    return ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 2) - 1), thread_name_prefix=f"scdl-gather-{pid}")
