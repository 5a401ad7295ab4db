"""How a batch is made of rows: what is asked for, and who makes it, on the CPU or on a GPU.

Knows shards, kernels and torch, not epochs. One thread makes a whole batch: threads work on several batches, ahead of
who asks for them, since splitting each would wake them all for 100 us of work.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from scdl_gpu.archive.parts import DAMAGED_TEXT, Extents
from scdl_gpu.arguments import real, shown, truth
from scdl_gpu.backend import index_dtype
from scdl_gpu.buffers import Ring
from scdl_gpu.errors import ArchiveError
from scdl_gpu.shards import Shards
from scdl_gpu.window import Window, mapped

Ints = NDArray[np.int64]
Marks = NDArray[np.bool_]
DENSE_DTYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64,
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
)  # fmt: skip
ALL_GENES = np.empty(0, np.int32)
"""The lut of a batch in which every gene goes to its own column."""
FAULT_TEXTS = {
    "OUT_OF_RANGE": "holds a column outside 0..{last}; the file is damaged: copy it again, or convert the source anew",
    "DUPLICATE": "holds a column twice; bring the rows into canonical form with `scdl-gpu convert --canonical`",
    "UNFITTING": "holds a value that {dtype} does not; choose another dtype",
    "DAMAGED": DAMAGED_TEXT,
}
CSR_DTYPES = (torch.uint8, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True, eq=False)
class Output:
    """What a batch looks like: "csr" or "dense", of which dtype, and for dense ones of which genes and how scaled.

    lut: (genes,) int32, the output column of each gene or -1; None for all genes. target: 0.0 leaves rows as they are.
    """

    kind: str
    dtype: torch.dtype
    width: int
    lut: NDArray[np.int32] | None = None
    target: float = 0.0
    log1p: bool = False

    @classmethod
    def of(
        cls, kind: str, dtype: torch.dtype | None, shards: Shards, genes: Ints | None, normalize_total: float | None, *, log1p: bool
    ) -> "Output":
        """Check what is asked for. Raises ValueError naming what does not go together."""
        log1p = truth("log1p", log1p)
        if normalize_total is not None:
            normalize_total = real("normalize_total", normalize_total, "a positive number")
        if kind not in ("csr", "dense"):
            raise ValueError(f"output is {kind!r}, expected 'csr' or 'dense'")
        if kind == "csr" and (genes is not None or normalize_total is not None or log1p):
            raise ValueError("var, normalize_total and log1p need output='dense'")
        allowed = CSR_DTYPES if kind == "csr" else DENSE_DTYPES
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype is {shown(dtype)}, expected a dtype of torch, one of {', '.join(map(str, allowed))}")
        chosen = dtype or (torch.float32 if kind == "dense" else torch.from_numpy(np.empty(0, shards.dtype)).dtype)
        if chosen not in allowed:
            raise ValueError(f"dtype is {chosen}, expected one of {', '.join(str(one) for one in allowed)} for output={kind!r}")
        if normalize_total is not None and not (normalize_total > 0 and np.isfinite(normalize_total)):
            raise ValueError(f"normalize_total is {normalize_total}, expected a positive number")
        if (normalize_total is not None or log1p) and not chosen.is_floating_point:
            raise ValueError(f"dtype is {chosen}; normalize_total and log1p give fractions: choose a floating dtype")
        lut = None
        if genes is not None:
            lut = np.full(shards.n_vars, -1, np.int32)
            lut[genes] = np.arange(genes.size)
            lut = lut[shards.numbers]
        width = shards.n_vars if genes is None else int(genes.size)
        return cls(kind, chosen, width, lut, normalize_total or 0.0, log1p)

    def row_bytes(self, shards: Shards) -> int:
        """Return how much memory a row of a batch takes, on average."""
        if self.kind == "dense":
            return max(1, self.width * self.dtype.itemsize)
        return max(1, shards.nnz // max(1, shards.n_rows) * (4 + self.dtype.itemsize))

    def __str__(self) -> str:
        scaled = (f", normalised to {self.target:g}" if self.target else "") + (", log1p" if self.log1p else "")
        return f"{self.kind} {str(self.dtype).removeprefix('torch.')} of {self.width:,} genes{scaled}"


class Wanted(NamedTuple):
    """What a batch is to hold: its rows, and for each whether it is padding, and its obs values.

    window: where they lie, under the numbers `numbers` there; None: all rows of the dataset are in one window.
    """

    rows: Ints
    is_padding: Marks
    obs: Mapping[str, NDArray[Any]]
    window: Window | None = None
    numbers: Ints | None = None

    def located(self, resident: Window | None) -> tuple[Window, Ints]:
        """Return the window to gather from, and the rows' numbers in it."""
        if self.window is not None and self.numbers is not None:
            return self.window, self.numbers
        if resident is None:
            raise ValueError("the rows of the dataset are in no window; a batch must say which window its rows are in")
        return resident, self.rows


class Made(NamedTuple):
    """What a batch is made of, on its device; see `Batch`."""

    x: torch.Tensor
    rows: torch.Tensor
    obs: dict[str, torch.Tensor]
    is_padding: torch.Tensor


class Assembler(Protocol):
    """Makes batches of the rows of `shards`. threads: how many may prepare at once."""

    is_cuda: bool
    torch_device: torch.device

    @property
    def threads(self) -> int:
        """How many threads prepare."""

    def prepare(self, wanted: Wanted) -> Any:
        """Do the part that any thread may do ahead. Raises IndexError, ArchiveError, ValueError."""

    def make(self, prepared: Any) -> Made:
        """Make the batch; on a GPU this enqueues and does not wait."""

    def check(self) -> None:
        """Raise ArchiveError if a batch that was made met a damaged row; this may wait for the device."""

    def close(self) -> None:
        """Give memory back."""


class CpuAssembler:
    """Makes batches by kernels/cpu.py, from the page cache; one thread a batch."""

    is_cuda = False
    torch_device = torch.device("cpu")

    def __init__(self, shards: Shards, output: Output, *, batch_size: int, where: str = "", ring: Ring | None = None) -> None:
        self._shards, self._output = shards, output
        self._index = index_dtype(batch_size, shards.n_vars, 0)
        self._where = where
        self._open(ring or Ring())

    def _open(self, ring: Ring) -> None:
        self._window, self._orders = mapped(self._shards.parts), self._shards.parts.orders.table
        self._ring = ring

    @property
    def threads(self) -> int:
        """As many as torch uses."""
        return torch.get_num_threads()

    def prepare(self, wanted: Wanted) -> Made:
        """Make the batch: here it is the threads ahead that do."""
        obs = {name: torch.from_numpy(values) for name, values in wanted.obs.items()}
        return Made(self.gather(wanted), torch.from_numpy(wanted.rows), obs, torch.from_numpy(wanted.is_padding))

    def prepare_run(self, wanted: Wanted, sizes: Sequence[int]) -> list[Made]:
        """Make batches of `sizes` rows that follow each other in `wanted`, as one. A batch that is kept keeps the memory of all."""
        bounds = list(itertools.pairwise(itertools.accumulate(sizes, initial=0)))
        rows, is_padding, obs, *_ = wanted
        return [
            Made(x, _part(rows, *part), {name: _part(values, *part) for name, values in obs.items()}, _part(is_padding, *part))
            for part, x in zip(bounds, _cut(self.gather(wanted), bounds), strict=True)
        ]

    def make(self, prepared: Made) -> Made:
        """Hand on what is made."""
        return prepared

    def gather(self, wanted: Wanted) -> torch.Tensor:
        """Gather the rows of a batch. Raises ArchiveError for a damaged row, ValueError for a value that the dtype does not hold."""
        from scdl_gpu.kernels import shards as codes

        self._shards.check(wanted.rows)
        window, numbers = wanted.located(self._window)
        extents = window.parts.extents(numbers)
        fault = np.full(codes.FAULTS, codes.NO_FAULT, np.int32)
        x = (self._csr if self._output.kind == "csr" else self._dense)(window, extents, fault)
        raise_fault(fault, wanted.rows, self._shards, self._output)
        return x

    def _csr(self, window: Window, extents: Extents, fault: NDArray[np.int32]) -> torch.Tensor:
        from scdl_gpu.kernels import cpu

        nnz, width = int(extents.indptr[-1]), self._shards.n_vars
        check_index(nnz, self._index)
        indptr, indices = (self._ring.empty(n, self._index) for n in (extents.indptr.size, nnz))
        indptr[:] = extents.indptr
        values, bits, kind = self._values(nnz)
        raw, packed = window.parts.shares(extents)
        out = (width, indptr, kind, indices, bits, fault)
        if raw is not None:
            read_indptr = raw.indptr.astype(self._index) if raw.slots.size else indptr
            cpu.gather_csr(window.raw.entries, raw.part, raw.where, raw.slots, read_indptr, *out)
        if packed is not None:
            read_indptr = packed.indptr.astype(self._index) if packed.slots.size else indptr
            cpu.decode_csr(window.packed.entries, self._orders, packed.part, packed.where, packed.slots, read_indptr, *out)
        size = (extents.indptr.size - 1, width)
        return torch.sparse_csr_tensor(torch.from_numpy(indptr), torch.from_numpy(indices), values, size, check_invariants=False)

    def _dense(self, window: Window, extents: Extents, fault: NDArray[np.int32]) -> torch.Tensor:
        from scdl_gpu.kernels import cpu

        output, n_rows = self._output, extents.indptr.size - 1
        values, bits, kind = self._values(n_rows * output.width)
        lut = ALL_GENES if output.lut is None else output.lut
        raw, packed = window.parts.shares(extents)
        out = (self._shards.n_vars, lut, output.target, output.log1p, kind, bits.reshape(n_rows, output.width), fault)
        if raw is not None:
            cpu.gather_dense(window.raw.entries, raw.part, raw.where, raw.slots, raw.indptr, *out)
        if packed is not None:
            cpu.decode_dense(window.packed.entries, self._orders, packed.part, packed.where, packed.slots, packed.indptr, *out)
        return values.view(n_rows, output.width)

    def _values(self, n: int) -> tuple[torch.Tensor, NDArray[Any], int]:
        """Make room for n values: as a tensor, as what the kernels write, and the code of their dtype."""
        from scdl_gpu.kernels.shards import kind_of

        name = str(self._output.dtype).removeprefix("torch.")
        stored = np.dtype("uint16" if name in ("float16", "bfloat16") else name)
        bits = self._ring.empty(n, stored)
        values = torch.from_numpy(bits)
        return values if stored.name == name else values.view(self._output.dtype), bits, kind_of(name)

    def check(self) -> None:
        """Do nothing: every batch was checked when it was made."""

    def close(self) -> None:
        """Let the buffers go."""
        self._ring = Ring()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_window", "_orders", "_ring")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open(Ring())

    def __repr__(self) -> str:
        return f"on the cpu, {self.threads} threads, {self._where}"


def _cut(x: torch.Tensor, bounds: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """Cut a batch into batches of the rows between `bounds`, which share its memory but for row pointers."""
    if x.layout != torch.sparse_csr:
        return _parts(x, bounds)
    indptr, width = x.crow_indices().numpy(), x.shape[1]
    stretches = [(int(indptr[start]), int(indptr[stop])) for start, stop in bounds]
    parts = zip(bounds, _parts(x.col_indices(), stretches), _parts(x.values(), stretches), strict=True)
    return [
        torch.sparse_csr_tensor(
            torch.from_numpy(indptr[start : stop + 1] - indptr[start]), indices, values, (stop - start, width), check_invariants=False
        )
        for (start, stop), indices, values in parts
    ]


def _parts(whole: torch.Tensor, bounds: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """Make tensors over the memory of `whole` that autograd knows nothing in common of, as it does of views of one tensor."""
    bits = whole.view(torch.uint16) if whole.dtype == torch.bfloat16 else whole
    array = bits.numpy()
    parts = [_part(array, *part) for part in bounds]
    return parts if bits is whole else [part.view(whole.dtype) for part in parts]


def _part(array: NDArray[Any], start: int, stop: int) -> torch.Tensor:
    return torch.from_numpy(array[start:stop])


def check_index(nnz: int, index: np.dtype[Any]) -> None:
    """Raise ValueError where a batch has more elements than its index dtype numbers."""
    if nnz > np.iinfo(index).max:
        raise ValueError(
            f"a batch of {nnz:,} nonzeros does not fit {index}, which was chosen for the batch_size given; "
            f"make batches smaller, or give the batch_sampler an attribute batch_size with the size of its largest"
        )


def raise_fault(fault: NDArray[np.int32], rows: Ints, shards: Shards, output: Output) -> None:
    """Raise what a kernel reported: ArchiveError for a damaged row, ValueError for a value that the dtype does not hold."""
    from scdl_gpu.kernels import shards as codes

    for place, text in FAULT_TEXTS.items():
        position = int(fault[getattr(codes, place)])
        if position != codes.NO_FAULT:
            message = f"{shards.parts.name(int(rows[position]))} {text.format(last=shards.n_vars - 1, dtype=output.dtype)}"
            raise ValueError(message) if place == "UNFITTING" else ArchiveError(message)
