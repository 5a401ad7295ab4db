"""Packed rows in plain Python, written from the specification of the format alone: the expected side of tests of kernels."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from scdl_gpu.kernels import packed, shards

GAPS = [*range(13), 14, 16, 24]
COUNTS = [*range(12), 16, 24, 32]
RAW_CODE = 15


def fields(numbers: Sequence[int], width: int) -> bytes:
    """Pack numbers of `width` bits, the first one lowest, into as many bytes as they need."""
    whole = sum(number << (width * k) for k, number in enumerate(numbers))
    return whole.to_bytes((len(numbers) * width + 7) // 8, "little")


def numbers(text: bytes, count: int, width: int) -> list[int]:
    """Unpack `count` numbers of `width` bits."""
    whole = int.from_bytes(text, "little")
    return [whole >> (width * k) & ((1 << width) - 1) for k in range(count)]


def count_of(value: np.generic) -> int | None:
    """Give the count that a value is, or None for what has to be kept as bits: no integer 1..2^32 - 1, or one that does not come back."""
    number = float(value) if value.dtype.kind == "f" else int(value)
    if not 1 <= number < 2**32 or number != int(number):
        return None
    return int(number) if np.array(int(number)).astype(value.dtype).tobytes() == value.tobytes() else None


def encoded(columns: Sequence[int], values: NDArray, ranks: Sequence[int] | None = None) -> bytes:
    """Encode a row; columns ascend. ranks: of each column."""
    placed = sorted((c if ranks is None else int(ranks[c]), v) for c, v in zip(map(int, columns), values, strict=True))
    control, body, previous = b"", b"", -1
    for first in range(0, len(placed), 8):
        block = placed[first : first + 8]
        gaps = []
        for rank, _ in block:
            gaps.append(rank - previous - 1)
            previous = rank
        gap_code = next(k for k, width in enumerate(GAPS) if max(gaps) < 1 << width)
        counts = [count_of(value) for _, value in block]
        if None in counts:
            value_code, bits, width = RAW_CODE, [int.from_bytes(v.tobytes(), "little") for _, v in block], 8 * values.itemsize
        else:
            bits = [count - 1 for count in counts if count is not None]
            value_code = next(k for k, width in enumerate(COUNTS) if max(bits) < 1 << width)
            width = COUNTS[value_code]
        control += bytes([gap_code | value_code << 4])
        body += fields(gaps, GAPS[gap_code]) + fields(bits, width)
    return padded(control + body)


def padded(text: bytes) -> bytes:
    """Add zeros up to a whole word."""
    return text + bytes(-len(text) % 4)


def decoded(text: bytes, nnz: int, dtype: str, order: Sequence[int] | None = None, n_vars: int = 1 << 24) -> tuple[list[int], NDArray]:
    """Decode a row: columns, ascending, and values. order: column of each rank. Raises ValueError for bytes that are no row."""
    at, rank, found = (nnz + 7) // 8, -1, []
    if at > len(text):
        raise ValueError(f"{len(text)} bytes; {nnz} nonzeros have {at} control bytes")
    for number, code in enumerate(text[:at]):
        c, gap_width = min(8, nnz - 8 * number), GAPS[code & 15]
        is_raw = code >> 4 == RAW_CODE
        width = 8 * np.dtype(dtype).itemsize if is_raw else COUNTS[code >> 4]
        middle = at + (c * gap_width + 7) // 8
        end = middle + (c * width + 7) // 8
        if end > len(text):
            raise ValueError(f"block {number} ends at {end}, the row at {len(text)}")
        for gap, bits in zip(numbers(text[at:middle], c, gap_width), numbers(text[middle:end], c, width), strict=True):
            rank += gap + 1
            if rank >= n_vars:
                raise ValueError(f"rank {rank} of {n_vars} genes")
            count = (bits + 1) % 2**32
            value = np.frombuffer(bits.to_bytes(8, "little"), dtype, 1)[0] if is_raw else np.array(count).astype(dtype)[()]
            found.append((rank if order is None else int(order[rank]), value))
        at = end
    found.sort(key=lambda pair: pair[0])
    return [column for column, _ in found], np.array([value for _, value in found], dtype)


def check_of(text: bytes, nnz_order: int) -> int:
    """Give the row check."""
    total = nnz_order * 0x85EBCA77
    for i, word in enumerate(np.frombuffer(text, "<u4").tolist()):
        factor = (2 * i + 1) * 0x9E3779B1 % 2**32
        mixed = word ^ factor
        total += (mixed ^ mixed >> 16) * factor
    return total % 2**32


def sum_of(values: NDArray) -> int:
    """Give the sum that a row's entry holds."""
    counts = [count_of(value) for value in values]
    total = 2**32 if None in counts else sum(count for count in counts if count is not None)
    return min(total, 0xFFFFFFFF)


@dataclass
class Shard:
    """Rows of one packed shard, encoded here; `orders` are columns by rank, None for the identity."""

    dtype: str
    n_vars: int
    orders: list[NDArray | None] = field(default_factory=lambda: [None])
    payload: bytes = b""
    entries: list[tuple[int, int, int, int]] = field(default_factory=list)

    def add(self, columns: Sequence[int], values: NDArray, order: int = 0) -> None:
        """Append a row."""
        table = self.orders[order]
        self.add_bytes(encoded(columns, values, None if table is None else np.argsort(table)), len(columns), order, sum_of(values))

    def add_bytes(self, text: bytes, nnz: int, order: int = 0, total: int = 0xFFFFFFFF) -> None:
        """Append a row of these bytes, whatever they mean."""
        nnz_order = nnz | order << 24
        self.entries.append((len(self.payload) // 4, nnz_order, total, check_of(padded(text), nnz_order)))
        self.payload += padded(text)

    def table(self) -> NDArray:
        """Give the row table with its last entry."""
        return np.array([*self.entries, (len(self.payload) // 4, 0, 0, 0)], packed.ENTRY)

    def memory(self) -> NDArray[np.uint32]:
        """Give the payload with what may be read behind it, which is no zeros here."""
        return np.frombuffer(self.payload + b"\xa5" * packed.SLACK_BYTES, np.uint32).copy()


def no_faults() -> NDArray[np.int32]:
    """Give what `out_fault` holds before."""
    return np.full(shards.FAULTS, shards.NO_FAULT, np.int32)
