"""GPUBatchLoader on a device, which is emulated: its batches are those of the CPU, bit for bit, whatever lies where, without a wait.

The CPU's batches are held to NumPy and SciPy in test_loader.py.
"""

import logging
import pickle
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from cells import N_ROWS, N_VARS, annotated, backwards, dense, matrix, rows_of
from emulator.device import EmulatedDevice
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from scdl_gpu import ArchiveError, Batch, DeviceError, GPUBatchLoader, convert_h5ad
from scdl_gpu.cuda_assembly import ASK_EVERY

PLACEMENTS = ["device", "pinned", "host"]
OBS = ("line", "well", "good", "depth", "count", "plate")
VAR = ["g7", 3, "g39"]
OUTPUTS = [
    {},
    {"dtype": torch.float64},
    {"dtype": torch.int32},
    {"output": "dense"},
    {"output": "dense", "dtype": torch.float16, "var": VAR},
    {"output": "dense", "dtype": torch.bfloat16},
    {"output": "dense", "dtype": torch.float64, "var": VAR},
    {"output": "dense", "dtype": torch.uint8},
    {"output": "dense", "dtype": torch.int16, "var": VAR},
    {"output": "dense", "dtype": torch.int32},
    {"output": "dense", "dtype": torch.int64, "var": VAR},
    {"output": "dense", "normalize_total": 1e4},
    {"output": "dense", "log1p": True, "dtype": torch.float16},
    {"output": "dense", "normalize_total": 1e4, "log1p": True, "var": VAR, "dtype": torch.bfloat16},
    {"output": "dense", "normalize_total": 1.0, "log1p": True, "dtype": torch.float64},
]
QUIET_OPS = ("view", "slice", "sparse_", "crow_indices", "col_indices", "values", "detach", "alias", "sym_", "lift_fresh", "copy_")
"""How operations begin that torch may be asked for while a batch is made: none reads a tensor, so none would wait for a GPU; the
copies are the device's own."""

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")


class LateDevice(EmulatedDevice):
    """A device that lags behind: kernels too are enqueued, and `lag` of what is enqueued is always left to do."""

    def __init__(self, lag: float) -> None:
        super().__init__()
        self.lag = lag

    def launch(self, name: str, grid: Sequence[int], block: Sequence[int], args: Sequence[int | float], shared_bytes: int = 0) -> None:
        """Enqueue the kernel."""
        self._enqueued.append(lambda: self._launcher.launch(name, grid, block, args, shared_bytes))
        while len(self._enqueued) > self.lag * random.Random(len(self._enqueued)).random():
            self.flush(1)


class ShortDevice(EmulatedDevice):
    """A device that refuses the n-th request for memory, on either side."""

    def __init__(self, refused: int) -> None:
        super().__init__()
        self.refused, self.asked = refused, 0

    def _ask(self) -> None:
        self.asked += 1
        if self.asked == self.refused:
            raise DeviceError("no memory is left")

    def allocate(self, size_bytes: int) -> torch.Tensor:
        """Make memory, or refuse."""
        self._ask()
        return super().allocate(size_bytes)

    def staging(self, size_bytes: int) -> torch.Tensor:
        """Make page-locked memory, or refuse."""
        self._ask()
        return super().staging(size_bytes)

    def pin(self, memory: torch.Tensor) -> int:
        """Page-lock, or refuse."""
        self._ask()
        return super().pin(memory)


class Ops(TorchDispatchMode):
    """Notes which operations torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note one, and do it."""
        self.seen.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give an archive of `annotated(matrix())`."""
    return convert_h5ad(annotated(matrix()), tmp_path_factory.mktemp("cuda") / "archive", data_dtype="float32")


@pytest.fixture
def device() -> EmulatedDevice:
    """Give a device."""
    return EmulatedDevice()


def finished(device: EmulatedDevice, batches: Any) -> list[Batch]:
    """Return all batches, when the device is done with them."""
    kept = list(batches)
    device.record().wait()
    return kept


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    """Check that batches are the same, bit for bit, in the same dtypes."""
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine.rows, theirs.rows)
        assert torch.equal(mine.is_padding, theirs.is_padding)
        assert (mine.x.layout, mine.x.shape) == (theirs.x.layout, theirs.x.shape)
        for a, b in zip(parts_of(mine), parts_of(theirs), strict=True):
            assert a.dtype == b.dtype
            assert a.contiguous().view(torch.uint8).tolist() == b.contiguous().view(torch.uint8).tolist()


def parts_of(batch: Batch) -> list[torch.Tensor]:
    """List the tensors that a batch is made of."""
    x = batch.x
    return [*((x.crow_indices(), x.col_indices(), x.values()) if x.layout == torch.sparse_csr else (x,)), *batch.obs.values()]


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("options", OUTPUTS, ids=str)
def test_batches_are_those_of_the_cpu(archive: Path, device: EmulatedDevice, placement: str, options: dict[str, Any]) -> None:
    """Every output of every placement equals the CPU's, obs columns and the padding of the last batch included."""
    expected = list(GPUBatchLoader(archive, 16, seed=3, device="cpu", obs=OBS, **options))
    loader = GPUBatchLoader(archive, 16, seed=3, device=device, placement=placement, obs=OBS, **options)

    found = finished(device, loader)

    assert_same(found, expected)
    assert [list(batch.obs) for batch in found] == [list(OBS)] * 7


@pytest.mark.parametrize("placement", ["device", "pinned"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64"])
def test_every_stored_dtype(tmp_path: Path, device: EmulatedDevice, placement: str, dtype: str) -> None:
    """Rows stored in any dtype come out as NumPy has them, and as the CPU gives them."""
    x = matrix()
    path = convert_h5ad(x, tmp_path / "archive", data_dtype=dtype)

    found = finished(device, GPUBatchLoader(path, 16, device=device, placement=placement))

    assert_same(found, list(GPUBatchLoader(path, 16, device="cpu")))
    for batch in found:
        np.testing.assert_array_equal(dense(batch.x), x[batch.rows.numpy()].toarray().astype(dtype))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("options", [{}, {"output": "dense"}, {"output": "dense", "normalize_total": 10.0}], ids=str)
def test_several_archives_of_several_dtypes(tmp_path: Path, device: EmulatedDevice, placement: str, options: dict[str, Any]) -> None:
    """A list is one dataset: dtypes differ, one archive is unsorted, one has one row, one stands there twice."""
    parts = [annotated(x, seed) for seed, x in enumerate([matrix(n_rows=30), backwards(matrix(n_rows=40, seed=1)), matrix(n_rows=1)])]
    paths = [
        convert_h5ad(part, tmp_path / f"part{k}", data_dtype=dtype, canonical=k != 1)
        for k, (part, dtype) in enumerate(zip(parts, ["uint8", "float32", "uint16"], strict=True))
    ]
    order = [0, 1, 2, 0]
    whole = np.concatenate([parts[k].X.toarray() for k in order])
    archives = [paths[k] for k in order]

    found = finished(device, GPUBatchLoader(archives, 7, device=device, placement=placement, obs=OBS, **options))

    assert_same(found, list(GPUBatchLoader(archives, 7, device="cpu", obs=OBS, **options)))
    assert sorted(rows_of(found)) == list(range(101))
    if "normalize_total" not in options:
        for batch in found:
            np.testing.assert_array_equal(dense(batch.x), whole[batch.rows.numpy()])


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_unsorted_rows_come_out_sorted(tmp_path: Path, device: EmulatedDevice, placement: str) -> None:
    """Rows whose columns are stored in another order are sorted on the way; a column twice is refused by name before any batch."""
    x = matrix()
    path = convert_h5ad(backwards(x), tmp_path / "unsorted", canonical=False)
    twice = sp.csr_matrix((np.ones(4, np.float32), np.array([1, 1, 2, 3]), np.array([0, 2, 4])), shape=(2, N_VARS))
    duplicates = convert_h5ad(twice, tmp_path / "twice", canonical=False)

    found = finished(device, GPUBatchLoader(path, 16, device=device, placement=placement))

    for batch in found:
        np.testing.assert_array_equal(dense(batch.x), x[batch.rows.numpy()].toarray())
    with pytest.raises(ArchiveError, match=r"row 0 holds .*twice.*canonical"):
        list(GPUBatchLoader(duplicates, 2, device=device, placement=placement))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("lag", [0, 12, np.inf])
@pytest.mark.parametrize("output", ["csr", "dense"])
def test_a_device_that_lags_gets_what_was_sent(archive: Path, placement: str, lag: float, output: str) -> None:
    """Page-locked memory is not used again while a copy from it is still to come: batches that are kept are right in the end."""
    device = LateDevice(lag)
    loader = GPUBatchLoader(archive, 4, device=device, placement=placement, output=output, obs=OBS)

    found = finished(device, loader)

    assert_same(found, list(GPUBatchLoader(archive, 4, device="cpu", output=output, obs=OBS)))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("output", ["csr", "dense"])
def test_no_batch_waits(archive: Path, device: EmulatedDevice, placement: str, output: str) -> None:
    """Between the first batch and the last the host never waits, nor asks torch for what would; once at the end of the epoch."""
    loader = GPUBatchLoader(archive, 2, device=device, placement=placement, output=output, obs=OBS)
    before, launches, counts = device.waits, device.launches, set()

    with Ops() as ops:
        for _ in loader:
            counts.add(device.waits - before)

    assert len(loader) > 3 * ASK_EVERY
    assert counts == {0}
    assert device.waits - before == (0 if placement == "host" else 1)
    assert device.launches - launches == (0 if placement == "host" else len(loader))
    assert {name for name in ops.seen if not name.removeprefix("aten.").startswith(QUIET_OPS)} == set()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_state_resumes_on_the_other_kind_of_device(archive: Path, device: EmulatedDevice, placement: str) -> None:
    """What a CPU began a device goes on with, and the other way round: same batches, same end of the epoch, same next epoch."""
    options: dict[str, Any] = {"seed": 8, "rank": 1, "world_size": 2}
    whole = GPUBatchLoader(archive, 5, device="cpu", **options)
    expected = [*whole, *whole]
    first = GPUBatchLoader(archive, 5, device="cpu", **options)
    second = GPUBatchLoader(archive, 5, device=device, placement=placement, **(options | {"seed": 0}))
    third = GPUBatchLoader(archive, 5, device="cpu", **options)

    found = [batch for _, batch in zip(range(3), first, strict=False)]
    second.load_state_dict(first.state_dict())
    found += [batch for _, batch in zip(range(4), second, strict=False)]
    device.record().wait()
    third.load_state_dict(second.state_dict())
    found += [*third, *third]

    assert len(expected) == 22
    assert_same(found, expected)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_drop_last_and_ranks(archive: Path, device: EmulatedDevice, placement: str) -> None:
    """Ranks share out an epoch as on the CPU, with and without its last step."""
    for drop_last, n in ((False, N_ROWS), (True, 90)):
        ranks = [
            GPUBatchLoader(archive, 15, device=device, placement=placement, rank=rank, world_size=2, drop_last=drop_last)
            for rank in range(2)
        ]

        rows = [rows_of(finished(device, loader)) for loader in ranks]

        assert len({*rows[0], *rows[1]}) == len(rows[0]) + len(rows[1]) == n


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("output", ["csr", "dense"])
def test_batches_without_rows_or_values(tmp_path: Path, device: EmulatedDevice, placement: str, output: str) -> None:
    """Batches of no rows or of empty rows, archives of no rows, and outputs of no genes are made like any other."""
    x = matrix()
    path = convert_h5ad(annotated(x), tmp_path / "archive")
    nothing = convert_h5ad(sp.csr_matrix((0, N_VARS), dtype=np.float32), tmp_path / "nothing")
    empty = convert_h5ad(sp.csr_matrix((5, N_VARS), dtype=np.float32), tmp_path / "empty")
    batches = [[], [0, 17, 34], [0], [1, 1, 1]]
    options: dict[str, Any] = {"device": device, "placement": placement, "output": output}

    found = finished(device, GPUBatchLoader(path, batch_sampler=batches, obs=OBS, **options))

    for batch, rows in zip(found, batches, strict=True):
        np.testing.assert_array_equal(dense(batch.x), x[rows].toarray())
        assert batch.rows.tolist() == rows
        assert all(len(column) == len(rows) for column in batch.obs.values())
    assert list(GPUBatchLoader(nothing, **options)) == []
    assert [dense(batch.x).sum() for batch in finished(device, GPUBatchLoader(empty, 2, **options))] == [0, 0, 0]
    if output == "dense":
        assert [batch.x.shape for batch in finished(device, GPUBatchLoader(path, 60, var=[], **options))] == [(60, 0)] * 2


class LongLists(list[list[int]]):
    """A batch_sampler that says that its lists may be long."""

    batch_size = 2**31 // N_VARS + 1


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_large_batches_have_large_indices(archive: Path, placement: str) -> None:
    """Where a batch of the size given may hold 2^31 elements, row pointers and columns are int64 in every batch."""
    device = EmulatedDevice(1 << 40)
    batches = LongLists([[3, 1], [5, 102, 9]])

    found = finished(device, GPUBatchLoader(archive, batch_sampler=batches, device=device, placement=placement))

    assert {batch.x.crow_indices().dtype for batch in found} | {batch.x.col_indices().dtype for batch in found} == {torch.int64}
    assert_same(found, list(GPUBatchLoader(archive, batch_sampler=batches, device="cpu")))


# Faults


def column_in_place(loader: GPUBatchLoader, row: int) -> np.ndarray:
    """Give the first column of a row of a loader of one archive, as it lies in the memory that kernels read."""
    entry = loader._assembler._placed.entries[0]  # type: ignore[attr-defined]
    archive = loader._shards.archives[0]
    size = int(entry["index_bytes"])
    address = int(entry["indices"]) + int(archive.indptr[row]) * size
    bits = (np.ctypeslib.ctypes.c_uint8 * size).from_address(address)
    return np.frombuffer(bits, f"u{size}")


@pytest.mark.parametrize("placement", ["device", "pinned"])
@pytest.mark.parametrize("output", ["csr", "dense"])
def test_memory_that_was_written_over_is_noticed(archive: Path, device: EmulatedDevice, placement: str, output: str) -> None:
    """A column out of range where rows lie raises at a later batch, naming archive and row; the rest is served as before."""
    loader = GPUBatchLoader(archive, 1, shuffle=False, device=device, placement=placement, output=output)
    column_in_place(loader, 20)[:] = 255
    served: list[Batch] = []

    with pytest.raises(DeviceError, match=r"archive: row 20 is whole in the file, but not in the (device|pinned) memory"):
        served.extend(loader)

    assert 21 <= len(served) < 21 + 2 * ASK_EVERY
    column_in_place(loader, 20)[:] = matrix()[20].indices[0]
    loader.set_epoch(0)
    assert_same(finished(device, loader), list(GPUBatchLoader(archive, 1, shuffle=False, device="cpu", output=output)))
    loader.close()


def test_a_fault_in_the_last_batches_is_raised_at_the_end(archive: Path, device: EmulatedDevice) -> None:
    """No epoch ends without the answer for all of its batches, and no `with` that was left early."""
    loader = GPUBatchLoader(archive, 1, shuffle=False, device=device, placement="device")
    column_in_place(loader, 101)[:] = 255
    batches = iter(loader)

    served = [next(batches) for _ in range(N_ROWS)]

    with pytest.raises(DeviceError, match="row 101 "):
        next(batches)
    assert rows_of(served) == list(range(N_ROWS))
    with loader:
        next(iter(loader))
    loader = GPUBatchLoader(archive, 3, shuffle=False, device=device, placement="device")
    column_in_place(loader, 1)[:] = 255
    with pytest.raises(DeviceError, match="row 1 "), loader:
        next(iter(loader))


def test_the_faulty_one_of_several_batches_is_found(archive: Path, device: EmulatedDevice) -> None:
    """Batches of different sizes are told apart: the row that is named is the faulty one, not one at its position elsewhere."""
    batches = [[5], [1, 2, 3], [7, 8, 9], [4], [10, 11, 12]]
    loader = GPUBatchLoader(archive, batch_sampler=batches, device=device, placement="device")
    column_in_place(loader, 9)[:] = 255

    with pytest.raises(DeviceError, match="row 9 "):
        list(loader)


@pytest.mark.parametrize("placement", ["device", "pinned"])
def test_a_value_that_does_not_fit_is_named(archive: Path, device: EmulatedDevice, placement: str) -> None:
    """A value that the dtype does not hold ends the epoch in the error that the CPU gives."""
    large = [row for row in range(N_ROWS) if matrix()[row].max() > 127]
    options: dict[str, Any] = {"output": "dense", "dtype": torch.int8, "shuffle": False}
    message = rf"archive: row ({'|'.join(map(str, large))}) holds a value that torch\.int8 does not; choose another dtype"

    for kind in ({"device": "cpu"}, {"device": device, "placement": placement}):
        with pytest.raises(ValueError, match=message):
            list(GPUBatchLoader(archive, 8, **kind, **options))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_rows_out_of_range_are_named(archive: Path, device: EmulatedDevice, placement: str) -> None:
    """A sampler's row that is not there raises IndexError; batches before it are served."""
    loader = GPUBatchLoader(archive, batch_sampler=[[1], [2, 103]], device=device, placement=placement, obs=("line",))
    batches = iter(loader)

    first = next(batches)

    device.record().wait()
    assert first.rows.tolist() == [1]
    with pytest.raises(IndexError, match="row 103 is out of range"):
        next(batches)


# Memory


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_close_gives_memory_back(archive: Path, device: EmulatedDevice, placement: str) -> None:
    """After close, or when the loader is gone, the device holds nothing; a closed loader yields nothing more."""
    loader = GPUBatchLoader(archive, 8, device=device, placement=placement, output="dense", var=VAR, obs=OBS)
    batches = iter(loader)
    first = next(batches)
    held = device.allocated_bytes, len(device.pinned)

    loader.close()
    loader.close()

    assert held[0] > 0
    assert held[1] == (placement == "pinned")
    with pytest.raises(ValueError, match="the loader is closed"):
        next(batches)
    with pytest.raises(ValueError, match="the loader is closed"):
        next(iter(loader))
    assert repr(loader).endswith("closed)")
    del first, batches
    assert (device.allocated_bytes, device.pinned) == (0, {})
    loader = GPUBatchLoader(archive, 8, device=device, placement=placement)
    list(loader)
    del loader
    assert (device.allocated_bytes, device.pinned) == (0, {})


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_memory_that_runs_out_leaves_nothing(archive: Path, placement: str) -> None:
    """Whichever request for memory fails while a loader is made, what was taken before is given back."""
    device = ShortDevice(0)
    GPUBatchLoader(archive, 8, device=device, placement=placement, output="dense", var=VAR).close()

    for refused in range(1, device.asked + 1):
        device = ShortDevice(refused)
        with pytest.raises(DeviceError, match="no memory is left"):
            GPUBatchLoader(archive, 8, device=device, placement=placement, output="dense", var=VAR)
        assert (device.allocated_bytes, device.pinned) == (0, {})


@pytest.mark.parametrize("placement", ["device", "pinned"])
def test_damaged_files_leave_nothing(tmp_path: Path, device: EmulatedDevice, placement: str) -> None:
    """A row that is damaged in the file is found while it is placed, and its archive named; nothing stays."""
    path = convert_h5ad(annotated(matrix()), tmp_path / "damaged")
    damaged = bytearray((path / "col_ptr.npy").read_bytes())
    damaged[100] = 255
    (path / "col_ptr.npy").write_bytes(damaged)

    with pytest.raises(ArchiveError, match=r"damaged/col_ptr.npy: row \d+ holds column 255"):
        GPUBatchLoader(path, 8, device=device, placement=placement)

    assert (device.allocated_bytes, device.pinned) == (0, {})


def test_auto_takes_what_fits_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By itself a loader takes the device, else page-locked memory, else the CPU; steps down are logged, the repr says where and why."""
    archive, found = convert_h5ad(annotated(matrix()), tmp_path / "archive", data_dtype="float32"), {}
    with caplog.at_level(logging.WARNING):
        for name, budgets in {"device": (1.0, 1.0), "pinned": (100, 1.0), "host": (100, 100)}.items():
            device = EmulatedDevice()
            with GPUBatchLoader(archive, 8, device=device, memory_budget=budgets[0], host_budget=budgets[1]) as loader:
                found[name] = repr(loader)
                assert len(finished(device, loader)) == 13

    size = 5_760  # 1,128 columns of a byte and values of four, each padded to 128
    assert f"on emulated, placement device: {size:,} bytes in memory of emulated" in found["device"]
    assert f"on emulated, placement pinned: {size:,} bytes of page-locked host memory" in found["pinned"]
    assert f"on emulated, placement host: {size:,} bytes in the page cache" in found["host"]
    assert "5.6 KiB of rows fit the budget of 8.0 GiB on emulated" in found["device"]
    for name in ("pinned", "host"):
        assert "5.6 KiB of rows exceed the budget of 100 bytes on emulated" in found[name]
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "rows are placed in page-locked memory of the host, and every batch comes over the bus",
        "batches are assembled on the CPU",
        "5.6 KiB of rows exceed the budget of 100 bytes on the host, " + caplog.records[2].message.split("host, ")[1].split(":")[0],
    ]


def test_what_does_not_fit_is_refused(tmp_path: Path, device: EmulatedDevice) -> None:
    """A placement that is asked for and has no room raises, with sizes and the way out; nothing stays."""
    archive = convert_h5ad(annotated(matrix()), tmp_path / "archive", data_dtype="float32")

    with pytest.raises(DeviceError, match=r"5\.6 KiB of rows exceed the budget of 100 bytes on emulated.*placement=\"pinned\""):
        GPUBatchLoader(archive, device=device, placement="device", memory_budget=100)
    with pytest.raises(DeviceError, match=r"5\.6 KiB of rows exceed the budget of 100 bytes on the host.*placement=\"host\""):
        GPUBatchLoader(archive, device=device, placement="pinned", host_budget=100)
    with pytest.raises(DeviceError, match="windows"):
        GPUBatchLoader(archive, device=device, placement="host", host_budget=100, windows=False)

    assert (device.allocated_bytes, device.pinned) == (0, {})


# Processes


def test_a_worker_process_is_refused(archive: Path, device: EmulatedDevice) -> None:
    """A loader on a device raises in a worker of a DataLoader, forked or spawned, and says what to do instead."""
    loader = GPUBatchLoader(archive, 8, device=device)

    with pytest.raises(RuntimeError, match="iterate it directly"):
        list(DataLoader(loader, batch_size=None, num_workers=1, multiprocessing_context="fork"))
    with pytest.raises(RuntimeError, match="num_workers=0"):
        pickle.dumps(loader)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_dataloader_without_workers_hands_batches_on(archive: Path, device: EmulatedDevice, placement: str) -> None:
    """DataLoader(loader, batch_size=None, num_workers=0) yields what the loader yields, and knows how many."""
    loader = GPUBatchLoader(archive, 8, device=device, placement=placement, obs=OBS)
    plain = DataLoader(loader, batch_size=None, num_workers=0)

    found = finished(device, plain)

    assert len(plain) == 13
    assert_same(found, list(GPUBatchLoader(archive, 8, device="cpu", obs=OBS)))
