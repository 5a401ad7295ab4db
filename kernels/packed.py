"""What the kernels are told about packed rows: tables of shards, gene orders and rows, and the codes of the format.

Knows the layouts that Python, Numba and CUDA share, and the numbers of docs/packed-format.md that a decoder needs; not
files, nor who allocates or decodes. Entries hold plain addresses: whoever makes one keeps the memory alive, in host,
page-locked or device memory as the reader of the table needs it.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

ENTRY = np.dtype([("offset", "<u4"), ("nnz_order", "<u4"), ("sum", "<u4"), ("check", "<u4")])
"""A row on disk, 16 bytes: words from the payload's start; nonzeros (low 24 bits) and order (high 8); sum of counts; check."""
PACKED = np.dtype([("payload", "<u8"), ("words", "<u8"), ("source", "<u4"), ("reserved", "<u4")])
"""A shard, 24 bytes: address of its payload, words of it (SLACK_BYTES more can be read), code of its source dtype."""
ORDER = np.dtype([("table", "<u8"), ("entry_bytes", "<u4"), ("reserved", "<u4")])
"""A gene order, 16 bytes: address of its table, entry[rank] = column, of n_vars entries of 2 or 4 bytes. Address 0: the identity."""
ROW = np.dtype([("start", "<u8"), ("words", "<u4"), ("order", "<u4"), ("sum", "<u4"), ("check", "<u4")])
"""A row to gather, 24 bytes: where it begins in its shard's payload and its length, in words; `order`; sum and check of its entry.

order: its place in the ORDER table of the call (low 16 bits), and its number in the shard, which the check covers (high 8).
"""

SOURCES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "float32", "float64", "bool")
"""Dtypes of stored values; the code of each is its place plus one."""
NO_SUM = 0xFFFFFFFF
"""`sum` of a row where it is not stored: it does not fit, or the row has a raw block."""
NNZ_BITS = 24
"""Of `nnz_order`: the nonzeros are below, the order above."""
SLACK_BYTES = 256
"""Bytes behind a payload that a decoder may read: it loads whole words, and looks at nothing that is beyond the row."""

BLOCK = 8
"""Nonzeros of a block."""
GAP_BITS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 24)
VALUE_BITS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 16, 24, 32)
"""Width of a field by code; the value code after the last, RAW, is the bits of the source dtype as they are."""
RAW = 15
CHECK_STEP, CHECK_NNZ = 0x9E3779B1, 0x85EBCA77
"""Multipliers of the row check: the sum modulo 2^32 of (x ^ x >> 16) * f over the words i, where f = (2 i + 1) * CHECK_STEP and
x = word ^ f, both modulo 2^32, and of nnz_order * CHECK_NNZ."""


def source_code(dtype: Any) -> int:
    """Give the code of a source dtype, a name or a NumPy dtype; raises ValueError for one that has none."""
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in SOURCES:
        raise ValueError(f"packed archives hold no values of dtype {name}; expected one of {', '.join(SOURCES)}")
    return SOURCES.index(name) + 1


def source_bytes(source: int) -> int:
    """Give the bytes of a raw value of source code `source`."""
    return np.dtype(SOURCES[source - 1]).itemsize


def most_words(nnz: int, source: int) -> int:
    """Give the words that encode_rows wants free to begin a row of `nnz` nonzeros: the most that one can take, and 4 for wide stores."""
    return -(-(-(-nnz // BLOCK) + nnz * (3 + source_bytes(source))) // 4) + 4


def shard_entry(payload: NDArray[np.uint32], words: int, source: int) -> NDArray[Any]:
    """Make the table (1,) PACKED of one shard from a host array. payload: its `words` words, and SLACK_BYTES more.

    Raises ValueError where the array is shorter. The array must outlive the table.
    """
    if payload.dtype.itemsize != 4 or payload.size < words + SLACK_BYTES // 4:
        raise ValueError(f"a payload of {payload.nbytes} bytes; expected 4 x {words} and {SLACK_BYTES} more, as uint32")
    return np.array([(payload.ctypes.data, words, source, 0)], PACKED)


def order_entry(table: NDArray[Any] | None) -> NDArray[Any]:
    """Make the table (1,) ORDER of one gene order from a host array, (n_vars,) uint16 or uint32; None: the identity.

    The array must be a permutation, and outlive the table.
    """
    if table is None:
        return np.zeros(1, ORDER)
    if table.dtype.kind != "u" or table.itemsize not in (2, 4):
        raise ValueError(f"a gene order of dtype {table.dtype}; expected uint16 or uint32")
    return np.array([(table.ctypes.data, table.itemsize, 0)], ORDER)


def rows_of(entries: NDArray[Any], rows: NDArray[Any], orders: NDArray[Any] | None = None) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Describe rows to gather: (b,) ROW, and their nonzeros, (b,) int64.

    entries: (n + 1,) ENTRY of a shard; rows: (b,), each 0 <= row < n.
    orders: where each order of the shard stands in the ORDER table of the call; by default at its own number.
    """
    here, after = entries[rows], entries["offset"][rows + 1]
    number = here["nnz_order"] >> np.uint32(NNZ_BITS)
    found = np.empty(len(here), ROW)
    found["start"], found["words"] = here["offset"], after - here["offset"]
    found["order"] = (number if orders is None else orders[number].astype(np.uint32)) | number << np.uint32(NNZ_BITS)
    found["sum"], found["check"] = here["sum"], here["check"]
    return found, (here["nnz_order"] & np.uint32((1 << NNZ_BITS) - 1)).astype(np.int64)
