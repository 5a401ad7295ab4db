"""Packed shards that are committed and never change, read by the reader of the specification and by ours."""

from pathlib import Path

import numpy as np
import pytest
from archive.packed_reader import Row, Shard, UnusualError, read_archive
from archives.write_packed import Case, cases, example, write_case
from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset as ReferenceDataset
from numpy.typing import NDArray

from scdl_gpu.archive.check import check_archive
from scdl_gpu.archive.packed import PackedArchive, open_archive, open_packed
from scdl_gpu.archive.packed_shard import PackedShard
from scdl_gpu.archive.raw import open_raw
from scdl_gpu.errors import NotRawError

GOLDEN = Path(__file__).parent.parent / "archives" / "packed"
CASES = cases()


def same(row: Row, case: Case, number: int) -> bool:
    """Compare a row, in whatever order, with what was packed, bit for bit."""
    columns, values = case.rows[number]
    found = sorted(zip(row.columns, row.values, strict=True))
    return found == sorted((int(column), value.tobytes()) for column, value in zip(columns, np.array(values, case.dtype), strict=True))


def decoded(shard: PackedShard) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray]:
    """Decode a whole shard with our kernel: pointers, columns and values of its dtype."""
    from scdl_gpu.kernels import cpu, packed, shards

    rows, lengths = packed.rows_of(shard.entries, np.arange(shard.n_rows))
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    made = np.dtype(np.uint8) if shard.dtype == np.bool_ else shard.dtype
    columns, values, fault = np.empty(indptr[-1], np.int32), np.empty(indptr[-1], made), np.full(4, shards.NO_FAULT, np.int32)
    orders = np.concatenate([packed.order_entry(order.table) for order in shard.orders])
    table, none = packed.shard_entry(shard.payload, shard.n_words, shard.source), np.empty(0, np.int32)
    bits = values.view(np.uint16) if made == np.float16 else values
    cpu.decode_csr(table, orders, none, rows, none, indptr, shard.n_vars, indptr, shards.kind_of(made), columns, bits, fault)
    assert fault.tolist() == [shards.NO_FAULT] * 4
    return indptr, columns, values.view(shard.dtype)


@pytest.mark.parametrize("name", CASES)
def test_golden_shards_follow_the_specification(name: str) -> None:
    """The reader that knows the specification alone finds nothing unusual, and every bit that was packed."""
    shard = Shard((GOLDEN / f"{name}.scdp").read_bytes())

    rows = list(shard.rows())

    assert len(rows) == len(CASES[name].rows)
    assert [number for number, row in enumerate(rows) if not same(row, CASES[name], number)] == []


@pytest.mark.parametrize("name", CASES)
def test_golden_shards_open(name: str) -> None:
    """Our reader verifies each golden shard, and decodes every bit of it."""
    case, shard = CASES[name], PackedShard.open(GOLDEN, f"{name}.scdp")

    shard.verify()
    indptr, columns, values = decoded(shard)

    assert (shard.n_rows, shard.n_vars, shard.dtype) == (len(case.rows), case.n_vars, np.dtype(case.dtype))
    for number, (wanted, kept) in enumerate(case.rows):
        part = slice(indptr[number], indptr[number + 1])
        assert columns[part].tolist() == list(wanted)
        assert values[part].tobytes() == np.array(kept, case.dtype).tobytes()


@pytest.mark.parametrize("name", CASES)
def test_the_writer_still_writes_golden_shards(name: str, tmp_path: Path) -> None:
    """The same rows make the same file, byte for byte."""
    record = write_case(tmp_path, f"{name}.scdp", CASES[name])

    assert (tmp_path / f"{name}.scdp").read_bytes() == (GOLDEN / f"{name}.scdp").read_bytes()
    assert record.size_bytes == (GOLDEN / f"{name}.scdp").stat().st_size


def test_the_strict_reader_is_strict(tmp_path: Path) -> None:
    """A byte that is not zero behind the payload is no harm, and is still seen by the reader that tests the writer."""
    data = bytearray((GOLDEN / "example.scdp").read_bytes())
    data[4096 + 200] = 1

    with pytest.raises(UnusualError, match="behind the payload"):
        Shard(bytes(data))


def test_the_golden_archive_opens() -> None:
    """Shards, tables and counts of the golden archive are those that were written."""
    archive = open_packed(GOLDEN / "archive")

    assert check_archive(archive)
    assert (archive.n_rows, archive.n_vars, archive.nnz, archive.dtype, archive.canonical) == (5, 10, 15, np.dtype("float32"), True)
    assert [(shard.path.name, shard.n_rows) for shard in archive.shards] == [("shard-00000.scdp", 3), ("shard-00001.scdp", 2)]
    assert archive.obs.lookup(3, ["batch"])[0][0] == "b"
    assert archive.var.lookup(4, ["symbol"])[0][0].tolist() == [f"gene{number}" for number in range(10)]
    assert (str(archive.header.version), archive.header.get_array("PACKED").length) == ("0.2.0", 5)


def test_the_golden_archive_follows_the_specification() -> None:
    """The reader that knows the specification alone reads the list of shards and their rows."""
    shards = read_archive(GOLDEN / "archive")

    rows = [row for shard in shards for row in shard.rows()]

    assert [len(row.columns) for row in rows] == [9, 0, 3, 2, 1]
    assert all(same(row, example(), number) for number, row in enumerate(rows[:3]))


def test_either_kind_of_archive_opens() -> None:
    """open_archive opens packed and raw archives, open_raw says what to do with a packed one, and bionemo-scdl refuses it."""
    packed, raw = GOLDEN / "archive", GOLDEN.parent / "0.1.0"

    assert isinstance(open_archive(packed), PackedArchive)
    assert open_archive(raw).nnz == open_raw(raw).nnz
    with pytest.raises(NotRawError, match=r"is a packed archive.*`scdl-gpu unpack`"):
        open_raw(packed)
    with pytest.raises(Exception, match=r"[Bb]ackend"):
        ReferenceDataset(str(packed))
