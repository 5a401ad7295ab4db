"""An epoch that streams through windows gives the rows that the files hold, whatever they are and wherever windows lie.

On the CPU, on the emulated device and, marked `gpu`, on a real one. It needs no anndata.
"""

import gc
import itertools
import os
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from cells import N_ROWS, N_VARS, backwards, dense, matrix, rows_of, write
from counted import CountedGpu
from emulator.device import EmulatedDevice
from packed_cells import byte_of, flip, orders_of, write_packed
from torch.utils.data import DataLoader

from scdl_gpu import ArchiveError, Batch, DeviceError, GPUBatchLoader, SingleCellMemMapDataset, reader, windows
from scdl_gpu.archive.packed import open_packed
from scdl_gpu.arena import available_bytes
from scdl_gpu.budget import LEAST_WINDOW

EMULATED, GPU = ([(kind, placement) for placement in ("device", "pinned", "host")] for kind in ("emulated", "gpu"))
WHERE = [("cpu", "auto"), *EMULATED, *(pytest.param(one, marks=pytest.mark.gpu) for one in GPU)]
WINDOW = LEAST_WINDOW * 3 // 2
SMALL: dict[str, Any] = {"windows": True, "host_budget": 2 * WINDOW, "memory_budget": 2 * WINDOW + 8191}
"""Windows of a few extents: each takes whole pages, however few its rows; a device also has tables."""
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
STORED = ["uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64"]


@pytest.fixture(autouse=True)
def _short_extents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut extents of some twenty rows of these small archives."""
    monkeypatch.setattr(windows, "extent_bytes_of", lambda _: 800)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the folder of archives that no test changes."""
    return tmp_path_factory.mktemp("windows")


@pytest.fixture(scope="module")
def raw(folder: Path) -> Path:
    """Give a raw archive of `matrix()`."""
    return write(folder / "raw", matrix())


@pytest.fixture(scope="module")
def packed(folder: Path) -> Path:
    """Give a packed archive of the same cells, in three shards."""
    return write_packed(folder / "packed", matrix())


@pytest.fixture(scope="module")
def sources(folder: Path, raw: Path, packed: Path) -> tuple[list[Path], sp.csr_matrix]:
    """Give archives of every kind, one of them twice, and the rows of all of them."""
    unsorted = write(folder / "unsorted", backwards(matrix(seed=1)), canonical=False)
    grouped = write_packed(folder / "grouped", matrix(seed=2), orders=[*orders_of(2, N_VARS, 5), None], seed=2)
    paths = [raw, unsorted, packed, grouped, raw]
    return paths, sp.vstack([matrix(), matrix(seed=1), matrix(), matrix(seed=2), matrix()]).tocsr()


@pytest.fixture(params=WHERE, ids="-".join)
def where(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Give device and placement."""
    kind, placement = request.param
    device = {"cpu": lambda: "cpu", "emulated": EmulatedDevice, "gpu": CountedGpu}[kind]()
    return {"device": device, "placement": placement}


def finished(where: dict[str, Any], batches: Any) -> list[Batch]:
    """Return all batches, when the device is done with them."""
    kept = list(batches)
    if where["device"] != "cpu":
        where["device"].record().wait()
    return kept


def one_by_one(where: dict[str, Any], batches: Any) -> Iterator[Batch]:
    """Give batches when the device is done with each."""
    for batch in batches:
        yield from finished(where, [batch])


def served(batches: list[Batch]) -> list[tuple[list[int], np.ndarray]]:
    """Return rows and values of batches."""
    return [(batch.rows.tolist(), dense(batch.x)) for batch in batches]


def assert_rows(batches: list[tuple[list[int], np.ndarray]], x: sp.csr_matrix) -> None:
    """Check that batches hold the rows that they say."""
    for rows, values in batches:
        np.testing.assert_array_equal(values, x[rows].toarray())


@pytest.mark.parametrize("options", [{}, {"output": "dense"}, {"output": "dense", "var": ["g7", 3]}], ids=str)
def test_every_row_comes_once_and_is_what_the_files_hold(sources: Any, where: dict[str, Any], options: dict[str, Any]) -> None:
    """Archives raw and packed, sorted or not, in one gene order or many: the batches of an epoch hold each row once, as SciPy has it."""
    paths, x = sources
    x = x[:, [7, 3]] if "var" in options else x

    with GPUBatchLoader(paths, 16, seed=3, obs=["plate"], **where, **SMALL, **options) as loader:
        batches = finished(where, loader)
        found = served(batches)

        assert loader.streaming is not None
        assert loader.streaming.n_windows > 4
    assert_rows(found, x)
    assert sorted(rows_of(batches)) == list(range(5 * N_ROWS))
    assert [len(rows) for rows, _ in found] == [16] * len(batches)
    resident = GPUBatchLoader(paths, device="cpu", batch_sampler=[rows for rows, _ in found], obs=["plate"])
    assert [batch.obs["plate"].tolist() for batch in batches] == [batch.obs["plate"].tolist() for batch in resident]


@pytest.mark.parametrize("dtype", STORED)
def test_every_stored_dtype(tmp_path: Path, where: dict[str, Any], dtype: str) -> None:
    """Rows of any dtype come out of windows as they do of the files."""
    path = write(tmp_path / "a", matrix(), data_dtype=dtype)

    with GPUBatchLoader(path, 16, **where, **SMALL) as loader:
        found = served(finished(where, loader))

    assert_rows(found, matrix())


def test_a_batch_is_that_of_rows_that_are_resident(packed: Path, raw: Path) -> None:
    """The same rows, asked of a loader of resident ones, give the same tensors, bit for bit."""
    for path in (raw, packed):
        with GPUBatchLoader(path, 16, device="cpu", **SMALL) as loader:
            streamed = list(loader)
        resident = list(GPUBatchLoader(path, device="cpu", batch_sampler=[batch.rows.tolist() for batch in streamed]))

        for mine, theirs in zip(streamed, resident, strict=True):
            for part in (torch.Tensor.crow_indices, torch.Tensor.col_indices, torch.Tensor.values):
                assert torch.equal(part(mine.x), part(theirs.x))
                assert part(mine.x).dtype == part(theirs.x).dtype


def test_rows_in_order(raw: Path, where: dict[str, Any]) -> None:
    """Without shuffle windows follow the files."""
    with GPUBatchLoader(raw, 16, shuffle=False, **where, **SMALL) as loader:
        assert rows_of(finished(where, loader)) == list(range(N_ROWS))


def test_epochs_differ_and_are_repeated_by_their_number(raw: Path) -> None:
    """Each epoch has its own windows and order; set_epoch brings one back."""
    with GPUBatchLoader(raw, 16, device="cpu", **SMALL) as loader:
        first, second = rows_of(loader), rows_of(loader)
        loader.set_epoch(0)
        assert rows_of(loader) == first
    assert first != second
    assert sorted(second) == list(range(N_ROWS))


@pytest.mark.parametrize("consumed", [0, 1, 3, 6, 7])
def test_an_epoch_goes_on_where_a_state_was_taken(raw: Path, where: dict[str, Any], consumed: int) -> None:
    """What a second loader yields after load_state_dict is what the first had left, to the batch."""
    with GPUBatchLoader(raw, 16, seed=1, **where, **SMALL) as loader:
        batches = iter(loader)
        for _ in range(consumed):
            next(batches)
        state = loader.state_dict()
        left = [batch.rows.tolist() for batch in finished(where, batches)]

    with GPUBatchLoader(raw, 16, seed=99, **where, **SMALL) as other:
        other.load_state_dict(state)
        assert [batch.rows.tolist() for batch in finished(where, other)] == left


def test_states_of_other_windows_are_welcome_between_epochs_only(raw: Path) -> None:
    """Within an epoch another number of ranks, batch size or window raises; at its begin each is taken."""
    with GPUBatchLoader(raw, 16, device="cpu", **SMALL) as loader:
        begin = loader.state_dict()
        next(iter(loader))
        within = loader.state_dict()

    others = [{"rank": 1, "world_size": 2}, {"batch_size": 8}, {"host_budget": 4 * LEAST_WINDOW}]
    for other in others:
        with GPUBatchLoader(raw, **({"batch_size": 16, "device": "cpu"} | SMALL | other)) as loader:
            loader.load_state_dict(begin)
            with pytest.raises(ValueError, match="16 rows into an epoch with windows of"):
                loader.load_state_dict(within)
    with pytest.raises(ValueError, match="order 'shuffled windows', expected 'shuffled'"):
        GPUBatchLoader(raw, 16, device="cpu").load_state_dict(within)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_rows(sources: Any, world: int) -> None:
    """Ranks yield equally many batches, and together each row once."""
    paths, x = sources
    loaders = [GPUBatchLoader(paths, 16, device="cpu", rank=rank, world_size=world, **SMALL) for rank in range(world)]
    kept = [list(loader) for loader in loaders]

    assert [len(batches) for batches in kept] == [len(loader) for loader in loaders] == [-(-5 * N_ROWS // (16 * world))] * world
    assert sorted(row for batches in kept for row in rows_of(batches)) == list(range(5 * N_ROWS))
    for batches in kept:
        assert_rows(served(batches), x)


class ByThread(EmulatedDevice):
    """A device that notes which threads wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[str] = []

    def record(self) -> Any:
        """Mark the end, with a mark that notes who waits for it."""
        event, device = super().record(), self

        class Noted:
            is_done = event.is_done

            def wait(self) -> None:
                device.waiting.append(threading.current_thread().name)
                event.wait()

        return Noted()


@pytest.mark.parametrize("placement", ["device", "pinned"])
def test_no_batch_waits_for_the_device(raw: Path, placement: str) -> None:
    """Only the thread that fills windows waits; the consumer does once, at the end of the epoch, for faults."""
    device = ByThread()
    with GPUBatchLoader(raw, 16, device=device, placement=placement, **SMALL) as loader:
        device.waiting.clear()
        batches = iter(loader)
        for _ in range(7):
            next(batches)
        assert {name for name in device.waiting if not name.startswith("scdl-window")} == set()
        assert list(batches) == []


def test_memory_of_two_windows_is_all_that_is_taken(sources: Any) -> None:
    """On the device lie two windows beside tables and batches, and nothing of it after close."""
    device = EmulatedDevice()
    loader = GPUBatchLoader(sources[0], 16, device=device, placement="device", **SMALL)
    batches = iter(loader)
    next(batches)
    held = device.allocated_bytes
    del batches
    loader.close()
    gc.collect()

    assert 2 * WINDOW <= held < 2 * WINDOW + (1 << 16)
    assert device.allocated_bytes == 0


def test_pinned_windows_are_unpinned(raw: Path) -> None:
    """Page-locked windows are two while the loader is open, none after it is closed, and none where one could not be pinned."""
    device = EmulatedDevice()
    with GPUBatchLoader(raw, 16, device=device, placement="pinned", **SMALL) as loader:
        next(iter(loader))
        assert len(device.pinned) == 2
    assert device.pinned == {}

    with GPUBatchLoader(raw, 16, device=device, placement="pinned", **SMALL) as loader:
        device.fail_pin = True
        with pytest.raises(DeviceError, match="cannot page-lock more"):
            next(iter(loader))
        assert device.pinned == {}
        assert sorted(rows_of(loader)) == list(range(N_ROWS))


def scdl_threads() -> list[str]:
    """Name the threads that loaders began; those of the process, which gather, stay."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("scdl-batch", "scdl-window"))]


def test_leaving_early_ends_all_threads(raw: Path, where: dict[str, Any]) -> None:
    """An iteration that is left at its first batch, or before it, leaves no thread and no read behind; the next begins anew."""
    with GPUBatchLoader(raw, 4, **where, **SMALL) as loader:
        for batches in (iter(loader), iter(loader)):
            next(batches)
            batches.close()  # type: ignore[attr-defined]
            assert scdl_threads() == []
        assert sorted(rows_of(finished(where, loader))) == list(range(N_ROWS))
    assert scdl_threads() == []


def test_two_iterations_at_once_do_not_share_memory(raw: Path) -> None:
    """Iterations of one loader have windows of their own."""
    with GPUBatchLoader(raw, 8, device="cpu", **SMALL) as loader:
        pairs = list(zip(loader, loader, strict=True))

    for batches in zip(*pairs, strict=True):
        assert_rows(served(list(batches)), matrix())
        assert sorted(rows_of(batches)) == list(range(N_ROWS))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_shard_that_is_cut_is_named(tmp_path: Path, share: float) -> None:
    """A packed shard that loses its end while rows stream raises, though its row table is mapped."""
    path = write_packed(tmp_path / "a", matrix(n_rows=2000), rows=2000)
    shard = path / "shard-00000.scdp"
    with GPUBatchLoader(path, 4, device="cpu", **SMALL) as loader:
        batches = iter(loader)
        next(batches)
        (stream,) = loader._windows._streams  # type: ignore[union-attr]
        stream.window(1).result()  # nothing is read until the second window is reached
        os.truncate(shard, int(share * shard.stat().st_size))
        with pytest.raises(ArchiveError, match=r"shard-00000.scdp (holds .* it was cut|ends before byte)"):
            list(batches)


@pytest.mark.parametrize("name", ["col_ptr.npy", "data.npy"])
def test_a_file_that_is_cut_is_named_and_the_epoch_resumed(tmp_path: Path, where: dict[str, Any], name: str) -> None:
    """Batches of whole windows come, then the error names file and bytes; when the file is there again a state goes on."""
    path = write(tmp_path / "a", matrix())
    whole = (path / name).read_bytes()
    with GPUBatchLoader(path, 4, seed=2, **where, **SMALL) as loader:
        expected = [batch.rows.tolist() for batch in finished(where, loader)]
        loader.set_epoch(0)
        os.truncate(path / name, len(whole) // 2)
        before: list[list[int]] = []
        with pytest.raises(ArchiveError, match=rf"{name}.*(ends before byte|holds \d+ bytes)"):
            before.extend(batch.rows.tolist() for batch in one_by_one(where, loader))
        state = loader.state_dict()
    (path / name).write_bytes(whole)

    with GPUBatchLoader(path, 4, **where, **SMALL) as loader:
        loader.load_state_dict(state)
        assert before + [batch.rows.tolist() for batch in finished(where, loader)] == expected


@pytest.mark.parametrize("fails", [3, 25])
def test_the_same_loader_goes_on_after_an_error(sources: Any, where: dict[str, Any], monkeypatch: pytest.MonkeyPatch, fails: int) -> None:
    """When the disk is there again its own state brings a loader to the batch that did not come."""
    with GPUBatchLoader(sources[0], 16, seed=2, **where, **SMALL) as loader:
        expected = [batch.rows.tolist() for batch in finished(where, loader)]
        loader.set_epoch(0)
        read, count = reader.File.read, itertools.count()

        def failing(file: reader.File, start: int, stop: int, out: torch.Tensor) -> None:
            if next(count) >= fails:
                raise ArchiveError(f"{file.path}: the disk is gone")
            read(file, start, stop, out)

        before: list[list[int]] = []
        with monkeypatch.context() as patch:
            patch.setattr(reader.File, "read", failing)
            with pytest.raises(ArchiveError, match="the disk is gone"):
                before.extend(batch.rows.tolist() for batch in one_by_one(where, loader))
        loader.load_state_dict(loader.state_dict())

        assert before + [batch.rows.tolist() for batch in finished(where, loader)] == expected


def test_a_damaged_packed_row_is_named_and_none_is_served(tmp_path: Path, where: dict[str, Any]) -> None:
    """A flipped bit raises, with shard and row, and no batch holds the row."""
    path = write_packed(tmp_path / "a", matrix())
    shard = open_packed(path).shards[1]
    row = next(row for row in range(shard.n_rows) if shard.entries["nnz_order"][row] > 3)
    flip(shard.path, byte_of(shard, row) + 3)

    rows: list[int] = []
    with GPUBatchLoader(path, 4, **where, **SMALL) as loader, pytest.raises(ArchiveError, match=rf"shard-00001.scdp: row {row} .*check"):
        rows.extend(row for batch in one_by_one(where, loader) for row in batch.rows.tolist())
    assert 40 + row not in rows


def test_a_reader_that_reaches_the_device_bounces_nothing_that_nobody_looks_at(
    sources: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Values and packed rows go straight to the device, packed ones are verified there, and what is damaged is named."""
    monkeypatch.setattr(windows.reader, "reaches_device", lambda: True)
    device = EmulatedDevice()
    with GPUBatchLoader(sources[0], 16, device=device, placement="device", **SMALL) as loader:
        batches = list(loader)
    device.record().wait()
    assert_rows(served(batches), sources[1])
    assert sorted(rows_of(batches)) == list(range(5 * N_ROWS))

    path = write_packed(tmp_path / "a", matrix())
    shard = open_packed(path).shards[1]
    flip(shard.path, byte_of(shard, 6) + 2)
    with (
        GPUBatchLoader([sources[0][0], path], 16, device=device, placement="device", **SMALL) as loader,
        pytest.raises(ArchiveError, match=r"shard-00001.scdp: row 6 \(row 46 of the archive\) does not match its check"),
    ):
        list(loader)


def test_a_column_out_of_range_is_named(tmp_path: Path, where: dict[str, Any]) -> None:
    """A gene that is not there raises, with file or archive and row."""
    x = matrix()
    x.indices[x.indptr[20]] = 200
    path = write(tmp_path / "a", x)

    with GPUBatchLoader(path, 4, **where, **SMALL) as loader, pytest.raises(ArchiveError, match=r"row 20 holds .*column"):
        list(loader)


def test_a_damaged_row_pointer_is_named(tmp_path: Path, where: dict[str, Any]) -> None:
    """A pointer that falls raises, with file and row."""
    path = write(tmp_path / "a", matrix())
    pointers = np.fromfile(path / "row_ptr.npy", np.uint16)
    pointers[50] = 0
    pointers.tofile(path / "row_ptr.npy")

    fault = r"row_ptr.npy: the pointer falls .* at row 49"
    with GPUBatchLoader(path, 4, **where, **SMALL) as loader, pytest.raises(ArchiveError, match=fault):
        list(loader)


def test_a_replaced_shard_is_not_read(tmp_path: Path) -> None:
    """Where another file has taken the place of a shard, its rows are not served as those of the old one."""
    path = write_packed(tmp_path / "a", matrix())
    other = write_packed(tmp_path / "b", matrix(seed=9))
    with GPUBatchLoader(path, 4, device="cpu", **SMALL) as loader:
        (other / "shard-00001.scdp").replace(path / "shard-00001.scdp")
        with pytest.raises(ArchiveError, match=r"shard-00001.scdp was replaced since the archive was opened"):
            list(loader)


def test_a_streaming_loader_stays_in_its_process(raw: Path) -> None:
    """Workers and pickle are refused by name: each would read everything."""
    with GPUBatchLoader(raw, 16, device="cpu", **SMALL) as loader:
        with pytest.raises(RuntimeError, match="streams windows cannot go to a worker process"):
            pickle.dumps(loader)
        with pytest.raises(RuntimeError, match="streams windows cannot go to a worker process"):
            next(iter(DataLoader(loader, batch_size=None, num_workers=1)))
        assert sorted(rows_of(DataLoader(loader, batch_size=None))) == list(range(N_ROWS))


def test_a_sampler_excludes_windows(raw: Path) -> None:
    """Which rows come when is the windows' to decide, or the sampler's; where nothing fits a sampler reads from the disk."""
    with pytest.raises(ValueError, match=r"windows=True .* excludes sampler and batch_sampler"):
        GPUBatchLoader(raw, 16, device="cpu", sampler=range(5), windows=True)
    loader = GPUBatchLoader(raw, 16, device="cpu", sampler=range(5), host_budget=2)
    assert (loader.streaming, rows_of(loader)) == (None, list(range(5)))


@pytest.mark.parametrize(("budget", "kind"), [(SMALL["memory_budget"], "device"), (1000, None)])
def test_auto_streams_what_fits_nowhere(tmp_path: Path, caplog: pytest.LogCaptureFixture, budget: int, kind: str | None) -> None:
    """What exceeds every budget goes through windows on the device, and a warning says so; without room it is read from the disk."""
    path = write(tmp_path / "a", matrix(n_rows=4000))
    loader = GPUBatchLoader(path, 16, device=EmulatedDevice(), memory_budget=budget, host_budget=1000)

    assert (loader.streaming is None) == (kind is None)
    assert (kind or "batches are assembled on the CPU") in caplog.text
    assert f"placement {kind or 'host'}" in repr(loader)
    assert "exceed the budget of 1,000 bytes on the host" in repr(loader) + caplog.text


def test_auto_streams_on_the_cpu(tmp_path: Path) -> None:
    """Rows beyond the host's budget stream, others do not."""
    path = write(tmp_path / "a", matrix(n_rows=4000))

    assert GPUBatchLoader(path, 16, device="cpu", host_budget=1 << 20).streaming is None
    with GPUBatchLoader(path, 16, device="cpu", host_budget=2 * LEAST_WINDOW) as loader:
        assert loader.streaming is not None
        assert sorted(rows_of(loader)) == list(range(4000))


def test_a_window_that_is_too_small_is_refused_at_once(raw: Path) -> None:
    """A budget without room for two windows, and a window that no batch fits, name the sizes and the way out."""
    with pytest.raises(DeviceError, match=r"the budget of 1,000 bytes .* has no room for two windows of 64.0 KiB; raise it"):
        GPUBatchLoader(raw, 16, device="cpu", windows=True, host_budget=1000)
    with pytest.raises(ValueError, match=r"may hold as few as \d+ rows, .* fewer than a batch of 100"):
        GPUBatchLoader(raw, 100, device="cpu", **SMALL)


def test_the_report_tells_what_was_read(raw: Path) -> None:
    """Bytes, windows, speed and the path in use are told by `streaming` and by the repr."""
    with GPUBatchLoader(raw, 16, device="cpu", **SMALL) as loader:
        assert "two windows of 96.0 KiB in host memory" in repr(loader)
        list(loader)
        report = loader.streaming

        assert report is not None
        assert report.size_bytes >= (raw / "data.npy").stat().st_size + (raw / "col_ptr.npy").stat().st_size
        assert report.bytes_per_second > 0
        assert report.seconds_waited >= 0
        assert f"{report.n_windows} windows" in repr(loader)
        assert report.path in repr(loader)


def test_files_larger_than_memory_are_read_past_the_page_cache(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all of the files do not fit the page cache, they are read directly, if the file system admits it, and the report says so."""
    monkeypatch.setattr(windows, "available_bytes", lambda: 0)
    try:
        os.close(os.open(packed / "shard-00000.scdp", os.O_RDONLY | os.O_DIRECT))
        expected = "preadv with O_DIRECT"
    except OSError:
        expected = "preadv: "

    with GPUBatchLoader(packed, 16, device="cpu", **SMALL) as loader:
        found = served(list(loader))
        assert loader.streaming is not None
        assert loader.streaming.path.startswith(expected)
    assert_rows(found, matrix())


def test_all_ways_of_reading_are_told(raw: Path, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one file is read directly and another is not, the report names both."""
    monkeypatch.setattr(windows, "available_bytes", lambda: 0)
    opened = reader.File._open_direct
    monkeypatch.setattr(reader.File, "_open_direct", lambda file: opened(file) if file.name.endswith(".scdp") else -1)

    with GPUBatchLoader([raw, packed], 16, device="cpu", **SMALL) as loader:
        list(loader)
        assert loader.streaming is not None
        ways = loader.streaming.path.split(" and ")
        assert sorted(way.partition(":")[0] for way in ways) == ["preadv", "preadv with O_DIRECT"]


def test_a_loader_that_goes_away_closes_its_files(raw: Path) -> None:
    """Nothing keeps files open when the loader is gone."""

    def descriptors() -> list[str]:
        links = [str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.exists()]
        return [link for link in links if str(raw) in link]

    loader = GPUBatchLoader(raw, 16, device="cpu", **SMALL)
    list(loader)
    assert descriptors()
    del loader
    gc.collect()

    assert descriptors() == []


EXIT = """
import sys, warnings
warnings.simplefilter("ignore")
from scdl_gpu import GPUBatchLoader
loader = GPUBatchLoader(sys.argv[1], 4, device="cpu", windows=True, host_budget=int(sys.argv[2]))
batches = iter(loader)
next(batches)
print("served")
"""


def test_a_process_ends_with_an_epoch_under_way(raw: Path) -> None:
    """A script that ends in the middle of an epoch ends, though a thread waits for its consumer."""
    done = subprocess.run([sys.executable, "-c", EXIT, str(raw), "131072"], capture_output=True, text=True, timeout=120)

    assert (done.returncode, done.stdout, done.stderr) == (0, "served\n", "")


def test_closing_in_an_epoch_ends_it(raw: Path, where: dict[str, Any]) -> None:
    """After close the iteration that was under way raises, and when it is left no thread and no file of it stays."""
    loader = GPUBatchLoader(raw, 4, **where, **SMALL)
    batches = iter(loader)
    next(batches)
    loader.close()
    with pytest.raises(ValueError, match="the loader is closed"):
        list(batches)

    assert scdl_threads() == []
    assert loader._windows._slots == []  # type: ignore[union-attr]
    assert loader._windows._files == {}  # type: ignore[union-attr]


def test_one_path_in_two_states_gives_the_rows_of_each_or_none(tmp_path: Path) -> None:
    """Where an archive was replaced between two openings, neither is served as the other."""
    path = write(tmp_path / "a", matrix())
    old = SingleCellMemMapDataset(str(path))
    write(tmp_path / "b", matrix(seed=5))
    path.rename(tmp_path / "old")
    (tmp_path / "b").rename(path)
    new = SingleCellMemMapDataset(str(path))

    with (
        GPUBatchLoader([new, old], 16, device="cpu", **SMALL) as loader,
        pytest.raises(ArchiveError, match="was replaced since the archive was opened"),
    ):
        list(loader)


def test_windows_that_are_consumed_are_let_go(sources: Any) -> None:
    """Row tables of a window go when the next one is reached: an epoch does not gather those of all rows."""
    with GPUBatchLoader(sources[0], 16, device="cpu", **SMALL) as loader:
        batches = iter(loader)
        next(batches)
        (stream,) = loader._windows._streams  # type: ignore[union-attr]
        first = weakref.ref(stream._futures[0].result().parts)
        for _ in range(20):
            next(batches)
        gc.collect()

        assert first() is None


def test_ranks_do_not_stream_each_for_itself(tmp_path: Path) -> None:
    """What fits nowhere streams by itself on one rank only: others may have room, and go through other rows."""
    path = write(tmp_path / "a", matrix(n_rows=4000))

    with pytest.raises(ValueError, match="ranks must all stream, or none: give windows=True on every one of them"):
        GPUBatchLoader(path, 16, device="cpu", host_budget=2 * LEAST_WINDOW, rank=0, world_size=2)


def test_ranks_cut_rows_alike(tmp_path: Path) -> None:
    """Of small windows extents are an eighth: a share of what is free, which differs, is refused for ranks; bytes are not."""
    path = write(tmp_path / "a", matrix(n_rows=4000))
    share = 200_000 / available_bytes()

    with pytest.raises(ValueError, match="which ranks must have alike, and a share of what is free differs: give the budget as bytes"):
        GPUBatchLoader(path, 16, device="cpu", windows=True, host_budget=share, rank=0, world_size=2)
    for told in ({"host_budget": 200_000, "rank": 0, "world_size": 2}, {"host_budget": share}):
        assert GPUBatchLoader(path, 16, device="cpu", windows=True, **told).streaming is not None


def test_what_no_window_holds_does_not_stream_by_itself(tmp_path: Path) -> None:
    """Where windows of the budget might not hold a batch, rows that fit nowhere are read from the page cache, as where there is no room."""
    path = write(tmp_path / "a", matrix(n_rows=4000))

    assert GPUBatchLoader(path, 1000, device="cpu", host_budget=2 * LEAST_WINDOW).streaming is None
