"""The first 4,096 bytes of a packed shard: what it holds, and where its three sections lie.

Knows fields and the limits of them, not files; docs/packed-format.md lays the bytes down. A header that parses describes
sections that lie apart inside a file of the size it is compared with, so that whoever maps them needs no further bounds.
"""

import struct
from dataclasses import dataclass
from typing import NamedTuple, Self

import xxhash

from scdl_gpu.kernels.packed import ENTRY, SLACK_BYTES, SOURCES

MAGIC = b"\x89SCDP\r\n\x1a"
MAJOR, MINOR = 1, 0
KNOWN_FEATURES = 0
"""Bits of features that this reader understands."""
PAGE = 4096
"""Sections begin, and files end, at multiples of this: direct reads from NVMe want it."""
HEADER_BYTES = 4096
LOG2_BLOCK = 3
MOST_GENES = (1 << 24) - 1
MOST_ROWS = (1 << 32) - 1
MOST_WORDS = (1 << 32) - 1
"""Of a payload: the last entry of the row table holds it in 32 bits."""
MOST_ORDERS = 256
ORDER_BYTES = 32
"""Of an entry of the directory of gene orders."""

_FIELDS = struct.Struct("<8sHHIIBBHQQQIIQ")
_SECTION = struct.Struct("<QQQQ")
_SECTIONS_AT, _HASH_AT = 64, HEADER_BYTES - 8
_DAMAGED = "the file is damaged, or its copy incomplete: copy it again, or pack the source anew"


class Section(NamedTuple):
    """A stretch of a file. digest: XXH3-64 of its bytes; 0 for the payload, whose rows have checks of their own."""

    offset: int
    size_bytes: int
    digest: int


class ShardHeaderError(ValueError):
    """Bytes that are no header of a shard; the text lacks the file, which is not known here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardHeader:
    """What the header of a shard says. source: code of the dtype of its values, see kernels/packed.py; longest in nonzeros and words."""

    source: int
    n_orders: int
    n_rows: int
    n_vars: int
    nnz: int
    longest_nnz: int
    longest_words: int
    orders: Section
    rows: Section
    payload: Section
    minor: int = MINOR
    optional: int = 0

    @property
    def n_words(self) -> int:
        """Words of the payload."""
        return self.payload.size_bytes // 4

    @property
    def dtype(self) -> str:
        """Name of the dtype of the values."""
        return SOURCES[self.source - 1]

    def to_bytes(self) -> bytes:
        """Write as 4,096 bytes; raises ShardHeaderError for numbers beyond the limits of the format."""
        self._check_limits()
        fixed = _FIELDS.pack(
            MAGIC, MAJOR, self.minor, 0, self.optional, self.source, LOG2_BLOCK, self.n_orders, self.n_rows, self.n_vars, self.nnz,
            self.longest_nnz, self.longest_words, 0,
        )  # fmt: skip
        sections = b"".join(_SECTION.pack(*section, 0) for section in (self.orders, self.rows, self.payload))
        text = (fixed + sections).ljust(_HASH_AT, b"\0")
        return text + struct.pack("<Q", xxhash.xxh3_64_intdigest(text))

    @classmethod
    def parse(cls, text: bytes, file_bytes: int) -> Self:
        """Read the first 4,096 bytes of a file of `file_bytes`; what it returns can be mapped. Raises ShardHeaderError."""
        if len(text) < HEADER_BYTES:
            raise ShardHeaderError(f"holds {len(text):,} bytes, a header has {HEADER_BYTES:,}; {_DAMAGED}")
        magic, major, minor, required, optional, source, log2_block, n_orders, n_rows, n_vars, nnz, longest_nnz, longest_words, _ = (
            _FIELDS.unpack_from(text)
        )
        if magic != MAGIC:
            raise ShardHeaderError(
                f"begins with {magic.hex(' ')}, expected {MAGIC.hex(' ')}; it is no packed shard, or the file is damaged"
            )
        if struct.unpack_from("<Q", text, _HASH_AT)[0] != xxhash.xxh3_64_intdigest(text[:_HASH_AT]):
            raise ShardHeaderError(f"its header does not match its hash; {_DAMAGED}")
        if major != MAJOR:
            raise ShardHeaderError(f"is of version {major}.{minor} of the packed format, expected {MAJOR}; upgrade scdl_gpu")
        if required & ~KNOWN_FEATURES:
            raise ShardHeaderError(f"needs features {required & ~KNOWN_FEATURES:#x}, which this scdl_gpu does not know; upgrade scdl_gpu")
        if log2_block != LOG2_BLOCK:
            raise ShardHeaderError(f"has blocks of 2^{log2_block} nonzeros, expected 2^{LOG2_BLOCK}; {_DAMAGED}")
        sections = [Section(*_SECTION.unpack_from(text, _SECTIONS_AT + k * _SECTION.size)[:3]) for k in range(3)]
        header = cls(
            source=source, n_orders=n_orders, n_rows=n_rows, n_vars=n_vars, nnz=nnz, longest_nnz=longest_nnz, longest_words=longest_words,
            orders=sections[0], rows=sections[1], payload=sections[2], minor=minor, optional=optional,
        )  # fmt: skip
        header._check_limits()
        header._check_places(file_bytes)
        return header

    def _check_limits(self) -> None:
        limits = {
            "source dtype": (self.source, 1, len(SOURCES)),
            "gene orders": (self.n_orders, 1, MOST_ORDERS),
            "rows": (self.n_rows, 0, MOST_ROWS),
            "genes": (self.n_vars, 1, MOST_GENES),
            "nonzeros": (self.nnz, 0, self.n_rows * self.longest_nnz),
            "nonzeros of the longest row": (self.longest_nnz, 0, self.n_vars),
            "words of the longest row": (self.longest_words, 0, self.n_words),
            "bytes of the row table": (self.rows.size_bytes, *2 * [(self.n_rows + 1) * ENTRY.itemsize]),
            "bytes of the payload": (self.payload.size_bytes, 0, 4 * MOST_WORDS),
            "bytes of gene orders": (self.orders.size_bytes, self.n_orders * ORDER_BYTES, 1 << 63),
        }
        for name, (value, least, most) in limits.items():
            if not least <= value <= most:
                raise ShardHeaderError(f"its header gives {value:,} as {name}, expected {least:,} to {most:,}; {_DAMAGED}")
        if self.payload.size_bytes % 4:
            raise ShardHeaderError(f"its payload has {self.payload.size_bytes:,} bytes, expected whole words of 4; {_DAMAGED}")

    def _check_places(self, file_bytes: int) -> None:
        """Raise ShardHeaderError unless the sections lie apart, behind the header, in a file of this size."""
        if file_bytes % PAGE:
            raise ShardHeaderError(f"holds {file_bytes:,} bytes, expected a multiple of {PAGE:,}; {_DAMAGED}")
        end, before = HEADER_BYTES, "header"
        spare = {"payload": SLACK_BYTES}
        places = {"gene orders": self.orders, "row table": self.rows, "payload": self.payload}
        for name, section in sorted(places.items(), key=lambda place: place[1].offset):
            if section.offset % PAGE or section.offset < end:
                raise ShardHeaderError(
                    f"its {name} begin at {section.offset:,}, expected a page of {PAGE:,} behind the {before}; {_DAMAGED}"
                )
            end, before = section.offset + section.size_bytes + spare.get(name, 0), name
        if end > file_bytes:
            raise ShardHeaderError(f"holds {file_bytes:,} bytes, its {before} end at {end:,}; {_DAMAGED}")
