"""benchmarks/shuffle_quality.py and benchmarks/streaming.py measure what they say, and run at a tiny size."""

import argparse
import itertools
import json
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cells import matrix, write

from scdl_gpu.bench import peer

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give the module that measures shuffling."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import shuffle_quality

    return shuffle_quality


@pytest.fixture
def streaming(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give the module that measures streaming."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import streaming

    return streaming


@pytest.fixture
def larger(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give the module that streams more than memory holds."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import larger_than_memory

    return larger_than_memory


@pytest.fixture
def run(streaming: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., list[dict[str, Any]]]:
    """Give a function that runs streaming.py and returns its lines of JSON, those of its processes too."""

    def lines(*arguments: object) -> list[dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", ["x", *map(str, arguments), "--batch-size", "16", "--window", "1"])
        streaming.main()
        return [json.loads(line) for line in capfd.readouterr().out.splitlines() if line.startswith("{")]

    return lines


def test_the_measures_of_known_batches(quality: Any) -> None:
    """Entropy, noise and near pairs of batches that can be counted by hand."""
    assert quality.entropy_of(np.array([0, 0, 1, 1])) == 1.0
    assert quality.entropy_of(np.array([7, 7, 7])) == 0.0
    assert quality.noise_of(np.array([0, 0, 1, 1]), 2) == 0.0
    assert quality.noise_of(np.array([0, 0, 0, 0]), 2) == 4.0
    assert quality.near_pairs_of(np.array([300, 50, 0, 101, 20])) == 3


def test_chance_is_that_of_all_pairs(quality: Any) -> None:
    """Of a small dataset the share of near pairs is counted."""
    near = sum(second - first <= quality.NEAR for first, second in itertools.combinations(range(120), 2))

    assert quality.near_by_chance(120, 2) == pytest.approx(near / (120 * 119 / 2))


def test_windows_are_told_from_a_permutation(quality: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On rows sorted by label windows of few extents lack labels, those of many shuffle nearly as a permutation does."""
    arguments = [
        "--rows",
        "400000",
        "--batches",
        "40",
        "--labels",
        "20",
        "--windows",
        "64",
        "--extents",
        "64",
        "4096",
        "--batch-size",
        "128",
    ]
    monkeypatch.setattr(sys, "argv", ["x", *arguments])

    quality.main()

    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    perfect, *windows = (line for line in lines if line["what"] != "raw")
    many, _, few = windows
    assert [line["extent_kib"] for line in windows] == [64, 1024, 4096]
    assert perfect["entropy"] == pytest.approx(many["entropy"], abs=0.05)
    assert perfect["near_pairs"] == pytest.approx(1, abs=0.5)
    assert few["entropy"] < many["entropy"] - 0.3
    assert few["noise"] > 2 * many["noise"]
    assert many["near_pairs"] > 4  # 7 windows an epoch


def test_a_loader_shuffles_as_its_order_does(quality: Any) -> None:
    """Batches of a real archive are about as good as the order alone says, in windows and extents of the same size."""
    found = {one.what: one for one, _ in quality.check(6_000, 64, 1 << 20)}

    assert found["loader"].entropy == pytest.approx(found["order alone"].entropy, rel=0.15)
    assert found["permutation"].entropy > found["loader"].entropy + 0.2


def test_pages_are_told_and_dropped(streaming: Any, tmp_path: Path) -> None:
    """Of an archive that was just written all pages are cached; afterwards none are, unless somebody maps them."""
    archive = write(tmp_path / "a", matrix(n_rows=2000))
    size = sum(-(-(archive / name).stat().st_size // 4096) * 4096 for name in ("data.npy", "col_ptr.npy"))

    assert streaming.chill([archive]) == (size, 0)
    held = np.memmap(archive / "data.npy", np.uint8, "r")
    assert held.sum(dtype=np.int64) > 0
    with pytest.raises(SystemExit, match="somebody else has the files mapped"):
        streaming.chill([archive])


def test_direct_reads_go_past_the_page_cache(streaming: Any, tmp_path: Path) -> None:
    """What dd reads leaves no page behind."""
    archive = write(tmp_path / "a", matrix(n_rows=2000))
    files = streaming.row_files(archive)
    streaming.chill([archive])

    streaming.read_directly(streaming.requests_of(files, 8192, shuffle=True), 3)

    assert streaming.pages.cached_pages(files)[0] == 0


PEER = """
    import numpy
    import scipy.sparse

    MODULE, PYTHON, REQUIRES, READS_ARCHIVES = "numpy", (3, 10), [], True
    ONLY_X, SAMPLINGS = False, ("shuffle",)
    VARIANTS = [{"label": f"times {factor}", "store": "bionemo-scdl", "factor": factor} for factor in (1, 2)]

    class Loader:
        def __init__(self, sources, store, settings):
            data, columns = (numpy.fromfile(f"{store}/{name}", dtype) for name, dtype in (("data.npy", "f4"), ("col_ptr.npy", "u1")))
            indptr = numpy.fromfile(f"{store}/row_ptr.npy", "u2")
            self.x = scipy.sparse.csr_matrix((data * settings["factor"], columns.astype("i4"), indptr.astype("i4")))
            self.size = settings["batch_size"]

        def epoch(self, number):
            return (self.x[start : start + self.size] for start in range(0, self.x.shape[0] - self.size + 1, self.size))

        def close(self):
            del self.x
"""


def test_streaming_beside_dd_and_peers(run: Callable[..., list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both archives have a line for each alternative, cold, ours says how it compares; a peer with wrong rows is an error."""
    (scripts := tmp_path / "scripts").mkdir()
    (scripts / "stand-in.py").write_text(textwrap.dedent(PEER))
    monkeypatch.setattr(peer, "SCRIPTS", scripts)
    raw = write(tmp_path / "raw", matrix())

    lines = run(raw, "--rounds", "1", "--peers", "times 1", "--peer-seconds", "0.1")
    with pytest.raises(SystemExit, match=r"times 2.*are no rows of the source: its figures are void"):
        run(raw, "--rounds", "1", "--peers", "times 2", "--peer-seconds", "0.1")

    whats = ["dd, 1 thread", "dd, 8 threads", "extents of 128 KiB, 8 threads", "GPUBatchLoader", "assembly alone"]
    names = [(name, what) for name in ("raw.packed", "raw") for what in whats]
    assert [(line["archive"], line["what"]) for line in lines] == [*names, ("raw", "times 1")]
    assert all(line["cells_per_second"] > 0 and line["cached_after"] == 0 for line in lines)
    assert all(line["of_dd"] > 0 and len(line["notes"]) == 1 for line in lines if line["what"] == "GPUBatchLoader")
    assert lines[-1]["resident"] == [0]
    assert lines[-1]["checked_rows"] >= 64


def test_more_than_memory(run: Callable[..., list[dict[str, Any]]], larger: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of an archive stream past the page cache, and with their pages dropped after each window; no copy is left."""
    raw = write(tmp_path / "raw", matrix(n_rows=3000))
    monkeypatch.setattr(larger, "apart", lambda what, limit, run, *given: run(*given))  # in this process, which has imported all

    lines = run(raw, "--larger-than-memory", "0.001")

    assert [line["archive"] for line in lines] == ["raw", "raw", "raw.packed", "raw.packed"]
    assert all(line["files_bytes"] >= 0.001 * 2**30 and line["peak_bytes"] < 2**31 for line in lines)
    assert {line["path"] for line in lines[::2]} == {"preadv with O_DIRECT"}
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["raw", "raw.packed"]


def test_a_run_that_dies_is_told(larger: Any) -> None:
    """A process that is killed, or that takes more memory than it was granted, ends the script with an error that says so."""
    with pytest.raises(SystemExit, match="raw: its process was killed by SIGKILL, which the kernel sends where memory is out"):
        larger.apart("raw", 1 << 30, signal.raise_signal, signal.SIGKILL)
    with pytest.raises(SystemExit, match="raw: its process ended with 3"):
        larger.apart("raw", 1 << 30, sys.exit, 3)
    with pytest.raises(SystemExit, match=r"raw: its process had .* bytes of memory, 1,000 were granted"):
        larger.apart("raw", 1_000, signal.pause)
    larger.apart("raw", 1 << 30, bytearray, 1 << 20)


def test_copies_go_when_a_run_fails(larger: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left of copies where their run raises, and none are made where the disk has no room."""
    archive = write(tmp_path / "a", matrix())

    asked = argparse.Namespace(larger_than_memory=1e-4, limit=2.0, window=1, batch_size=16)
    monkeypatch.setattr(larger, "stream_both_ways", sys.exit)  # called with several arguments, which it refuses

    with pytest.raises(SystemExit, match="a: its process ended with 1"):
        larger.stream_more(archive, asked)

    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=7))
    with pytest.raises(SystemExit, match=r"copies of .* bytes, and 7 are free"):
        larger.copies(archive, 1 << 16).__enter__()
