"""Rows end up where the plan says, as they are in the files, checked; and nothing is left where that fails."""

import ctypes
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from cells import matrix
from emulator.device import EmulatedDevice
from packed_cells import byte_of, flip, write_packed

from scdl_gpu import budget, convert_h5ad, placement, reader, slab
from scdl_gpu.archive.packed import open_packed
from scdl_gpu.archive.raw import RawArchive, open_raw
from scdl_gpu.device import size_words
from scdl_gpu.errors import ArchiveError, DeviceError
from scdl_gpu.placement import Placed, Plan, choose, place

GIB = 1 << 30
SHARD = np.dtype({"names": ["indices", "data", "nnz", "index_bytes", "kind", "is_sorted"], "formats": ["u8", "u8", "u8", "u4", "u4", "u4"],
                  "offsets": [0, 8, 16, 24, 28, 32], "itemsize": 40})  # fmt: skip
KINDS = ["uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64"]
RANK = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from emulator.device import EmulatedDevice
from scdl_gpu import slab
from scdl_gpu.archive.raw import open_raw
from scdl_gpu.placement import choose, place

def fail(*_):
    raise RuntimeError("the rows are there: nothing is to be read")

slab.fill = fail
import scdl_gpu.placement
scdl_gpu.placement.fill = fail
archives = [open_raw(Path(sys.argv[2]))]
device = EmulatedDevice(launcher=object())
plan = choose(archives, device, placement="pinned", host_budget=0)
with place(archives, plan, device) as placed:
    print(plan.why)
    print(len(device.pinned), sum(placed.table.numpy()[24:28]))
"""


def rows(n_rows: int, n_vars: int, dtype: str = "float32", seed: int = 0) -> scipy.sparse.csr_matrix:
    """Make counts 1 to 200 at random places, rows without any and a full one among them."""
    random = np.random.default_rng(seed)
    dense = random.integers(1, 200, (n_rows, n_vars)) * (random.random((n_rows, n_vars)) < random.choice([0, 0.1, 0.5], (n_rows, 1)))
    dense[n_rows // 2] = 1
    return scipy.sparse.csr_matrix(dense.astype(dtype))


def backwards(x: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
    """Turn the order of the columns within each row round."""
    order = np.concatenate([np.arange(stop - 1, start - 1, -1) for start, stop in zip(x.indptr[:-1], x.indptr[1:], strict=True)])
    return scipy.sparse.csr_matrix((x.data[order], x.indices[order], x.indptr), x.shape)


@pytest.fixture
def archive(tmp_path: Path) -> Callable[..., RawArchive]:
    """Give the function that stores a matrix as an archive, as it is, and opens it."""

    def make(x: scipy.sparse.csr_matrix, name: str = "a", **options: Any) -> RawArchive:
        convert_h5ad(x, tmp_path / name, canonical=False, **options)
        return open_raw(tmp_path / name)

    return make


@pytest.fixture
def device() -> EmulatedDevice:
    """Give a device that launches nothing."""
    return EmulatedDevice(16 * GIB, launcher=object())


def memory_at(address: int, size_bytes: int) -> bytes:
    """Give bytes of memory."""
    return ctypes.string_at(address, size_bytes)


def check_table(placed: Placed, shards: Sequence[RawArchive], is_sorted: Sequence[bool]) -> None:
    """Compare every array that the table leads to with its file, and check what the table says of it."""
    assert placed.table is not None
    table = placed.table.numpy()[: 40 * len(shards)].view(SHARD)
    for entry, shard in zip(table, shards, strict=True):
        assert memory_at(int(entry["indices"]), shard.indices.nbytes) == (shard.path / "col_ptr.npy").read_bytes()
        assert memory_at(int(entry["data"]), shard.data.nbytes) == (shard.path / "data.npy").read_bytes()
    assert [int(n) for n in table["nnz"]] == [shard.nnz for shard in shards]
    assert [int(n) for n in table["index_bytes"]] == [shard.indices.itemsize for shard in shards]
    assert [KINDS[kind] for kind in table["kind"]] == [shard.data.dtype.name for shard in shards]
    assert [bool(flag) for flag in table["is_sorted"]] == list(is_sorted)
    assert not (table["indices"] % 128).any()
    assert not (table["data"] % 128).any()
    assert placed.entries.tobytes() == table.tobytes()


@pytest.mark.parametrize("kind", ["device", "pinned"])
@pytest.mark.parametrize("piece", [1, 100, 1 << 20], ids=["rows", "pieces", "whole"])
def test_rows_are_where_the_table_says(
    kind: str, piece: int, archive: Callable[..., RawArchive], device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every array of every dtype is in place bit by bit, once for a shard that stands twice, and unsorted rows are marked."""
    monkeypatch.setattr(slab, "PIECE_ELEMENTS", piece)
    archives = [archive(rows(70, 30, seed=k), name, data_dtype=name) for k, name in enumerate(KINDS)]
    wide = archive(scipy.sparse.random(20, 100_000, 0.01, "csr", np.float32, 1), "wide")
    mixed = archive(backwards(rows(50, 300)), "backwards")
    shards = [*archives, wide, mixed, archives[0]]
    moved: list[int] = []

    plan = choose(shards, device, placement=kind)
    with place(shards, plan, device, progress=moved.append) as placed:
        check_table(placed, shards, [True] * 8 + [False, True])
        held = device.allocated_bytes, dict(device.pinned)

    stored = sum(shard.indices.nbytes + shard.data.nbytes for shard in shards[:-1])
    assert sum(moved) == stored
    assert stored <= plan.size_bytes < stored + 2 * 128 * len(shards)
    assert held[0] == (plan.size_bytes if kind == "device" else 0) + 512
    assert list(held[1].values()) == ([] if kind == "device" else [plan.size_bytes + 9])
    assert (device.allocated_bytes, device.pinned) == (0, {})


def test_values_go_straight_to_the_device(
    archive: Callable[..., RawArchive], device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the reader reaches the device, only columns pass through the host, to be checked."""
    monkeypatch.setattr(reader, "reaches_device", lambda: True)
    staged: list[int] = []
    staging = device.staging
    monkeypatch.setattr(device, "staging", lambda n: staged.append(n) or staging(n))  # type: ignore[func-returns-value]
    shards = [archive(rows(70, 30)), archive(backwards(rows(50, 300)), "b")]
    moved: list[int] = []

    with place(shards, choose(shards, device), device, progress=moved.append) as placed:
        check_table(placed, shards, [True, False])

    assert sum(moved) == sum(shard.indices.nbytes + shard.data.nbytes for shard in shards)
    assert sum(staged[:-1]) < sum(shard.indices.nbytes for shard in shards) + 2 * 128


@pytest.mark.parametrize("kind", ["device", "pinned"])
def test_no_rows_can_be_placed(kind: str, archive: Callable[..., RawArchive], device: EmulatedDevice) -> None:
    """Archives without rows or without elements are placed like others."""
    shards = [archive(scipy.sparse.csr_matrix((0, 5), dtype=np.float32)), archive(scipy.sparse.csr_matrix((4, 5), dtype=np.float32), "b")]

    with place(shards, choose(shards, device, placement=kind), device) as placed:
        check_table(placed, shards, [True, True])

    assert (device.allocated_bytes, device.pinned) == (0, {})


def test_ranks_share_pinned_rows(archive: Callable[..., RawArchive], device: EmulatedDevice) -> None:
    """A second process finds the rows in memory: it needs no budget for them, reads no file, and knows which are sorted."""
    shards = [archive(backwards(rows(70, 30)))]

    with place(shards, choose(shards, device, placement="pinned"), device):
        run = subprocess.run(
            [sys.executable, "-c", RANK, str(Path(__file__).parent), str(shards[0].path)], capture_output=True, text=True, check=False
        )

    assert run.returncode == 0, run.stderr
    assert "the memory that other processes hold them in" in run.stdout
    assert "1 " in run.stdout


def test_changed_files_are_not_shared(archive: Callable[..., RawArchive], device: EmulatedDevice) -> None:
    """Rows of an archive whose files changed since they were pinned are placed anew."""
    first = archive(rows(70, 30))
    with place([first], choose([first], device, placement="pinned"), device):
        values = first.path / "data.npy"
        content = bytearray(values.read_bytes())
        content[0] ^= 1
        values.write_bytes(content)
        os.utime(values, ns=(1, 1))
        changed = open_raw(first.path)

        with place([changed], choose([changed], device, placement="pinned"), device) as placed:
            check_table(placed, [changed], [True])


def damage(path: Path, name: str, position: int, value: int) -> RawArchive:
    """Open an archive, and then overwrite an element of its columns or row pointers."""
    opened = open_raw(path)
    array = np.memmap(path / name, (opened.indices if name == "col_ptr.npy" else opened.indptr).dtype, "r+")
    array[position] = value
    array.flush()
    return opened


@pytest.mark.parametrize("kind", ["device", "pinned"])
@pytest.mark.parametrize(
    ("name", "position", "value", "message"),
    [
        ("col_ptr.npy", 700, 255, r"col_ptr\.npy: row \d+ holds column 255, expected 0\.\.29"),
        ("row_ptr.npy", 33, 0, r"row_ptr\.npy: the pointer falls from \d+ to 0 at row 32"),
        ("row_ptr.npy", 33, 60_000, r"row_ptr\.npy: the pointer falls from 60000"),
    ],
    ids=["column", "falls", "outside"],
)
def test_damaged_rows_leave_nothing(
    kind: str, name: str, position: int, value: int, message: str, archive: Callable[..., RawArchive], device: EmulatedDevice,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The first faulty row is named, whichever piece it is in, and all memory is given back."""
    monkeypatch.setattr(slab, "PIECE_ELEMENTS", 64)
    shards = [archive(rows(300, 30)), damage(archive(rows(300, 30, seed=1), "b").path, name, position, value)]

    with pytest.raises(ArchiveError, match=message):
        place(shards, choose(shards, device, placement=kind), device)

    assert (device.allocated_bytes, device.pinned) == (0, {})


def test_duplicates_are_refused(archive: Callable[..., RawArchive], device: EmulatedDevice) -> None:
    """A column twice in a row is named with its row and the command that mends it; across two rows it is none."""
    twice = scipy.sparse.csr_matrix((np.ones(7, np.float32), [4, 1, 1, 0, 3, 2, 3], [0, 2, 4, 4, 7]), (4, 5))
    short = scipy.sparse.csr_matrix((np.ones(4, np.float32), [0, 0, 1, 1], [0, 0, 4]), (2, 3))

    for shard, message in (
        (archive(twice), "row 3 holds column 3 twice"),
        (archive(short, "b"), "row 1 holds 4 elements, the archive has 3"),
    ):
        with pytest.raises(ArchiveError, match=f"{message}.*scdl-gpu convert --canonical|{message}"):
            place([shard], choose([shard], device), device)

    assert device.allocated_bytes == 0


def test_a_replaced_archive_is_noticed(archive: Callable[..., RawArchive], device: EmulatedDevice, tmp_path: Path) -> None:
    """Rows of an archive that was exchanged after it was opened are not mixed with the new ones."""
    opened = archive(rows(20, 30))
    archive(rows(20, 30, seed=1), "new")
    (tmp_path / "a").rename(tmp_path / "old")
    (tmp_path / "new").rename(tmp_path / "a")

    for kind in ("device", "pinned"):
        with pytest.raises(ArchiveError, match=r"\w+\.npy was replaced since the archive was opened: open it anew"):
            place([opened], Plan(kind, 1, ""), device)  # type: ignore[arg-type]


@pytest.mark.parametrize("total", [0, 3000, 40_000])
def test_a_full_device_leaves_nothing(total: int, archive: Callable[..., RawArchive]) -> None:
    """A device that has no room, for the rows or for the table, is left as it was, and the error has the sizes."""
    shards = [archive(rows(300, 30))]
    size_bytes = choose(shards, None).size_bytes
    device = EmulatedDevice(min(total, size_bytes), launcher=object())

    with pytest.raises(DeviceError, match=rf"{size_words(size_bytes)} of rows could not be placed \(device\): emulated has"):
        place(shards, Plan("device", size_bytes, ""), device)

    assert device.allocated_bytes == 0


def test_memory_that_cannot_be_pinned_leaves_nothing(archive: Callable[..., RawArchive], device: EmulatedDevice) -> None:
    """Where page-locking fails the rows are let go, and the next attempt works."""
    shards = [archive(rows(300, 30))]
    plan = choose(shards, device, placement="pinned")
    device.fail_pin = True

    with pytest.raises(DeviceError, match=r"rows could not be placed \(pinned\): emulated cannot page-lock more"):
        place(shards, plan, device)

    held = slab.Layout(shards)
    assert not placement.Arena.exists(held.arena_bytes, held.name())
    with place(shards, plan, device) as placed:
        check_table(placed, shards, [True])


def test_host_rows_stay_in_their_files(archive: Callable[..., RawArchive], device: EmulatedDevice) -> None:
    """Placing rows on the host allocates nothing and has no table."""
    shards = [archive(rows(20, 30))]

    for some in (None, device):
        with place(shards, choose(shards, some, placement="host"), some) as placed:
            assert (placed.kind, placed.table) == ("host", None)
    assert device.allocated_bytes == 0


def test_what_is_placed_is_closed_once(archive: Callable[..., RawArchive], device: EmulatedDevice) -> None:
    """`close` may be repeated, and waits for what was enqueued before."""
    shards = [archive(rows(20, 30))]
    placed = place(shards, choose(shards, device, placement="pinned"), device)
    waits = device.waits

    placed.close()
    placed.close()

    assert device.waits == waits + 1
    assert placed.table is None
    assert device.pinned == {}


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Give the function that says how much memory the host has available; 100 MiB at first."""

    def set_to(available: int) -> None:
        monkeypatch.setattr(budget, "available_bytes", lambda: available)

    set_to(100 << 20)
    return set_to


FREE = 5 * GIB  # 1 GiB is not reserved


@pytest.mark.parametrize(
    ("total", "options", "kind", "why"),
    [
        (FREE, {}, "device", "of rows fit the budget of 1.0 GiB on emulated, 5.0 GiB of 5.0 GiB being free"),
        (FREE, {"placement": "pinned"}, "pinned", "fit the budget of 50.0 MiB on the host, 100.0 MiB being available"),
        (FREE, {"placement": "host"}, "host", "fit the budget of 50.0 MiB on the host"),
        (4 * GIB, {}, "pinned", "exceed the budget of 0 bytes on emulated, 4.0 GiB of 4.0 GiB being free; .* fit .* on the host"),
        (FREE, {"output_bytes": FREE}, "pinned", "exceed the budget of 0 bytes"),
        (FREE, {"memory_budget": 1000}, "pinned", "exceed the budget of 1,000 bytes"),
        (FREE, {"memory_budget": 0.0}, "pinned", "exceed the budget of 0 bytes"),
        (GIB, {"memory_budget": 0.5}, "device", "fit the budget of 512.0 MiB"),
        (GIB, {"memory_budget": 0.5, "table_bytes": 1 << 20}, "device", "fit the budget of 512.0 MiB .*, 1.0 MiB of it for tables"),
        (GIB, {"memory_budget": 0.5, "table_bytes": 1 << 29}, "pinned", "exceed the budget of 512.0 MiB .*, 512.0 MiB of it for tables"),
        (FREE, {"table_bytes": FREE}, "pinned", "exceed the budget of 1.0 GiB .*, 5.0 GiB of it for tables"),
        (GIB, {"memory_budget": np.float32(0.5)}, "device", "fit the budget of 512.0 MiB"),
        (GIB, {"memory_budget": np.int32(1 << 20)}, "device", "fit the budget of 1.0 MiB"),
        (GIB, {"memory_budget": 1 << 20}, "device", "fit the budget of 1.0 MiB"),
        (GIB, {"host_budget": 0.0}, "host", "exceed the budget of 0 bytes on the host, .* the rest is read from the disk"),
    ],
)
def test_auto_tries_device_pinned_host(
    total: int, options: dict[str, Any], kind: str, why: str, archive: Callable[..., RawArchive], host: object,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """The plan is the first that the budgets admit, says why with the sizes, and what is less than the device is logged."""
    caplog.set_level(logging.WARNING, "scdl_gpu")

    plan = choose([archive(rows(300, 30))], EmulatedDevice(total, launcher=object()), **options)

    assert plan.kind == kind
    assert re.search(why, plan.why), plan.why
    assert bool(caplog.records) == (kind != options.get("placement", "device"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"placement": "gpu"}, ValueError, "placement 'gpu' is unknown, expected one of auto, device, node, pinned, host"),
        ({"windows": True, "memory_budget": 1000}, DeviceError, "has no room for two windows of 64.0 KiB"),
        ({"memory_budget": 1.5}, ValueError, "memory_budget is 1.5, expected bytes as an int, or a fraction"),
        ({"memory_budget": -1}, ValueError, "memory_budget is -1"),
        ({"memory_budget": 1}, ValueError, "memory_budget is 1, which is one byte: memory_budget=1.0 is all that is free"),
        ({"host_budget": np.int64(1)}, ValueError, "host_budget is 1, which is one byte: host_budget=1.0 is all that is free"),
        ({"memory_budget": True}, TypeError, "memory_budget is True, expected bytes as an int"),
        ({"memory_budget": "4 GB"}, TypeError, "memory_budget is '4 GB', expected bytes as an int"),
        ({"memory_budget": np.float32(1.5)}, ValueError, "memory_budget is .*1.5.*, expected bytes as an int"),
        ({"windows": "no"}, TypeError, "windows is 'no', expected True, False or None"),
        ({"host_budget": float("nan")}, ValueError, "host_budget is nan"),
        ({"placement": "device", "memory_budget": 0}, DeviceError, "KiB of rows exceed the budget of 0 bytes .*; choose placement=.pinned"),
        ({"placement": "pinned", "host_budget": 0}, DeviceError, "exceed the budget of 0 bytes on the host, .*; choose placement=.host"),
        ({"memory_budget": 0, "host_budget": 0, "windows": False}, DeviceError, "exceed the budget of 0 bytes on the host, .*windows=None"),
    ],
)  # fmt: skip
def test_what_does_not_fit_or_mean_anything_raises(
    options: dict[str, Any], error: type[Exception], message: str, archive: Callable[..., RawArchive], device: EmulatedDevice, host: object
) -> None:
    """Explicit placements do not degrade, and budgets are bytes or fractions."""
    shards = [archive(rows(300, 30))]

    with pytest.raises(error, match=message):
        choose(shards, device, **options)


def test_the_cpu_has_only_the_host(
    archive: Callable[..., RawArchive], host: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    """Without a device rows stay in the page cache; what it cannot keep is logged, or refused where all must be resident."""
    shards = [archive(rows(300, 30))]

    fits = choose(shards, None, windows=False)
    host(100)
    exceeds = choose(shards, None)

    assert (fits.kind, exceeds.kind) == ("host", "host")
    assert "read from the disk" in caplog.text
    with pytest.raises(DeviceError, match="exceed the budget of 50 bytes on the host, 100 bytes being available"):
        choose(shards, None, windows=False)
    for kind in ("device", "pinned"):
        with pytest.raises(ValueError, match=f'placement="?.?{kind}.* needs a GPU'):
            choose(shards, None, placement=kind)


@pytest.mark.parametrize(
    ("size_bytes", "words"),
    [(0, "0 bytes"), (1023, "1,023 bytes"), (1024, "1.0 KiB"), (1536 << 10, "1.5 MiB"), (3 << 30, "3.0 GiB"), (5000 << 30, "5,000.0 GiB")],
)
def test_sizes_are_words(size_bytes: int, words: str) -> None:
    """Sizes are written in the largest binary unit up to GiB."""
    assert size_words(size_bytes) == words


def test_uploads_as_late_as_a_stream_may_make_them(device: EmulatedDevice) -> None:
    """The emulated device copies no earlier than somebody waits: what is changed before is what arrives."""
    host, there = device.staging(4), device.allocate(4)
    host[:] = 1
    device.upload(host, there[:4])
    event = device.record()
    host[:] = 2

    done = event.is_done()
    event.wait()

    assert (done, event.is_done()) == (False, True)
    assert there[:4].tolist() == [2] * 4
    assert device.empty((2, 3), torch.bfloat16).shape == (2, 3)


# Packed parts

PACKED = np.dtype([("payload", "u8"), ("words", "u8"), ("source", "u4"), ("reserved", "u4")])
PACKED_RANK = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from emulator.device import EmulatedDevice
from scdl_gpu import placement
from scdl_gpu.archive.packed import open_packed

placement.fill = None  # the rows are there: nothing is to be read
archives = [open_packed(Path(sys.argv[2]))]
device = EmulatedDevice(launcher=object())
plan = placement.choose(archives, device, placement="pinned", host_budget=0)
with placement.place(archives, plan, device) as placed:
    print(plan.why, len(placed.packed_entries))
"""


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Give a packed archive of three shards."""
    return write_packed(tmp_path / "packed", matrix())


@pytest.mark.parametrize("kind", ["device", "pinned"])
@pytest.mark.parametrize("piece", [1, 100, 1 << 20], ids=["rows", "pieces", "whole"])
def test_packed_shards_lie_packed(
    kind: str, piece: int, packed: Path, archive: Callable[..., RawArchive], device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Payloads are in place bit by bit, once for an archive that stands twice, beside raw rows; sizes are those of packed rows."""
    monkeypatch.setattr(slab, "PIECE_ELEMENTS", piece)
    raw, opened, again = archive(rows(70, 30)), open_packed(packed), open_packed(packed)
    shards = [*opened.shards, None, *again.shards]
    moved: list[int] = []

    plan = choose([opened, raw, again], device, placement=kind)
    with place([opened, raw, again], plan, device, progress=moved.append) as placed:
        assert placed.packed_table is not None
        table = placed.packed_table.numpy()[: PACKED.itemsize * len(shards)].view(PACKED).copy()
        for entry, shard in zip(table, shards, strict=True):
            if shard is not None:
                payload = shard.payload[: shard.n_words].tobytes()
                assert memory_at(int(entry["payload"]), len(payload)) == payload
                assert (entry["words"], entry["source"]) == (shard.n_words, 10)
                assert entry["payload"] % 128 == 0
        assert placed.packed_entries.tobytes() == table.tobytes()
        assert placed.entries["nnz"].tolist() == [0, 0, 0, raw.nnz, 0, 0, 0]

    stored = raw.indices.nbytes + raw.data.nbytes + sum(4 * shard.n_words for shard in opened.shards)
    assert sum(moved) == stored
    assert stored + 256 <= plan.size_bytes < stored + 256 + 128 * 5
    assert (device.allocated_bytes, device.pinned) == (0, {})


def test_ranks_share_packed_rows(packed: Path, device: EmulatedDevice) -> None:
    """A second process finds pinned payloads in memory, and reads no file."""
    archives = [open_packed(packed)]

    with place(archives, choose(archives, device, placement="pinned"), device):
        command = [sys.executable, "-c", PACKED_RANK, str(Path(__file__).parent), str(packed)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)

    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().endswith("the memory that other processes hold them in 3")


@pytest.mark.parametrize("kind", ["device", "pinned"])
@pytest.mark.parametrize("where", ["payload", "rows"])
def test_damaged_shards_leave_nothing(kind: str, where: str, packed: Path, device: EmulatedDevice) -> None:
    """A row whose bytes changed, or a row table, is named with its shard, and all memory is given back."""
    shard = open_packed(packed).shards[2]
    flip(shard.path, byte_of(shard, 20) if where == "payload" else shard.header.rows.offset + 40)
    archives = [open_packed(packed)]

    with pytest.raises(ArchiveError, match="shard-00002.scdp: row 20 does not match" if where == "payload" else "shard-00002.scdp: "):
        place(archives, choose(archives, device, placement=kind), device)

    assert (device.allocated_bytes, device.pinned) == (0, {})
