"""Archives behind URLs give the batches that the same archives give on the disk, or say what is wrong; nothing reads what is not here.

Servers are on this machine only; they fail as they are told. It needs no anndata.
"""

import importlib.util
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from cells import dense, matrix, rows_of, write
from counted import CountedGpu
from emulator.device import EmulatedDevice
from packed_cells import byte_of, flip, write_packed
from served import Asked, Server, serving

from scdl_gpu import ArchiveError, Batch, GPUBatchLoader, SingleCellMemMapDataset, reader, transport, windows
from scdl_gpu.archive.mirror import open_remote
from scdl_gpu.archive.packed import open_archive, open_packed
from scdl_gpu.budget import LEAST_WINDOW
from scdl_gpu.row_source import source_of

N_ROWS, N_ROWS_A_SHARD = 600, 200
SMALL: dict[str, Any] = {"host_budget": 2 * LEAST_WINDOW, "memory_budget": 2 * LEAST_WINDOW + (1 << 13)}
"""Two windows of a few extents, and tables."""
CELLS = matrix(n_rows=N_ROWS)
PAYLOAD = ("data.npy", "col_ptr.npy", ".scdp")
KINDS = ["raw", "packed"]
PAUSE_S = 25.0
"""Longer than any machine stalls."""
PLACES = [
    ("cpu", None, "auto"),
    ("emulated", True, "device"),
    ("emulated", None, "device"),
    ("emulated", None, "pinned"),
    ("emulated", None, "host"),
]
GPU = [pytest.param(("gpu", *options), marks=pytest.mark.gpu) for options in ((True, "device"), (None, "device"), (None, "pinned"))]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Cut extents of some twenty rows, keep mirrors in the test's folder, and wait for nothing long."""
    monkeypatch.setattr(windows, "extent_bytes_of", lambda _: 800)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(reader, "PAUSE_S", 0.001)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with an archive of each kind of `CELLS`, that no test changes."""
    folder = tmp_path_factory.mktemp("remote")
    write(folder / "raw", CELLS)
    write_packed(folder / "packed", CELLS, rows=N_ROWS_A_SHARD)
    return folder


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    """Serve that folder."""
    with serving(folder) as server:
        yield server


@pytest.fixture
def changing(folder: Path, tmp_path: Path) -> Iterator[Server]:
    """Serve a copy of that folder, which a test may change."""
    shutil.copytree(folder, tmp_path / "there")
    with serving(tmp_path / "there") as server:
        yield server


def poison(mirror: Path) -> int:
    """Fill with ones what a mirror has no bytes of; return how many those are."""
    n = 0
    for file in mirror.iterdir():
        if file.name.endswith(PAYLOAD):
            with file.open("r+b") as stream:
                for start, stop in holes(file):
                    stream.seek(start)
                    stream.write(b"\xff" * (stop - start))
                    n += stop - start
    return n


def holes(file: Path) -> list[tuple[int, int]]:
    """Find the payload in a file of a mirror."""
    if file.suffix != ".scdp":
        return [(0, file.stat().st_size)]
    section = np.frombuffer(file.read_bytes()[:4096], "<u8")[16:18]  # offset and bytes of the payload: docs/packed-format.md
    return [(int(section[0]), int(section[0] + section[1]))]


def served(batches: Any) -> list[tuple[list[int], np.ndarray]]:
    """Return rows and values of batches."""
    return [(batch.rows.tolist(), dense(batch.x)) for batch in batches]


def assert_rows(batches: list[tuple[list[int], np.ndarray]]) -> None:
    """Check that batches hold the rows that they say."""
    for rows, values in batches:
        np.testing.assert_array_equal(values, CELLS[rows].toarray())


def failing(fault: str, times: int) -> Callable[[Asked], str | None]:
    """Let so many requests for rows fail."""
    left = [times]

    def fault_of(asked: Asked) -> str | None:
        if not asked.name.endswith(PAYLOAD) or not left[0]:
            return None
        left[0] -= 1
        return fault

    return fault_of


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", [*PLACES, *GPU], ids=str)
def test_batches_are_those_of_the_archive_on_the_disk(server: Server, folder: Path, kind: str, place: Any) -> None:
    """An epoch over http has the rows and obs of the same archive, wherever rows lie; the mirror's own payload is never looked at."""
    device = {"cpu": lambda: "cpu", "emulated": EmulatedDevice, "gpu": CountedGpu}[place[0]]()
    budgets = SMALL if place[1] or place[2] in ("auto", "host") else {}
    archive = open_remote(f"{server.url}/{kind}")
    assert poison(archive.path) > 1000

    with GPUBatchLoader(
        f"{server.url}/{kind}", 16, device=device, windows=place[1], placement=place[2], obs=["plate"], **budgets
    ) as loader:
        batches = [loaded(device, batch) for batch in loader]
        assert (loader.streaming is None) == (place[1] is None and place[2] in ("device", "pinned"))
        if loader.streaming is not None:
            assert loader.streaming.path == "http"
            assert loader.streaming.n_windows > 1
        found = served(batches)

    assert_rows(found)
    assert sorted(rows_of(batches)) == list(range(N_ROWS))
    near = GPUBatchLoader(folder / kind, device="cpu", batch_sampler=[rows for rows, _ in found], obs=["plate"])
    assert [batch.obs["plate"].tolist() for batch in batches] == [batch.obs["plate"].tolist() for batch in near]


def loaded(device: Any, batch: Batch) -> Batch:
    """Wait for the device."""
    if device != "cpu":
        device.record().wait()
    return batch


def test_archives_here_and_there_are_one_dataset(server: Server, folder: Path) -> None:
    """Archives on the disk and behind URLs may be mixed."""
    with GPUBatchLoader([folder / "raw", f"{server.url}/packed", f"{server.url}/packed"], 16, device="cpu", **SMALL) as loader:
        found = served(loader)

    assert sorted({row for rows, _ in found for row in rows}) == list(range(3 * N_ROWS))
    for rows, values in found:
        np.testing.assert_array_equal(values, CELLS[[row % N_ROWS for row in rows]].toarray())


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("packed", "short"),
        *(("raw", fault) for fault in ("reset", "hang up", "503", "500", "429 0", "408", "silence", "trickle", "shifted")),
    ],
)
def test_what_passes_is_tried_again(server: Server, kind: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken connections, short and slow answers, and busy servers cost a further request, and no row."""
    monkeypatch.setattr(transport, "TIMEOUT_S", 0.2)
    monkeypatch.setattr(transport, "LEAST_BYTES_PER_SECOND", 1 << 20)
    with GPUBatchLoader(f"{server.url}/{kind}", 16, device="cpu", **SMALL) as loader:
        server.fault = failing(fault, 5)

        found = served(loader)

    assert_rows(found)
    assert sorted({row for rows, _ in found for row in rows}) == list(range(N_ROWS))
    assert failed_and_repeated(server) >= 2


def failed_and_repeated(server: Server) -> int:
    """Count requests that ended where an earlier one did."""
    ends = [(asked.name, asked.last) for asked in server.asked if asked.name.endswith(PAYLOAD) and asked.last > 4096]
    return len(ends) - len(set(ends))


def test_a_broken_answer_goes_on_where_it_ended(server: Server, tmp_path: Path) -> None:
    """What came before a connection broke is not asked for again."""
    with reader.RemoteFile.open(f"{server.url}/raw/data.npy") as file:
        out = torch.zeros(1000, dtype=torch.uint8)
        server.fault = failing("short", 2)
        before = len(server.asked)

        file.read(8, 1008, out)

    assert [(asked.first, asked.last) for asked in server.asked[before:]] == [(8, 1007), (508, 1007), (758, 1007)]
    assert out.numpy().tobytes() == (server.folder / "raw" / "data.npy").read_bytes()[8:1008]


def test_a_busy_server_is_left_alone_as_long_as_it_asks(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses double, but are as long as Retry-After says where that is longer, up to a limit."""
    pauses: list[float] = []
    monkeypatch.setattr(reader, "PAUSE_S", 1.0)
    left = threading.Event()
    monkeypatch.setattr(left, "wait", pauses.append)
    with reader.RemoteFile.open(f"{server.url}/raw/data.npy") as file:
        faults = iter(["503", "503", "429 7", "503 4000", "500"])
        server.fault = lambda _: next(faults, None)

        file.until(left).read(0, 10, torch.zeros(10, dtype=torch.uint8))

    assert pauses == [0, 1, 2, 7, 30, 16]


@pytest.mark.parametrize(
    ("kind", "fault"), [("packed", "503"), ("packed", "changed"), *(("raw", fault) for fault in ("hang up", "403", "404", "whole"))]
)
def test_what_stays_is_named_and_the_epoch_goes_on_later(server: Server, kind: str, fault: str) -> None:
    """An epoch ends with the URL, the bytes and the cause; a state taken then goes on where it ended, once the server is well."""
    with GPUBatchLoader(f"{server.url}/{kind}", 16, device="cpu", seed=2, **SMALL) as loader:
        whole = served(loader)
        loader.set_epoch(0)
        batches = iter(loader)
        found = served([next(batches)])
        server.fault = failing(fault, 1 << 30)
        says = {"503": "tried 8 times: the server answers 503", "hang up": "tried 8 times: RemoteDisconnected", "403": "server answers 403"}
        says |= {"404": "is missing", "changed": "it was changed since it was opened", "whole": "gives no ranges"}

        with pytest.raises(ArchiveError, match=rf"{server.url}/{kind}/\S+: bytes [\d,]+ to [\d,]+ .*{says[fault]}"):
            found.extend((batch.rows.tolist(), dense(batch.x)) for batch in batches)

        state = loader.state_dict()
        server.fault = lambda _: None
        with GPUBatchLoader(f"{server.url}/{kind}", 16, device="cpu", **SMALL) as other:
            other.load_state_dict(state)
            left = served(other)
        loader.load_state_dict(state)
        again = served(loader)

    assert 0 < len(found) < len(whole)
    for rest in (left, again):
        assert [rows for rows, _ in found + rest] == [rows for rows, _ in whole]
        assert_rows(rest)


@pytest.mark.parametrize("kind", KINDS)
def test_leaving_an_epoch_ends_all_tries(server: Server, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An iteration that is left while a server fails asks for no range again, and waits for no pause."""
    with GPUBatchLoader(f"{server.url}/{kind}", 16, device="cpu", **SMALL) as loader:
        batches = iter(loader)
        next(batches)
        monkeypatch.setattr(reader, "PAUSE_S", PAUSE_S)
        monkeypatch.setattr(reader, "TRIES", 20)
        before, fault, failed = len(server.asked), failing("503", 1 << 30), threading.Event()
        server.fault = lambda asked: (fault(asked), failed.set())[0]
        while not failed.wait(0.01):
            next(batches)
        batches.close()  # type: ignore[attr-defined]

    assert 0 < len(server.asked) - before <= 8  # one try in each thread that reads


def test_leaving_an_epoch_does_not_wait_for_a_shard_that_is_opened(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The header that is looked at when the first rows of a shard are wanted is asked for no longer either, and close comes through."""
    monkeypatch.setattr(reader, "PAUSE_S", 1000.0)
    failed = threading.Event()
    with GPUBatchLoader(f"{server.url}/packed", 16, device="cpu", **SMALL) as loader:
        server.fault = lambda asked: (failed.set(), "503")[1] if asked.name.endswith(".scdp") else None
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(next, iter(loader))
            failed.wait()
            loader.close()
            with pytest.raises(ValueError, match="the loader is closed"):
                first.result()


@pytest.mark.parametrize("kind", KINDS)
def test_an_archive_that_is_exchanged_is_not_mixed_with_the_old(changing: Server, kind: str) -> None:
    """A loader raises where files were replaced by others of the same size; a new one opens these, beside the old mirror."""
    url = f"{changing.url}/{kind}"
    with GPUBatchLoader(url, 16, device="cpu", **SMALL) as loader:
        batches = iter(loader)
        next(batches)
        for file in (changing.folder / kind).iterdir():
            if file.name.endswith(PAYLOAD):
                os.utime(file, ns=(1, 1))

        with pytest.raises(ArchiveError, match="it was changed since it was opened"):
            list(batches)

    first = open_remote(url)
    assert_rows(served(GPUBatchLoader(url, 16, device="cpu", **SMALL)))
    assert len(mirrors(first.path)) == 2


def mirrors(one: Path) -> list[Path]:
    """List the mirrors beside one."""
    return [path for path in one.parent.iterdir() if path.is_dir()]


def test_a_server_is_asked_for_rows_once_and_for_the_rest_once_for_all(server: Server) -> None:
    """An epoch reads each row's bytes about once; opening anew copies nothing, and asks each file for its state."""
    url = f"{server.url}/packed"
    with GPUBatchLoader(url, 16, device="cpu", **SMALL) as loader:
        before = server.bytes_of(".scdp")
        list(loader)
    size = sum(shard.n_words * 4 for shard in open_packed(server.folder / "packed").shards)
    read = server.bytes_of(".scdp") - before
    before = len(server.asked)
    open_remote(url)
    asked = server.asked[before:]

    assert size <= read <= size + 3 * size // 800 * 4096  # whole pages of extents of 800 bytes
    assert max(one.last for one in asked if not one.name.endswith((".json", "cumulative_sum_index.npy"))) == 0
    assert {one.name.split("/")[1] for one in asked} >= {"metadata.json", "header.sch", "var_features", "obs_features", "shard-00000.scdp"}


def test_one_of_many_processes_copies(server: Server) -> None:
    """Loaders that are made at once share a mirror that one of them makes."""
    with ThreadPoolExecutor(4) as pool:
        archives = list(pool.map(open_remote, [f"{server.url}/packed"] * 4))

    assert len({archive.path for archive in archives}) == 1
    assert sum(asked.name == "packed/obs_features/dataframe_0.parquet" and asked.last > 0 for asked in server.asked) == 1


def test_a_copy_that_fails_leaves_nothing(server: Server) -> None:
    """Where copying fails there is no mirror; the next loader makes it."""
    server.fault = lambda asked: "403" if asked.name.endswith("row_ptr.npy") and asked.last > 0 else None
    with pytest.raises(ArchiveError, match=r"raw/row_ptr\.npy: bytes 0 to [\d,]+ cannot be read: the server answers 403"):
        open_remote(f"{server.url}/raw")
    server.fault = lambda _: None

    archive = open_remote(f"{server.url}/raw")

    assert mirrors(archive.path) == [archive.path]


@pytest.mark.parametrize("kind", KINDS)
def test_a_mirror_is_no_archive(server: Server, kind: str) -> None:
    """Whoever would read rows of a mirror is sent to the URL, or told to download the archive; pickles of its shards too."""
    archive = open_remote(f"{server.url}/{kind}")

    for opens in (lambda: open_archive(archive.path), lambda: SingleCellMemMapDataset(archive.path), lambda: GPUBatchLoader(archive.path)):
        with pytest.raises(ArchiveError, match=r"mirrors an archive behind a URL.*give that URL to GPUBatchLoader, or download"):
            opens()
    with pytest.raises(ArchiveError, match=rf"{server.url}/{kind} is not on this machine; download"):
        source_of(archive)
    with pytest.raises(ValueError, match=r"data_path is a URL, .*only GPUBatchLoader, .* take one: download"):
        SingleCellMemMapDataset(f"{server.url}/{kind}")


@pytest.mark.parametrize("options", [{"windows": False}, {"sampler": range(10)}, {"batch_sampler": [[1, 2]]}], ids=str)
def test_the_cpu_cannot_but_stream(server: Server, options: dict[str, Any]) -> None:
    """A sampler, or windows=False, needs rows that lie somewhere."""
    with pytest.raises(ValueError, match=r"is not on this machine.*that excludes (windows=False|a sampler); leave it out"):
        GPUBatchLoader(f"{server.url}/raw", device="cpu", **options)


def test_a_sampler_works_where_rows_lie_on_a_device(server: Server) -> None:
    """Rows that are resident come in any order."""
    device = EmulatedDevice()
    with GPUBatchLoader(f"{server.url}/raw", device=device, batch_sampler=[[5, 3, 5], [100]]) as loader:
        found = served([loaded(device, batch) for batch in loader])

    assert [rows for rows, _ in found] == [[5, 3, 5], [100]]
    assert_rows(found)


@pytest.mark.parametrize(
    ("options", "why"), [({}, "rows behind a URL stream where the CPU makes batches"), ({"windows": True}, "as asked for")]
)
def test_the_repr_says_why_rows_stream(server: Server, options: dict[str, Any], why: str) -> None:
    """Nobody asked for windows where a URL has them."""
    with GPUBatchLoader(f"{server.url}/raw", 16, device="cpu", **options, **SMALL) as loader:
        assert why in repr(loader)
        assert ("as asked for" in repr(loader)) == bool(options)


def test_it_does_not_go_to_worker_processes(server: Server) -> None:
    """A loader of rows behind a URL streams, and stays where it is."""
    with GPUBatchLoader(f"{server.url}/raw", device="cpu") as loader, pytest.raises(RuntimeError, match="cannot go to a worker process"):
        pickle.dumps(loader)


@pytest.mark.parametrize("options", [{}, {"windows": True, **SMALL}], ids=["resident", "windows"])
def test_a_damaged_row_is_named_by_its_url(changing: Server, options: dict[str, Any]) -> None:
    """Where a device reads rows, a damaged one is found while they come."""
    shard = open_packed(changing.folder / "packed").shards[1]
    flip(shard.path, byte_of(shard, 3))

    with (
        pytest.raises(ArchiveError, match=rf"{changing.url}/packed/shard-00001\.scdp: row 3.* does not match its check"),
        GPUBatchLoader(f"{changing.url}/packed", 16, device=EmulatedDevice(), **options) as loader,
    ):
        list(loader)


@pytest.mark.parametrize("options", [{"placement": "device"}, {"windows": True, **SMALL}], ids=["resident", "windows"])
def test_a_value_that_does_not_fit_is_found_behind_the_url(changing: Server, options: dict[str, Any]) -> None:
    """What a kernel reports is looked for in the file there, not in the mirror."""
    x = CELLS.copy()
    x.data[x.indptr[50]] = 300
    shutil.rmtree(changing.folder / "raw")
    write(changing.folder / "raw", x)

    poison(open_remote(f"{changing.url}/raw").path)
    with (
        pytest.raises(ValueError, match=rf"{changing.url}/raw: row 50 holds a value that torch.uint8 does not"),
        GPUBatchLoader(f"{changing.url}/raw", 16, device=EmulatedDevice(), dtype=torch.uint8, **options) as loader,
    ):
        list(loader)


@pytest.mark.parametrize(
    ("kind", "name", "says"),
    [
        ("raw", "metadata.json", "metadata.json is missing"),
        ("raw", "header.sch", "header.sch is missing"),
        ("raw", "col_ptr.npy", "col_ptr.npy is missing"),
        ("raw", "var_features/dataframe_0.parquet", "dataframe_0.parquet is missing"),
        ("packed", "shard-00001.scdp", "shard-00001.scdp is missing"),
    ],
)
def test_a_file_that_is_missing_is_named(server: Server, kind: str, name: str, says: str) -> None:
    """Opening names the URL of a file that is not there."""
    server.fault = lambda asked: "404" if asked.name == f"{kind}/{name}" else None

    with pytest.raises(ArchiveError, match=rf"{server.url}/{kind}/.*{says} \(the server answers 404"):
        GPUBatchLoader(f"{server.url}/{kind}", device="cpu")


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("whole", "it gives no ranges, only the whole"),
        ("stateless", "tells neither ETag nor Last-Modified"),
        ("gzip", "the server gives it compressed"),
        ("401", "the server answers 401"),
        ("to ftp://127.0.0.1/x", "redirects to ftp://127.0.0.1/x, which is not followed"),
    ],
)
def test_servers_that_cannot_be_read_from(server: Server, fault: str, says: str) -> None:
    """A server that knows no ranges, tells no state, or refuses, is refused, at once."""
    server.fault = lambda _: fault

    with pytest.raises(ArchiveError, match=rf"{server.url}/raw/metadata\.json cannot be read: .*{says}"):
        open_remote(f"{server.url}/raw")

    assert len(server.asked) == 1


def test_redirects_are_followed_but_not_for_ever(server: Server) -> None:
    """Each range is asked for wherever the server sends it."""
    server.fault = lambda asked: f"to {server.url}/raw/{asked.name.removeprefix('there/')}" if asked.name.startswith("there/") else None
    with GPUBatchLoader(f"{server.url}/there", 16, device="cpu", **SMALL) as loader:
        assert_rows(served(loader))
    server.fault = lambda _: f"to {server.url}/there"

    with pytest.raises(ArchiveError, match="redirects more than 5 times"):
        open_remote(f"{server.url}/raw")


def test_secrets_of_a_url_go_to_the_server_alone(server: Server, tmp_path: Path) -> None:
    """Password and signature are sent with every request, and stand in no error and no file."""
    url = server.url.replace("//", "//user:pass%3Aword@") + "/raw?signature=abc"
    with GPUBatchLoader(url, 16, device="cpu", **SMALL) as loader:
        assert_rows(served(loader))
        shown = repr(loader)
    server.fault = lambda _: "403"
    with pytest.raises(ArchiveError, match=r"metadata\.json cannot be read") as raised:
        open_remote(url)

    assert {asked.headers.get("Authorization") for asked in server.asked} == {"Basic dXNlcjpwYXNzOndvcmQ="}
    kept = b"".join(path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file())
    for secret in ("pass", "abc"):
        assert secret not in shown + str(raised.value)
        assert secret.encode() not in kept


def test_an_http_proxy_is_used_where_one_is_named(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy of the environment is asked for the whole URL."""
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setattr(transport, "proxy_bypass", lambda _: False)

    pin = transport.Http().pin("http://archives.invalid/raw/header.sch")

    assert pin.size_bytes == (server.folder / "raw" / "header.sch").stat().st_size


def test_empty_files(server: Server, tmp_path: Path) -> None:
    """An archive without a single element has files without a byte."""
    write(tmp_path / "empty", sp.csr_matrix((4, 40), dtype=np.float32))
    with serving(tmp_path) as own, GPUBatchLoader(f"{own.url}/empty", 4, device="cpu") as loader:
        ((rows, values),) = served(loader)

    assert sorted(rows) == [0, 1, 2, 3]
    assert values.shape == (4, 40)
    assert not values.any()


# fsspec


@pytest.fixture
def memory(folder: Path) -> Iterator[Any]:
    """Give fsspec's file system in memory, with the archives in it."""
    fs = fsspec.filesystem("memory")
    for path in folder.rglob("*"):
        if path.is_file():
            fs.pipe_file(f"/bucket/{path.relative_to(folder)}", path.read_bytes())
    yield fs
    fs.rm("/bucket", recursive=True)


@pytest.mark.parametrize("kind", KINDS)
def test_other_schemes_are_read_by_fsspec(memory: Any, kind: str) -> None:
    """An archive on any file system of fsspec gives the same rows."""
    poison(open_remote(f"memory://bucket/{kind}").path)

    with GPUBatchLoader(f"memory://bucket/{kind}", 16, device="cpu", **SMALL) as loader:
        found = served(loader)
        assert loader.streaming is not None
        assert loader.streaming.path.startswith("fsspec ")

    assert_rows(found)
    assert sorted({row for rows, _ in found for row in rows}) == list(range(N_ROWS))


def test_fsspec_is_tried_again_and_held_to_the_state(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors and short answers of a file system pass; a file that is exchanged does not."""
    read, left = type(memory).cat_file, [3]

    def cat_file(self: Any, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        found: bytes = read(self, path, start, end, **options)
        left[0] -= 1
        if left[0] == 2:
            raise ConnectionResetError("reset by peer")
        return found[: len(found) // 2] if left[0] == 1 else found

    with reader.RemoteFile.open("memory://bucket/raw/data.npy") as file:
        whole, out = memory.cat_file("/bucket/raw/data.npy"), torch.zeros(100, dtype=torch.uint8)
        monkeypatch.setattr(type(memory), "cat_file", cat_file)

        file.read(10, 110, out)

        assert out.numpy().tobytes() == whole[10:110]
        monkeypatch.undo()
        memory.pipe_file("/bucket/raw/data.npy", whole)
        with pytest.raises(ArchiveError, match=r"memory://bucket/raw/data\.npy: bytes 10 to 110 cannot be read: it was changed"):
            file.read(10, 110, out)
    with pytest.raises(ArchiveError, match="memory://bucket/raw/absent is missing"):
        reader.RemoteFile.open("memory://bucket/raw/absent")


def test_what_is_not_installed_is_named() -> None:
    """s3 without s3fs names the extra; a scheme that nobody knows is an error too."""
    if importlib.util.find_spec("s3fs") is not None:
        pytest.skip("s3fs is installed")
    with pytest.raises(ArchiveError, match=r"s3://bucket/archive cannot be read: s3:// needs a package.*'\.\[remote\]' of a checkout"):
        open_remote("s3://bucket/archive")
    with pytest.raises(ArchiveError, match="nonsense"):
        open_remote("nonsense://bucket/archive")


# kvikio

UNDER_STUB = """
import importlib, importlib.util, sys
if importlib.util.find_spec("rapids_logger"):
    importlib.import_module("rapids_logger").load_library()  # kvikio does so itself where all that it depends on is installed
import torch
from served import serving
from pathlib import Path
from scdl_gpu import reader

print(reader.path_in_use())
reader.PAUSE_S = 0.001
with serving(Path(sys.argv[1])) as server, reader.RemoteFile.open(server.url + "/data.npy") as file:
    print(file.path_in_use)
    content, out = Path(sys.argv[1], "data.npy").read_bytes(), torch.zeros(1_000_001, dtype=torch.uint8)
    for start in (0, 7, 999_000):
        file.read(start, start + 1_000_001, out)
        print(out.numpy().tobytes() == content[start : start + 1_000_001])
    calls = [0]
    def fail(asked):
        calls[0] += 1
        return "404" if calls[0] == 1 else None
    server.fault = fail
    file.read(5, 1_000_006, out)
    print(out.numpy().tobytes() == content[5:1_000_006])
    server.fault = lambda asked: "changed"
    try:
        file.read(0, 1_000_001, out)
    except reader.ArchiveError as error:
        print(error)
"""


def test_kvikio_reads_urls_under_a_stub_driver(tmp_path: Path) -> None:
    """The real kvikio reads ranges, http goes on where it fails, and a file that is exchanged is noticed."""
    if importlib.util.find_spec("kvikio") is None:
        pytest.skip("kvikio is not installed; `make env` does so where there are wheels of it")
    source, data = Path(__file__).with_name("stub_libcuda.c"), tmp_path / "data"
    compiler = shutil.which("cc") or "c++"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(tmp_path / "libcuda.so.1"), str(source)], check=True
    )
    data.mkdir()
    (data / "data.npy").write_bytes(np.random.default_rng(1).bytes(5_000_001))
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])

    run = subprocess.run(
        [sys.executable, "-c", UNDER_STUB, str(data)],
        env=os.environ | {"LD_LIBRARY_PATH": str(tmp_path), "KVIKIO_COMPAT_MODE": "ON", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )

    assert run.returncode == 0, run.stderr
    version, path, *equal, fault = run.stdout.splitlines()
    if version.startswith("preadv: kvikio is not there"):
        pytest.skip(f"kvikio is installed and cannot be loaded here: {version}")
    assert path.startswith("kvikio ")
    assert path.endswith(" RemoteFile")
    assert equal == ["True"] * 4
    assert "data.npy: bytes 0 to 1,000,001 cannot be read: it was changed since it was opened" in fault
