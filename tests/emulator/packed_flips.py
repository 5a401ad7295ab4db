"""Bytes of a small packed shard changed one by one, and what readers make of the file: an error that names where, or the right answer.

Knows the places of a file and the decoders, in Numba and emulated, not who asks. Needs neither pytest nor torch.
"""

import itertools
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from emulator.packed_batches import Batch, positions
from emulator.packed_cases import DeviceBatch, blocks_wanted
from emulator.packed_rows import Shard

from scdl_gpu.archive.packed_shard import PackedShard
from scdl_gpu.errors import ArchiveError

Answer = tuple[bytes, bytes, bytes]


def hashed(data: bytes) -> bytes:
    """Make the hashes of tables, sections and header of a shard right, where their places allow it."""
    text = bytearray(data)
    for at in (64, 96):
        offset, length = struct.unpack_from("<QQ", text, at)
        struct.pack_into(
            "<Q", text, at + 16, xxhash.xxh3_64_intdigest(bytes(text[offset : offset + length])) if offset + length < 1 << 30 else 0
        )
    struct.pack_into("<Q", text, 4088, xxhash.xxh3_64_intdigest(bytes(text[:4088])))
    return bytes(text)


def claimed(shard: PackedShard) -> list[int]:
    """List the bytes of a shard that mean something: header, its hash, and the three sections."""
    header = shard.header
    sections = ((s.offset, s.offset + s.size_bytes) for s in (header.orders, header.rows, header.payload))
    return list(itertools.chain(*(range(*place) for place in ((0, 160), (4088, 4096), *sections))))


def row_of(shard: PackedShard, at: int) -> int | None:
    """Give the row whose payload a byte of the file is in, None for other bytes."""
    ends = shard.payload_start + 4 * shard.entries["offset"].astype(np.int64)
    return int(np.searchsorted(ends, at, side="right")) - 1 if ends[0] <= at < ends[-1] else None


def batch_of(shard: PackedShard) -> Batch:
    """Describe all rows of an opened shard, in memory that ends where it ends. Raises ArchiveError for tables that are damaged."""
    shard.check_tables()
    orders = [None if order.table is None else np.array(order.table) for order in shard.orders]
    copy = Shard(shard.dtype.name, shard.n_vars, orders, shard.payload[: shard.n_words].tobytes(), shard.entries[:-1].tolist())
    return Batch([copy], [(0, row) for row in range(shard.n_rows)])


def answer(reader: Batch | DeviceBatch) -> Answer | int:
    """Decode all rows: columns, values and the dense matrix, or the row that is damaged. Raises AssertionError where decoders disagree.

    Kernels of a GPU verify row checks when rows are placed, and not again when they decode: what they make of a row that fails is
    only held to its bounds. Those in Numba verify them each time.
    """
    with blocks_wanted(1):
        (columns, values, fault), (made, dense_fault) = reader.csr(), reader.dense()
    found, in_dense, checked = (positions(one) for one in (fault, dense_fault, reader.check()))
    on_cpu = isinstance(reader, Batch)
    n_vars = (reader if isinstance(reader, Batch) else reader.batch).n_vars
    assert ((columns >= 0) & (columns < n_vars)).all()
    assert all(set(one) <= {"DAMAGED"} for one in (found, in_dense, checked)), (found, in_dense, checked)
    if checked and not on_cpu:
        return checked["DAMAGED"]
    assert found == in_dense, (found, in_dense)
    assert checked in ({}, found), (found, checked)
    return found["DAMAGED"] if found else (columns.tobytes(), values.tobytes(), made.tobytes())


def wrong_places(file: Path, step: int, memory: Any = None) -> Iterator[str]:
    """Invert every `step`-th byte that means something, alone, with the hashes as they are and with right ones; say what went wrong.

    file: a shard, written to and left as it was. memory: of the emulator; None: decoded by the kernels in Numba.
    With wrong hashes: an error that names the file, the row where it is in one, or the right answer. With right ones: any rows of
    the file, or an error; what touches memory that is not its own ends the process.
    """
    data, shard = file.read_bytes(), PackedShard.open(file.parent, file.name)
    whole, places = read(file, memory), claimed(shard)[::step]
    rows = {at: row_of(shard, at) for at in places}
    tries = [(at, mend) for at in places for mend in (False, True) if rows[at] is None or not mend]  # no hash is of the payload
    for at, mend in tries:
        changed = data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]
        file.write_bytes(hashed(changed) if mend else changed)
        try:
            found = read(file, memory)
        except ArchiveError as error:
            if str(file) not in str(error) or rows[at] is not None:
                yield f"byte {at}, {mend=}: {error}"
            continue
        if rows[at] is not None and found != rows[at]:
            yield f"byte {at} of row {rows[at]}, {mend=}: {found if isinstance(found, int) else 'an answer'}"
        if rows[at] is None and not mend and found != whole:
            yield f"byte {at}: another answer"
    file.write_bytes(data)


def read(file: Path, memory: Any) -> Answer | int:
    """Open a shard and decode all of it. Raises ArchiveError."""
    batch = batch_of(PackedShard.open(file.parent, file.name))
    return answer(batch if memory is None else DeviceBatch(batch, memory))
