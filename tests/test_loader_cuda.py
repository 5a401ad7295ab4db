"""GPUBatchLoader on a device: its batches are those of SciPy and of the CPU, bit for bit, whatever lies where, without a wait.

Every test runs on the emulated device and, marked `gpu`, on a real one. It needs no anndata.
"""

import logging
import multiprocessing
import pickle
import random
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from cells import N_ROWS, N_VARS, backwards, dense, matrix, obs_of, rows_of
from cells import write as write_archive
from counted import CountedGpu, write
from emulator.device import EmulatedDevice
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from scdl_gpu import ArchiveError, Batch, DeviceError, GPUBatchLoader
from scdl_gpu.faults import ASK_EVERY

KINDS = [EmulatedDevice, pytest.param(CountedGpu, marks=pytest.mark.gpu)]
PLACEMENTS = ["device", "pinned", "host"]
OBS = ("line", "well", "good", "depth", "count", "plate")
VAR, COLUMNS = ["g7", 3, "g39"], [7, 3, 39]
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
ROUNDING = {torch.float64: 1e-12, torch.float32: 3e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""How far normalised values may lie from those computed in float64: twice the rounding of the dtype."""
QUIET_OPS = ("empty", "view", "slice", "sparse_", "crow_indices", "col_indices", "values", "detach", "alias", "sym_", "lift_fresh", "copy_")
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


def short(kind: Any, refused: int) -> Any:
    """Make a device of a kind that refuses the n-th request for memory, on either side; `asked` counts them."""

    class ShortDevice(kind):  # type: ignore[misc]
        asked = 0

        def _ask(self) -> None:
            self.asked += 1
            if self.asked == refused:
                raise DeviceError("no memory is left")

        def allocate(self, size_bytes: int) -> torch.Tensor:
            self._ask()
            return super().allocate(size_bytes)

        def staging(self, size_bytes: int) -> torch.Tensor:
            self._ask()
            return super().staging(size_bytes)

        def pin(self, memory: torch.Tensor) -> int:
            self._ask()
            return super().pin(memory)

    return ShortDevice()


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
    """Give an archive of `matrix()` with obs columns."""
    return write_archive(tmp_path_factory.mktemp("cuda") / "archive", matrix())


@pytest.fixture(params=KINDS, ids=["emulated", "gpu"])
def kind(request: pytest.FixtureRequest) -> Any:
    """Give the class of a device."""
    return request.param


@pytest.fixture
def device(kind: Any) -> Any:
    """Give a device."""
    return kind()


def finished(device: Any, batches: Any) -> list[Batch]:
    """Return all batches, when the device is done with them."""
    kept = list(batches)
    device.record().wait()
    return kept


def one_by_one(device: Any, batches: Any) -> Iterator[Batch]:
    """Give batches when the device is done with each: a host is far ahead of a GPU that loads its first kernel."""
    for batch in batches:
        device.record().wait()
        yield batch


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    """Check that batches are the same, bit for bit, in the same dtypes."""
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine.rows.cpu(), theirs.rows.cpu())
        assert torch.equal(mine.is_padding.cpu(), theirs.is_padding.cpu())
        assert (mine.x.layout, mine.x.shape) == (theirs.x.layout, theirs.x.shape)
        for a, b in zip(parts_of(mine), parts_of(theirs), strict=True):
            assert a.dtype == b.dtype
            assert a.contiguous().view(torch.uint8).tolist() == b.contiguous().view(torch.uint8).tolist()


def parts_of(batch: Batch) -> list[torch.Tensor]:
    """List the tensors that a batch is made of."""
    x = batch.x
    return [*((x.crow_indices(), x.col_indices(), x.values()) if x.layout == torch.sparse_csr else (x,)), *batch.obs.values()]


def assert_scipys(batch: Batch, options: dict[str, Any]) -> None:
    """Check that a batch holds the rows of `matrix()` as SciPy and NumPy make them, normalised ones in float64 and rounded once."""
    x = matrix("float64")[batch.rows.cpu().numpy()].toarray()
    target, is_scaled = options.get("normalize_total"), "normalize_total" in options or "log1p" in options
    if target:
        sums = x.sum(axis=1, keepdims=True)
        x = np.where(sums > 0, x * (target / np.where(sums > 0, sums, 1)), x)
    x = np.log1p(x) if "log1p" in options else x
    expected = torch.from_numpy(x[:, COLUMNS] if "var" in options else x).to(options.get("dtype", torch.float32))
    found = batch.x.cpu().to_dense()
    assert found.dtype == expected.dtype
    tolerance = ROUNDING[expected.dtype] if is_scaled else 0
    np.testing.assert_allclose(found.double().numpy(), expected.double().numpy(), rtol=tolerance, atol=0)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("options", OUTPUTS, ids=str)
def test_batches_are_those_of_the_cpu(archive: Path, device: Any, placement: str, options: dict[str, Any]) -> None:
    """Every output of every placement equals SciPy's and the CPU's, obs columns and the padding of the last batch included."""
    expected = list(GPUBatchLoader(archive, 16, seed=3, device="cpu", obs=OBS, **options))
    loader = GPUBatchLoader(archive, 16, seed=3, device=device, placement=placement, obs=OBS, **options)

    found = finished(device, loader)

    assert_same(found, expected)
    for batch in found:
        assert_scipys(batch, options)
        assert {tensor.device for tensor in (batch.x, batch.rows, batch.is_padding, *batch.obs.values())} == {loader.device}
        assert batch.obs["plate"].tolist() == obs_of(N_ROWS)["plate"].to_numpy()[batch.rows.cpu().numpy()].tolist()
    assert [list(batch.obs) for batch in found] == [list(OBS)] * 7
    assert sum(int(batch.is_padding.sum()) for batch in found) == 7 * 16 - N_ROWS


@pytest.mark.parametrize("placement", ["device", "pinned"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64"])
def test_every_stored_dtype(tmp_path: Path, device: Any, placement: str, dtype: str) -> None:
    """Rows stored in any dtype come out as NumPy has them, and as the CPU gives them."""
    x = matrix()
    path = write_archive(tmp_path / "archive", x, data_dtype=dtype)

    found = finished(device, GPUBatchLoader(path, 16, device=device, placement=placement))

    assert_same(found, list(GPUBatchLoader(path, 16, device="cpu")))
    for batch in found:
        np.testing.assert_array_equal(dense(batch.x), x[batch.rows.cpu().numpy()].toarray().astype(dtype))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("options", [{}, {"output": "dense"}, {"output": "dense", "normalize_total": 10.0}], ids=str)
def test_several_archives_of_several_dtypes(tmp_path: Path, device: Any, placement: str, options: dict[str, Any]) -> None:
    """A list is one dataset: dtypes differ, one archive is unsorted, one has one row, one stands there twice."""
    parts = [matrix(n_rows=30), backwards(matrix(n_rows=40, seed=1)), matrix(n_rows=1)]
    paths = [
        write_archive(tmp_path / f"part{k}", part, data_dtype=dtype, seed=k, canonical=k != 1)
        for k, (part, dtype) in enumerate(zip(parts, ["uint8", "float32", "uint16"], strict=True))
    ]
    order = [0, 1, 2, 0]
    whole = np.concatenate([parts[k].toarray() for k in order])
    archives = [paths[k] for k in order]

    found = finished(device, GPUBatchLoader(archives, 7, device=device, placement=placement, obs=OBS, **options))

    assert_same(found, list(GPUBatchLoader(archives, 7, device="cpu", obs=OBS, **options)))
    assert sorted(rows_of(found)) == list(range(101))
    if "normalize_total" not in options:
        for batch in found:
            np.testing.assert_array_equal(dense(batch.x), whole[batch.rows.cpu().numpy()])


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_unsorted_rows_come_out_sorted(tmp_path: Path, device: Any, placement: str) -> None:
    """Rows whose columns are stored in another order are sorted on the way; a column twice is refused by name before any batch."""
    x = matrix()
    path = write_archive(tmp_path / "unsorted", backwards(x), canonical=False)
    twice = sp.csr_matrix((np.ones(4, np.float32), np.array([1, 1, 2, 3]), np.array([0, 2, 4])), shape=(2, N_VARS))
    duplicates = write_archive(tmp_path / "twice", twice, canonical=False)

    found = finished(device, GPUBatchLoader(path, 16, device=device, placement=placement))

    for batch in found:
        np.testing.assert_array_equal(dense(batch.x), x[batch.rows.cpu().numpy()].toarray())
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


@pytest.mark.gpu
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("output", ["csr", "dense"])
def test_a_gpu_that_is_held_back_gets_what_was_sent(archive: Path, placement: str, output: str) -> None:
    """A GPU that is busy when batches are enqueued makes them right in the end; the epoch is over on the host long before."""
    device = CountedGpu()
    loader = GPUBatchLoader(archive, 4, device=device, placement=placement, output=output, obs=OBS)
    served: dict[bool, list[Batch]] = {}

    for is_warm in (False, True):  # before, buffers are allocated and kernels loaded, which may wait
        finished(device, loader)
        loader.set_epoch(0)
        device.hold_back()
        served[is_warm] = [batch for _, batch in zip(range(len(loader)), loader, strict=False)]
        is_behind = not device.record().is_done()
        loader.set_epoch(1)

    assert is_behind
    expected = list(GPUBatchLoader(archive, 4, device="cpu", output=output, obs=OBS))
    for batches in served.values():
        assert_same(finished(device, batches), expected)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("output", ["csr", "dense"])
def test_no_batch_waits(archive: Path, device: Any, placement: str, output: str) -> None:
    """Between the first batch and the last the host never waits, nor asks torch for what would; once at the end of the epoch."""
    loader = GPUBatchLoader(archive, 2, device=device, placement=placement, output=output, obs=OBS)
    before, launches, counts = device.waits, device.launches, set()

    with Ops() as ops, getattr(device, "refusing_waits", nullcontext)():
        for _ in loader:
            counts.add(device.waits - before)

    assert len(loader) > 3 * ASK_EVERY
    assert counts == {0}
    # At the end of an epoch a GPU may still owe an answer that was asked for earlier: then there are two.
    at_the_end = {0} if placement == "host" else {1} if isinstance(device, EmulatedDevice) else {1, 2}
    assert device.waits - before in at_the_end
    assert device.launches - launches == (0 if placement == "host" else len(loader))
    assert {name for name in ops.seen if not name.removeprefix("aten.").startswith(QUIET_OPS)} == set()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_state_resumes_on_the_other_kind_of_device(archive: Path, device: Any, placement: str) -> None:
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
def test_drop_last_and_ranks(archive: Path, device: Any, placement: str) -> None:
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
def test_batches_without_rows_or_values(tmp_path: Path, device: Any, placement: str, output: str) -> None:
    """Batches of no rows or of empty rows, and archives of no rows, are made like any other."""
    x = matrix()
    path = write_archive(tmp_path / "archive", x)
    nothing = write_archive(tmp_path / "nothing", sp.csr_matrix((0, N_VARS), dtype=np.float32))
    empty = write_archive(tmp_path / "empty", sp.csr_matrix((5, N_VARS), dtype=np.float32))
    batches = [[], [0, 17, 34], [0], [1, 1, 1]]
    options: dict[str, Any] = {"device": device, "placement": placement, "output": output}

    found = finished(device, GPUBatchLoader(path, batch_sampler=batches, obs=OBS, **options))

    for batch, rows in zip(found, batches, strict=True):
        np.testing.assert_array_equal(dense(batch.x), x[rows].toarray())
        assert batch.rows.tolist() == rows
        assert all(len(column) == len(rows) for column in batch.obs.values())
    assert list(GPUBatchLoader(nothing, **options)) == []
    assert [dense(batch.x).sum() for batch in finished(device, GPUBatchLoader(empty, 2, **options))] == [0, 0, 0]


class LongLists(list[list[int]]):
    """A batch_sampler that says that its lists may be long."""

    batch_size = 2**31 // N_VARS + 1


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_large_batches_have_large_indices(archive: Path, kind: Any, placement: str) -> None:
    """Where a batch of the size given may hold 2^31 elements, row pointers and columns are int64 in every batch."""
    device, batches = kind(), LongLists([[3, 1], [5, 102, 9]])

    found = finished(device, GPUBatchLoader(archive, batch_sampler=batches, device=device, placement=placement, memory_budget=1.0))

    assert {batch.x.crow_indices().dtype for batch in found} | {batch.x.col_indices().dtype for batch in found} == {torch.int64}
    assert_same(found, list(GPUBatchLoader(archive, batch_sampler=batches, device="cpu")))


# Faults


def put_column(device: Any, loader: GPUBatchLoader, row: int, column: int) -> None:
    """Write over the first column of a row of a loader of one archive, in the memory that kernels read."""
    entry = loader._assembler._placed.entries[0]  # type: ignore[attr-defined]
    size = int(entry["index_bytes"])
    start = int(loader._shards.archives[0].indptr[row])
    write(device, int(entry["indices"]) + start * size, column.to_bytes(size, "little"))


@pytest.mark.parametrize("placement", ["device", "pinned"])
@pytest.mark.parametrize("output", ["csr", "dense"])
def test_memory_that_was_written_over_is_noticed(archive: Path, device: Any, placement: str, output: str) -> None:
    """A column out of range where rows lie raises at a later batch, naming archive and row; the rest is served as before."""
    loader = GPUBatchLoader(archive, 1, shuffle=False, device=device, placement=placement, output=output)
    put_column(device, loader, 20, 255)
    served: list[Batch] = []

    with pytest.raises(DeviceError, match=r"archive: row 20 is whole in the file, but not in the (device|pinned) memory"):
        served.extend(one_by_one(device, loader))

    assert 21 <= len(served) < 21 + 2 * ASK_EVERY
    put_column(device, loader, 20, int(matrix()[20].indices[0]))
    loader.set_epoch(0)
    assert_same(finished(device, loader), list(GPUBatchLoader(archive, 1, shuffle=False, device="cpu", output=output)))
    loader.close()


def test_a_fault_in_the_last_batches_is_raised_at_the_end(archive: Path, device: Any) -> None:
    """No epoch ends without the answer for all of its batches, and no `with` that was left early."""
    loader = GPUBatchLoader(archive, 1, shuffle=False, device=device, placement="device")
    put_column(device, loader, 101, 255)
    batches = iter(loader)

    served = [next(batches) for _ in range(N_ROWS)]

    with pytest.raises(DeviceError, match="row 101 "):
        next(batches)
    assert rows_of(served) == list(range(N_ROWS))
    with loader:
        next(iter(loader))
    loader = GPUBatchLoader(archive, 3, shuffle=False, device=device, placement="device")
    put_column(device, loader, 1, 255)
    with pytest.raises(DeviceError, match="row 1 "), loader:
        next(iter(loader))


def test_the_faulty_one_of_several_batches_is_found(archive: Path, device: Any) -> None:
    """Batches of different sizes are told apart: the row that is named is the faulty one, not one at its position elsewhere."""
    batches = [[5], [1, 2, 3], [7, 8, 9], [4], [10, 11, 12]]
    loader = GPUBatchLoader(archive, batch_sampler=batches, device=device, placement="device")
    put_column(device, loader, 9, 255)

    with pytest.raises(DeviceError, match="row 9 "):
        list(loader)


@pytest.mark.parametrize("placement", ["device", "pinned"])
def test_a_value_that_does_not_fit_is_named(archive: Path, device: Any, placement: str) -> None:
    """A value that the dtype does not hold ends the epoch in the error that the CPU gives."""
    large = [row for row in range(N_ROWS) if matrix()[row].max() > 127]
    options: dict[str, Any] = {"output": "dense", "dtype": torch.int8, "shuffle": False}
    message = rf"archive: row ({'|'.join(map(str, large))}) holds a value that torch\.int8 does not; choose another dtype"

    for kind in ({"device": "cpu"}, {"device": device, "placement": placement}):
        with pytest.raises(ValueError, match=message):
            list(GPUBatchLoader(archive, 8, **kind, **options))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_rows_out_of_range_are_named(archive: Path, device: Any, placement: str) -> None:
    """A sampler's row that is not there raises IndexError; batches before it are served."""
    loader = GPUBatchLoader(archive, batch_sampler=[[1], [2, 103]], device=device, placement=placement, obs=("line",))
    batches = iter(loader)

    first = next(batches)

    device.record().wait()
    assert first.rows.tolist() == [1]
    with pytest.raises(IndexError, match="row 103 is out of range"):
        next(batches)


# Memory


def test_a_thread_that_is_late_for_close(archive: Path, device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are looked for when their memory is gone already are no error of their own: the loader is closed."""
    loader = GPUBatchLoader(archive, 8, device=device, placement="pinned")
    prepare, is_closed = loader._prepare, threading.Event()

    def late(run: Any, **others: Any) -> Any:
        if run.positions[0] > 8:
            is_closed.wait()
        return prepare(run, **others)

    monkeypatch.setattr(loader, "_prepare", late)
    batches = iter(loader)
    next(batches)

    loader.close()
    is_closed.set()

    with pytest.raises(ValueError, match="the loader is closed"):
        next(batches)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_close_gives_memory_back(archive: Path, device: Any, placement: str) -> None:
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
def test_memory_that_runs_out_leaves_nothing(archive: Path, kind: Any, placement: str) -> None:
    """Whichever request for memory fails while a loader is made, what was taken before is given back."""
    device = short(kind, 0)
    GPUBatchLoader(archive, 8, device=device, placement=placement, output="dense", var=VAR).close()

    for refused in range(1, device.asked + 1):
        device = short(kind, refused)
        with pytest.raises(DeviceError, match="no memory is left"):
            GPUBatchLoader(archive, 8, device=device, placement=placement, output="dense", var=VAR)
        assert (device.allocated_bytes, device.pinned) == (0, {})


@pytest.mark.parametrize("placement", ["device", "pinned"])
def test_damaged_files_leave_nothing(tmp_path: Path, device: Any, placement: str) -> None:
    """A row that is damaged in the file is found while it is placed, and its archive named; nothing stays."""
    path = write_archive(tmp_path / "damaged", matrix())
    damaged = bytearray((path / "col_ptr.npy").read_bytes())
    damaged[100] = 255
    (path / "col_ptr.npy").write_bytes(damaged)

    with pytest.raises(ArchiveError, match=r"damaged/col_ptr.npy: row \d+ holds column 255"):
        GPUBatchLoader(path, 8, device=device, placement=placement)

    assert (device.allocated_bytes, device.pinned) == (0, {})


def test_auto_takes_what_fits_and_says_so(tmp_path: Path, kind: Any, caplog: pytest.LogCaptureFixture) -> None:
    """By itself a loader takes the device, else page-locked memory, else the CPU; steps down are logged, the repr says where and why."""
    archive, found, name_of = write_archive(tmp_path / "archive", matrix()), {}, kind().name
    with caplog.at_level(logging.WARNING):
        for name, budgets in {"device": (1.0, 1.0), "pinned": (100, 1.0), "host": (100, 100)}.items():
            device = kind()
            with GPUBatchLoader(archive, 8, device=device, memory_budget=budgets[0], host_budget=budgets[1]) as loader:
                found[name] = repr(loader)
                assert len(finished(device, loader)) == 13

    size = 5_760  # 1,128 columns of a byte and values of four, each padded to 128
    assert f"on {name_of}, placement device: {size:,} bytes in memory of {name_of}" in found["device"]
    assert f"on {name_of}, placement pinned: {size:,} bytes of page-locked host memory" in found["pinned"]
    assert f"on {name_of}, placement host: {size:,} bytes in the page cache" in found["host"]
    assert re.search(rf"5\.6 KiB of rows fit the budget of [\d,.]+ GiB on {re.escape(name_of)}", found["device"])
    for name in ("pinned", "host"):
        assert f"5.6 KiB of rows exceed the budget of 100 bytes on {name_of}" in found[name]
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "rows are placed in page-locked memory of the host, and every batch comes over the bus",
        "batches are assembled on the CPU",
        "5.6 KiB of rows exceed the budget of 100 bytes on the host, " + caplog.records[2].message.split("host, ")[1].split(":")[0],
    ]


def test_what_does_not_fit_is_refused(tmp_path: Path, device: Any) -> None:
    """A placement that is asked for and has no room raises, with sizes and the way out; nothing stays."""
    archive, name = write_archive(tmp_path / "archive", matrix()), re.escape(device.name)

    with pytest.raises(DeviceError, match=rf"5\.6 KiB of rows exceed the budget of 100 bytes on {name}.*placement=\"pinned\""):
        GPUBatchLoader(archive, device=device, placement="device", memory_budget=100)
    with pytest.raises(DeviceError, match=r"5\.6 KiB of rows exceed the budget of 100 bytes on the host.*placement=\"host\""):
        GPUBatchLoader(archive, device=device, placement="pinned", host_budget=100)
    with pytest.raises(DeviceError, match="windows"):
        GPUBatchLoader(archive, device=device, placement="host", host_budget=100, windows=False)

    assert (device.allocated_bytes, device.pinned) == (0, {})


# Processes


def test_a_worker_process_is_refused(archive: Path, device: Any) -> None:
    """A loader on a device raises in a worker of a DataLoader, forked or spawned, and says what to do instead."""
    loader = GPUBatchLoader(archive, 8, device=device)

    with pytest.raises(RuntimeError, match="iterate it directly"):
        list(DataLoader(loader, batch_size=None, num_workers=1, multiprocessing_context="fork"))
    for worker in multiprocessing.active_children():
        worker.terminate()  # torch waits five seconds for one whose dataset raised at once
    with pytest.raises(RuntimeError, match="num_workers=0"):
        pickle.dumps(loader)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_dataloader_without_workers_hands_batches_on(archive: Path, device: Any, placement: str) -> None:
    """DataLoader(loader, batch_size=None, num_workers=0) yields what the loader yields, and knows how many."""
    loader = GPUBatchLoader(archive, 8, device=device, placement=placement, obs=OBS)
    plain = DataLoader(loader, batch_size=None, num_workers=0)

    found = finished(device, plain)

    assert len(plain) == 13
    assert_same(found, list(GPUBatchLoader(archive, 8, device="cpu", obs=OBS)))
