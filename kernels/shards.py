"""What the kernels are told about stored rows: the table of shards, the codes of dtypes, the faults they report.

Knows layouts that Python, Numba and CUDA share (common.cuh has the same), not who allocates or gathers. A
shard's entry holds plain addresses: whoever makes one keeps the memory alive, in host, page-locked or device
memory as the reader of the table needs it.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

SHARD = np.dtype(
    [
        ("indices", np.uint64),
        ("data", np.uint64),
        ("nnz", np.uint64),
        ("index_bytes", np.uint32),
        ("kind", np.uint32),
        ("is_sorted", np.uint32),
        ("reserved", np.uint32),
    ]
)
"""An entry, 40 bytes: addresses of columns and values, their number, bytes of a column, code of the values' dtype."""

STORED = ("uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64")
KINDS = (*STORED, "int8", "int16", "int32", "int64", "bfloat16")
"""Dtypes by code: those that archives hold first, then those that only batches have."""
CSR_KINDS = ("uint8", "int32", "int64", "float16", "float32", "float64")
DENSE_KINDS = ("float32", "float16", "bfloat16", "float64", "uint8", "int8", "int16", "int32", "int64")
"""Dtypes of values that the GPU makes; the CPU's gather_csr also makes the stored ones."""

ALIGNMENT = 128
"""A shard's arrays begin at multiples of this many bytes, and their memory ends at one: a kernel reads whole words of 16."""

OUT_OF_RANGE, DUPLICATE, UNFITTING, DAMAGED = 0, 1, 2, 3
"""Places in `out_fault`, int32: a column >= n_vars, a column twice in an unsorted row, a value that the batch's dtype does not hold,
a packed row whose bytes do not match its check or run past its end."""
FAULTS = 4
NO_FAULT = 2**31 - 1
"""What each place of `out_fault` holds before; a fault lowers it to the first position in the batch where it is."""


def kind_of(dtype: Any) -> int:
    """Give the code of a dtype, a name or a NumPy dtype; raises ValueError for one that has none."""
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in KINDS:
        raise ValueError(f"no kernel knows values of dtype {name}; expected one of {', '.join(KINDS)}")
    return KINDS.index(name)


def entry(indices: NDArray[Any], data: NDArray[Any], *, is_sorted: bool = False) -> NDArray[Any]:
    """Make the table (1,) of one shard from host arrays: indices (nnz,) unsigned, data (nnz,) of a stored dtype.

    is_sorted: columns ascend strictly within every row; where it is not known, False. The arrays must outlive the table.
    """
    if data.dtype.name not in STORED or indices.dtype.kind != "u":
        raise ValueError(f"a shard of columns {indices.dtype} and values {data.dtype}; expected unsigned columns and values of {STORED}")
    row = (indices.ctypes.data, data.ctypes.data, indices.size, indices.itemsize, STORED.index(data.dtype.name), is_sorted, 0)
    return np.array([row], SHARD)
