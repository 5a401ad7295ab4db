"""A reader of packed archives in plain Python, written from docs/packed-format.md alone; it shares no code with scdl_gpu.

It is slow and strict: a RefusedError is what every reader has to refuse, an UnusualError what a writer must not write.
"""

import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

GAP_BITS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 24]
VALUE_BITS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 16, 24, 32]
DTYPES = [None, "B", "b", "H", "h", "I", "i", "Q", "q", "e", "f", "d", "?"]


class RefusedError(Exception):
    """What no reader may read on at."""


class UnusualError(Exception):
    """What a reader can live with, and a writer must not do."""


def need(condition: Any, text: str) -> None:
    """Refuse unless `condition`."""
    if not condition:
        raise RefusedError(text)


def usual(condition: Any, text: str) -> None:
    """Find unusual unless `condition`."""
    if not condition:
        raise UnusualError(text)


@dataclass
class Row:
    """One row, columns in the order of ranks. values: of each, the bytes of the dtype."""

    columns: list[int]
    values: list[bytes]
    total: int


class Shard:
    """The bytes of a shard: header at once, tables by `check_tables`, rows one by one."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        need(len(data) >= 4096 and len(data) % 4096 == 0, f"{len(data)} bytes")
        need(data[:8] == b"\x89SCDP\r\n\x1a", "magic")
        need(xxhash.xxh3_64_intdigest(data[:4088]) == struct.unpack_from("<Q", data, 4088)[0], "hash of the header")
        major, minor, required, optional, dtype, block, self.n_orders = struct.unpack_from("<HHIIBBH", data, 8)
        self.n_rows, self.n_genes, self.nnz, self.most_nnz, self.most_words, zero = struct.unpack_from("<QQQIIQ", data, 24)
        need(major == 1 and required == 0 and block == 3, f"version {major}, features {required}, block {block}")
        need(1 <= dtype <= 12 and 1 <= self.n_orders <= 256, f"dtype {dtype}, {self.n_orders} orders")
        need(self.n_rows < 1 << 32 and 1 <= self.n_genes < 1 << 24, f"{self.n_rows} rows, {self.n_genes} genes")
        self.code = DTYPES[dtype]
        self.orders_at, self.rows_at, self.payload_at = (struct.unpack_from("<QQQQ", data, at) for at in (64, 96, 128))
        self._check_places()
        usual((minor, optional, zero) == (0, 0, 0) and not any(data[160:4088]), "reserved bytes of the header")
        usual(self.payload_at[2] == 0 and not any(place[3] for place in (self.orders_at, self.rows_at, self.payload_at)), "reserved bytes")

    def _check_places(self) -> None:
        need(self.rows_at[1] == 16 * (self.n_rows + 1), "length of the row table")
        need(self.payload_at[1] % 4 == 0 and self.payload_at[1] < 1 << 34, "length of the payload")
        need(self.orders_at[1] >= 32 * self.n_orders, "length of the orders")
        end = 4096
        for offset, length, _, _ in sorted([self.orders_at, self.rows_at, (self.payload_at[0], self.payload_at[1] + 256, 0, 0)]):
            need(offset % 4096 == 0 and offset >= end, f"a section at {offset}")
            usual(not any(self.data[end:offset]), f"bytes before {offset}")
            end = offset + length
        need(end <= len(self.data), "sections behind the end")
        usual(not any(self.data[end:]), "bytes behind the last section")
        usual(not any(self.data[sum(self.payload_at[:2]) : sum(self.payload_at[:2]) + 256]), "bytes behind the payload")

    @property
    def digest(self) -> str:
        """The hash as metadata.json has it."""
        return f"{struct.unpack_from('<Q', self.data, 4088)[0]:016x}"

    def check_tables(self) -> None:
        """Check gene orders and row table."""
        for offset, length, digest, _ in (self.orders_at, self.rows_at):
            need(xxhash.xxh3_64_intdigest(self.data[offset : offset + length]) == digest, "hash of a table")
        self.orders = [self._order(number) for number in range(self.n_orders)]
        self.entries = list(struct.iter_unpack("<IIII", self.data[self.rows_at[0] : self.rows_at[0] + self.rows_at[1]]))
        words, nnz_all, most_nnz, most_words = self.payload_at[1] // 4, 0, 0, 0
        need(self.entries[0][0] == 0 and self.entries[-1] == (words, 0, 0, 0), "first and last entry")
        for row, (entry, after) in enumerate(zip(self.entries[:-1], self.entries[1:], strict=True)):
            nnz, order, length = entry[1] & 0xFFFFFF, entry[1] >> 24, after[0] - entry[0]
            need(length >= 0 and (length == 0) == (nnz == 0) and (nnz + 7) // 8 <= 4 * length, f"row {row}: its length")
            need(nnz <= self.n_genes and order < self.n_orders, f"row {row}: nonzeros or order")
            nnz_all, most_nnz, most_words = nnz_all + nnz, max(most_nnz, nnz), max(most_words, length)
        need((nnz_all, most_nnz, most_words) == (self.nnz, self.most_nnz, self.most_words), "sums of the row table")

    def _order(self, number: int) -> list[int] | None:
        start = self.orders_at[0]
        offset, flags, item, digest = struct.unpack_from("<QII16s", self.data, start + 32 * number)
        need(flags in (0, 1), f"order {number}: flags {flags}")
        if flags == 1:
            usual((offset, item, digest) == (0, 0, bytes(16)), f"order {number}: no bare identity")
            return None
        need(item == (2 if self.n_genes <= 65536 else 4) and offset % 64 == 0, f"order {number}: entries of {item} bytes at {offset}")
        need(offset + item * self.n_genes <= self.orders_at[1], f"order {number}: its table")
        table = self.data[start + offset : start + offset + item * self.n_genes]
        need(xxhash.xxh3_128(table).digest() == digest, f"order {number}: its hash")
        order = [entry for (entry,) in struct.iter_unpack("<H" if item == 2 else "<I", table)]
        need(sorted(order) == list(range(self.n_genes)), f"order {number}: no permutation")
        usual(order != list(range(self.n_genes)), f"order {number}: the identity has no table")
        return order

    def row(self, number: int) -> Row:
        """Read one row, after `check_tables`."""
        start, second, total, check = self.entries[number]
        text = self.data[self.payload_at[0] + 4 * start : self.payload_at[0] + 4 * self.entries[number + 1][0]]
        need(check_of(text, second) == check, f"row {number}: its check")
        nnz, order = second & 0xFFFFFF, self.orders[second >> 24]
        ranks, values, counts, at, rank = [], [], [], (nnz + 7) // 8, -1
        for block in range((nnz + 7) // 8):
            c, control = min(8, nnz - 8 * block), text[block]
            gaps, at = fields(text, at, c, GAP_BITS[control & 15])
            width = VALUE_BITS[control >> 4] if control >> 4 < 15 else 8 * struct.calcsize("<" + self.code)
            bits, at = fields(text, at, c, width)
            for gap in gaps:
                rank += gap + 1
                ranks.append(rank)
            need(rank < self.n_genes, f"row {number}: rank {rank}")
            found = [field + 1 for field in bits] if control >> 4 < 15 else [count_of(field, width, self.code) for field in bits]
            usual(control & 15 == code_for(gaps, GAP_BITS), f"row {number}: gap code {control & 15}")
            usual(control >> 4 == (15 if None in found else code_for([n - 1 for n in found], VALUE_BITS)), f"row {number}: value code")
            counts += found
            raw = control >> 4 == 15
            values += [bits_of(field, width) if raw else encoded(field + 1, self.code) for field in bits]
        usual(4 * (-(-at // 4)) == len(text) and not any(text[at:]), f"row {number}: what follows its blocks")
        expected = 0xFFFFFFFF if None in counts else min(sum(counts), 0xFFFFFFFF)
        usual(total == expected, f"row {number}: sum {total}, expected {expected}")
        usual(all(any(value) for value in values), f"row {number}: a zero")
        return Row(ranks if order is None else [order[rank] for rank in ranks], values, total)

    def rows(self) -> Iterator[Row]:
        """Read all rows."""
        self.check_tables()
        for number in range(self.n_rows):
            yield self.row(number)


def fields(text: bytes, at: int, count: int, width: int) -> tuple[list[int], int]:
    """Read `count` fields of `width` bits at `at`, and return where they end."""
    end = at + (count * width + 7) // 8
    need(end <= len(text), "a block that leaves its row")
    whole = int.from_bytes(text[at:end], "little")
    usual(whole >> (count * width) == 0, "bits behind the last field")
    return [whole >> (width * i) & ((1 << width) - 1) for i in range(count)], end


def check_of(text: bytes, second: int) -> int:
    """The check of a row."""
    check = second * 0x85EBCA77
    for i, (word,) in enumerate(struct.iter_unpack("<I", text)):
        f = (2 * i + 1) * 0x9E3779B1 % 2**32
        x = word ^ f
        check += (x ^ (x >> 16)) * f
    return check % 2**32


def code_for(numbers: list[int], widths: list[int]) -> int:
    """The smallest code whose bits hold all numbers."""
    return next(code for code, width in enumerate(widths) if max(numbers) < 1 << width)


def bits_of(field: int, width: int) -> bytes:
    """A raw field as the bytes of its dtype."""
    return field.to_bytes(width // 8, "little")


def encoded(count: int, code: str) -> bytes:
    """A count as the bytes of the dtype."""
    try:
        return struct.pack("<" + code, count)
    except (struct.error, OverflowError) as error:
        raise UnusualError(f"count {count} in dtype {code}") from error


def count_of(field: int, width: int, code: str) -> int | None:
    """The count that raw bits say, None if they say something else."""
    if code == "?":
        return 1 if field == 1 else None
    (value,) = struct.unpack("<" + code, bits_of(field, width))
    return int(value) if 1 <= value < 2**32 and value == int(value) else None


def read_archive(folder: Path) -> list[Shard]:
    """Read the shards of an archive, in the order of the rows."""
    metadata = json.loads((folder / "metadata.json").read_bytes())
    packed = metadata["packed"]
    need(packed["version"] == 1, f"version {packed['version']}")
    shards = []
    for told in packed["shards"]:
        need(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.scdp", told["name"]), f"a shard named {told['name']!r}")
        data = (folder / told["name"]).read_bytes()
        shard = Shard(data)
        found = (shard.n_rows, shard.nnz, len(data), shard.digest)
        need(found == (told["rows"], told["nnz"], told["bytes"], told["hash"]), f"{told['name']}: {found}")
        shards.append(shard)
    need(metadata["num_rows"] == sum(shard.n_rows for shard in shards), "num_rows")
    need(metadata["nnz"] == sum(shard.nnz for shard in shards), "nnz")
    usual(metadata["canonical"] is True, "canonical")
    return shards
