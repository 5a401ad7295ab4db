"""The operations of kernels/README.md on a GPU: launches of the CUDA sources beside this file, on torch's current stream.

Knows names, grids and addresses, not batches or archives; nothing here waits for the device. Arrays are torch tensors
or NumPy arrays, of any memory that the kernel can read. The first argument starts kernels: `GpuLauncher().launch`,
or an emulator's. Tests may run it without CuPy, which is loaded by GpuLauncher only.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scdl_gpu.kernels import source
from scdl_gpu.kernels.shards import ALIGNMENT, CSR_KINDS, DENSE_KINDS, KINDS

__all__ = ["GpuLauncher", "Table", "check_rows", "decode_csr", "decode_dense", "gather_csr", "gather_dense"]

OPTIONS = ("-std=c++17", "--fmad=false")
SHARED_BYTES = 48 * 1024
"""Of a block, without asking the driver for more; every GPU has them."""

WARPS, SPAN, PART_BYTES = 4, 512, 40
"""gather_csr: warps of a block, elements that a warp makes, bytes of a struct Part. A span of Tahoe-like rows is 3 KiB under way a warp."""
STAGE_SLACK = 512
"""Bytes of a stage beyond its elements: each row in it may begin and end up to 30 bytes early and late."""
SORT_THREADS, TILE_GENES = 256, 1 << 18
DENSE_THREADS, TILE_BYTES, DENSE_BLOCKS = 256, 16 * 1024, 1024
"""gather_dense: a tile of 16 KiB lets many blocks share a multiprocessor; fewer rows than DENSE_BLOCKS share out their tiles."""

TURNED_BYTES, STORED_BYTES, STEPS = 2_304, 40, 16
"""Packed rows: shared memory in which a warp turns 256 nonzeros, bytes of a struct Stored, steps of a segment of a long row."""
LEAST_STAGE, MOST_STAGE = 3_456, 16_384
"""Bytes of a stage: what a step of the widest blocks takes beside a segment's control bytes, and more than which would cost occupancy."""
PACKED_TILE_GENES = 1 << 17
"""decode_csr, ranked: a bitmap twice as wide would leave no room in 48 KiB for the values that it ranks."""
CHECK_WARPS = 4
SUMS_BYTES = 8 * (2_048 + 64 + 8) + 4 * (64 + 2)
"""decode_dense: a tile of numbers whose sum is not stored."""

Launch = Callable[[str, Sequence[int], Sequence[int], Sequence[int | float], int], None]


@dataclass(frozen=True)
class Table:
    """A table of shards where kernels read it: `address` is that of a copy of `entries`, (n,) of dtype SHARD, on the device.

    For packed rows also of dtype PACKED, and of gene orders, of dtype ORDER.
    """

    entries: NDArray[Any]
    address: int

    @cached_property
    def element_bytes(self) -> int:
        """The most bytes that an element takes in any shard, column and value."""
        bytes_of = np.array([np.dtype(name).itemsize for name in KINDS[:7]])
        return int((self.entries["index_bytes"] + bytes_of[self.entries["kind"]]).max())

    @cached_property
    def is_sorted(self) -> bool:
        """Whether every shard is."""
        return bool(self.entries["is_sorted"].all())

    @cached_property
    def identities(self) -> tuple[bool, bool]:
        """Whether any of the gene orders is the identity, and whether any is not."""
        is_identity = self.entries["table"] == 0
        return bool(is_identity.any()), not is_identity.all()


def gather_csr(launch, shards, shard, starts, slots, read_indptr, n_vars, indptr, kind, out_indices, out_data, out_fault):
    """Enqueue the copy of rows into a CSR batch; arguments as in kernels/README.md, `shards` is a Table."""
    dtype = _dtype(kind, CSR_KINDS)
    n_rows, nnz = len(starts), len(out_indices)
    if nnz == 0:
        return
    into = f"int{8 * out_indices.itemsize}_{dtype}"
    rows = (shards.address, _address(shard), _address(starts), _address(slots))
    outputs = (_address(out_indices), _address(out_data), _address(out_fault))
    pointers = (_address(read_indptr), _address(indptr))
    stage_bytes = -(-(SPAN * shards.element_bytes + STAGE_SLACK) // 16) * 16
    launch(
        f"gather_csr_{into}",
        (-(-nnz // (SPAN * WARPS)), 1),
        (32 * WARPS,),
        (*rows, n_rows, n_vars, *pointers, nnz, SPAN, stage_bytes, *outputs),
        WARPS * (32 * PART_BYTES + stage_bytes),
    )
    if not shards.is_sorted:
        n_words = -(-min(n_vars, TILE_GENES) // 128) * 4
        launch(
            f"gather_csr_unsorted_{into}",
            (n_rows, 1),
            (SORT_THREADS,),
            (*rows, n_vars, *pointers, n_words, *outputs),
            4 * (n_words + n_words // 4 + SORT_THREADS // 32),
        )


def gather_dense(launch, shards, shard, starts, slots, read_indptr, n_vars, lut, target, log1p, kind, out, out_fault):
    """Enqueue the writing of rows into a dense batch; arguments as in kernels/README.md, `shards` is a Table."""
    dtype = _dtype(kind, DENSE_KINDS)
    _refuse_fractions(dtype, target, log1p)
    n_rows, width = len(starts), out.shape[1]
    row_bytes = width * out.itemsize
    if n_rows == 0 or row_bytes == 0:
        return
    room = SHARED_BYTES - ALIGNMENT if len(lut) else TILE_BYTES
    tile_bytes = min(room, (-(-row_bytes // ALIGNMENT) + 1) * ALIGNMENT)
    n_tiles = -(-(row_bytes + ALIGNMENT - 1) // tile_bytes)
    rows = (shards.address, _address(shard), _address(starts), _address(slots), _address(read_indptr))
    launch(
        f"gather_dense_{dtype}",
        (n_rows, min(n_tiles, -(-DENSE_BLOCKS // n_rows))),
        (DENSE_THREADS,),
        (*rows, n_vars, _address(lut), width, float(target), int(log1p), tile_bytes, _address(out), _address(out_fault)),
        tile_bytes + 8 * (DENSE_THREADS // 32),
    )


def decode_csr(launch, shards, orders, shard, rows, slots, read_indptr, n_vars, indptr, kind, out_indices, out_data, out_fault):
    """Enqueue the decoding of packed rows into a CSR batch; arguments as in kernels/README.md, `shards` and `orders` are Tables.

    rows: (b,) ROW as bytes, of whatever dtype.
    """
    dtype = _dtype(kind, CSR_KINDS)
    n_rows, nnz = len(read_indptr) - 1, len(out_indices)
    if nnz == 0:
        return
    into = f"int{8 * out_indices.itemsize}_{dtype}"
    sources = (shards.address, orders.address, _address(shard), _address(rows), _address(slots))
    outputs = (_address(out_indices), _address(out_data), _address(out_fault))
    pointers = (_address(read_indptr), _address(indptr))
    mean, turned = nnz // n_rows, WARPS * (TURNED_BYTES + STORED_BYTES) + 128
    any_identity, any_table = orders.identities
    if any_identity:
        stage_bytes = min(max(_ceil(WARPS * (3 * mean // 2 + 256), 512), LEAST_STAGE + 128), 2 * MOST_STAGE)
        grid, args = (-(-n_rows // WARPS), 1), (*sources, n_rows, n_vars, *pointers, stage_bytes, *outputs)
        launch(f"decode_csr_{into}", grid, (32 * WARPS,), args, stage_bytes + turned)
    if any_table:
        n_words = _ceil(min(n_vars, PACKED_TILE_GENES), 128) // 32
        bitmap_bytes = 4 * (n_words + _ceil(n_words // 4, 4))
        stage_bytes = min(max(_ceil(3 * mean // 2 + 256, 128), LEAST_STAGE), MOST_STAGE // 2)
        left = SHARED_BYTES - turned - bitmap_bytes - stage_bytes
        room = min(2 * mean + 128, left // max(4, out_data.itemsize))
        args = (*sources, n_vars, *pointers, stage_bytes, n_words, room, *outputs)
        shared_bytes = stage_bytes + turned + bitmap_bytes + room * max(4, out_data.itemsize)
        launch(f"decode_csr_ranked_{into}", (n_rows, 1), (32 * WARPS,), args, shared_bytes)


def decode_dense(launch, shards, orders, shard, rows, slots, read_indptr, n_vars, lut, target, log1p, kind, out, out_fault):
    """Enqueue the decoding of packed rows into a dense batch; arguments as in kernels/README.md and of decode_csr."""
    dtype = _dtype(kind, DENSE_KINDS)
    _refuse_fractions(dtype, target, log1p)
    n_rows, width = len(read_indptr) - 1, out.shape[1]
    row_bytes = width * out.itemsize
    if n_rows == 0 or row_bytes == 0:
        return
    stage_bytes, warps = 4_096, DENSE_THREADS // 32
    team_bytes = stage_bytes + warps * TURNED_BYTES + 4 * (STEPS + 2 * warps) + 128
    room_bytes = (SHARED_BYTES - team_bytes) // ALIGNMENT * ALIGNMENT
    whole_bytes = (-(-row_bytes // ALIGNMENT) + 1) * ALIGNMENT
    is_listed = whole_bytes > room_bytes
    tile_bytes = TILE_BYTES if is_listed else whole_bytes
    room = room_bytes // (4 + out.itemsize) // 4 * 4 if is_listed else 0
    n_tiles = -(-(row_bytes + ALIGNMENT - 1) // tile_bytes)
    sources = (shards.address, orders.address, _address(shard), _address(rows), _address(slots), _address(read_indptr))
    how = (n_vars, _address(lut), width, float(target), int(log1p), stage_bytes, team_bytes, tile_bytes, room)
    launch(
        f"decode_dense_{dtype}",
        (n_rows, min(n_tiles, -(-DENSE_BLOCKS // n_rows))),
        (DENSE_THREADS,),
        (*sources, *how, _address(out), _address(out_fault)),
        team_bytes + (room_bytes if is_listed else max(tile_bytes, SUMS_BYTES if target > 0 else 0)),
    )


def check_rows(launch, shards, shard, rows, read_indptr, out_fault):
    """Enqueue the verification of the checks of packed rows; arguments as in kernels/README.md and of decode_csr."""
    n_rows = len(read_indptr) - 1
    if n_rows == 0:
        return
    name = f"check_rows_int{8 * read_indptr.itemsize}"
    args = (shards.address, _address(shard), _address(rows), n_rows, _address(read_indptr), _address(out_fault))
    launch(name, (-(-n_rows // CHECK_WARPS), 1), (32 * CHECK_WARPS,), args, 0)


def _refuse_fractions(dtype: str, target: float, log1p: bool) -> None:
    if (target > 0 or log1p) and "int" in dtype:
        raise ValueError(f"normalize_total and log1p make fractions; they need a floating dtype, not {dtype}")


def _ceil(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _dtype(kind: int, allowed: tuple[str, ...]) -> str:
    name = KINDS[kind]
    if name not in allowed:
        raise ValueError(f"the kernel makes no {name}; expected one of {', '.join(allowed)}")
    return name


def _address(array: Any) -> int:
    """Give the address of a tensor's or an array's first element; 0 where it has none."""
    if len(array) == 0:
        return 0
    return int(array.data_ptr() if hasattr(array, "data_ptr") else array.ctypes.data)


class GpuLauncher:
    """Starts kernels on the current GPU, on torch's current stream; compiles a source when it is first asked for one of it.

    CuPy keeps what it compiled in its cache, by content, and loads it once for each GPU. Raises ImportError without CuPy.
    """

    def __init__(self) -> None:
        self._cupy, self._torch = importlib.import_module("cupy"), importlib.import_module("torch")
        self._modules: dict[str, Any] = {}
        self._kernels: dict[str, Any] = {}
        self._streams: dict[int, Any] = {}

    def launch(self, name: str, grid: Sequence[int], block: Sequence[int], args: Sequence[int | float], shared_bytes: int = 0) -> None:
        """Enqueue a kernel. args: ints (64-bit numbers or addresses) and floats (double). Raises LookupError for an unknown name."""
        kernel = self._kernels.get(name) or self._load(name)
        pointer = self._torch.cuda.current_stream().cuda_stream
        stream = self._streams.get(pointer) or self._streams.setdefault(pointer, self._cupy.cuda.ExternalStream(pointer))
        kernel(tuple(grid), tuple(block), tuple(args), shared_mem=shared_bytes, stream=stream)

    def _load(self, name: str) -> Any:
        stem = source.stem_of(name)
        if stem not in self._modules:
            self._modules[stem] = self._cupy.RawModule(code=source.text(stem), options=OPTIONS)
        self._kernels[name] = self._modules[stem].get_function(name)
        return self._kernels[name]
