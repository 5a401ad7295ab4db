"""`scdl-gpu bench` from end to end at a tiny size, beside a stand-in for a peer that is honest, lies, or fails."""

import ast
import csv
import dataclasses
import json
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from scdl_gpu.bench import contenders, contest, peer, report, tree
from scdl_gpu.bench.plates import write_plates
from scdl_gpu.bench.source import open_source
from scdl_gpu.cli.commands import app

PEER = """
    import time
    import anndata, numpy, scipy.sparse

    MODULE, PYTHON, REQUIRES, READS_ARCHIVES = "anndata", (3, 10), [], False
    ONLY_X, SAMPLINGS, USES, PACKAGES = True, ("shuffle", "sequential"), ("anndata",), ("anndata", "no-such-package")
    VARIANTS = [{"label": "stand-in", "store": "stand-in.npz", "factor": FACTOR, "hangs_after": HANGS, "is_deaf": DEAF}]

    def facts():
        print("noise on stdout is no answer")
        return {"more": 1}

    def convert(sources, store, settings):
        scipy.sparse.save_npz(store, scipy.sparse.vstack([anndata.read_h5ad(source).X for source in sources]).tocsr())

    class Loader:
        def __init__(self, sources, store, settings):
            self.x, self.settings = scipy.sparse.load_npz(store) * settings["factor"], settings

        def epoch(self, number):
            if self.settings["factor"] == 3:
                raise RuntimeError("out of luck")
            b, x = self.settings["batch_size"], self.x[numpy.random.default_rng(number).permutation(self.x.shape[0])]
            made = (x[start : start + b] for start in range(0, x.shape[0] - b + 1, b))
            made = self.late(made) if self.settings["hangs_after"] is not None else made
            return made if self.settings["output"] == "csr" else (batch.toarray() for batch in made)

        def late(self, made):
            for number, batch in enumerate(made):
                while number == self.settings["hangs_after"]:
                    try:
                        time.sleep(1_000)
                    except BaseException:
                        if not self.settings["is_deaf"]:
                            raise
                yield batch

        def close(self):
            del self.x
"""
TINY = ["--cells", "300", "--plates", "1", "--genes", "400", "--batch-size", "20", "--max-time", "0.05", "--warmup-time", "0", "--no-plots"]


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the folder in which scripts of peers are looked for, with an honest one."""
    (scripts := tmp_path / "peers").mkdir()
    monkeypatch.setattr(peer, "SCRIPTS", scripts)
    monkeypatch.setattr(contest.limits, "COPY_BYTES", 1 << 20)
    write_peer(scripts, 1)
    return scripts


def write_peer(scripts: Path, factor: int, hangs_after: int | None = None, *, is_deaf: bool = False) -> None:
    """Write a peer whose values are multiplied by a factor, and which hangs after some batches, deaf to all that interrupts it."""
    text = PEER.replace("FACTOR", str(factor)).replace("HANGS", str(hangs_after)).replace("DEAF", str(is_deaf))
    (scripts / "stand-in.py").write_text(textwrap.dedent(text))


def contest_of(folder: Path, **rules: float) -> tuple[contest.Contest, list[str]]:
    """Let the stand-in take two turns alone, at a tiny size; returns what came of it, and what was told."""
    source = open_source(write_plates(folder, 300, n_plates=3, n_vars=400), use_x=False)
    told: list[str] = []
    who = contenders.peers(["stand-in"], source, folder, home=folder, builds=False, archive=None, say=told.append)
    chosen = contest.Rules(batch_sizes=[20], caches=["warm"], rounds=2, max_s=0.05, warmup_s=0, **rules)
    run = contest.Contest(source, who, chosen, logs=folder, say=told.append)
    run.run(source.table(folder)[0])
    return run, told


def in_words(run: contest.Contest) -> str:
    """Give the text of a contest."""
    record = run.record() | {"checked_against": "h5ad"}
    return report.as_text(record, report.summary(record))


def run(folder: Path, *words: str) -> tuple[int, str, dict]:
    """Run the command; returns its exit code, what it printed, and the JSON that it left."""
    done = CliRunner().invoke(
        app, ["bench", "--folder", str(folder), "--json", str(folder / "out.json"), *TINY, *words], catch_exceptions=False
    )
    path = folder / "out.json"
    return done.exit_code, done.output, json.loads(path.read_text()) if path.exists() else {}


def test_everybody_takes_turns(stand_in: Path, tmp_path: Path) -> None:
    """Each loader has its figures for each output and cache, with limits, checked rows, sizes and ratios, in JSON, CSV and a table."""
    words = [
        "--raw",
        "--output",
        "csr,dense",
        "--num-runs",
        "2",
        "--peers",
        "all",
        "--baseline",
        "stand-in",
        "--csv",
        str(tmp_path / "out.csv"),
        "--report",
        str(tmp_path / "out.md"),
    ]

    code, text, record = run(tmp_path, *words)

    assert code == 0, text
    kinds = [(row["label"], row["output"], row["cache"]) for row in record["summary"]]
    assert sorted(kinds) == sorted(
        (who, output, cache) for who in ("scdl_gpu raw", "stand-in") for output in ("csr", "dense") for cache in ("warm", "cold")
    )
    assert all(len(line["rounds"]) == 2 for line in record["lines"])
    for row in record["summary"]:
        assert row["cells_per_second"] > 0
        assert row["percent_of_limit"] > 0
        assert row["limit"] == ("disk read" if row["cache"] == "cold" else {"csr": "memory copy", "dense": "memory fill"}[row["output"]])
        assert row["peak_pss_mb"] > row["peak_private_mb"] * 0.1 > 0
        assert row["disk_mb"] > 0
        assert row["ratio"] == 1 or row["label"] != "stand-in"
    warm = [row for row in record["summary"] if row["cache"] == "warm"]
    assert all(row["rows_checked"] >= 2 * 300 and 2 < row["entropy"] <= np.log2(14) and row["resident"] == 1 for row in warm)
    assert all(0.5 < row["near_pairs"] < 1.5 for row in warm)
    assert all(row["rows_checked"] > 0 for row in record["summary"])  # where a cold epoch was timed to its end, too
    assert {facts["store"] for facts in record["conversions"]} == {"scdl_gpu.raw", "stand-in.npz"}
    assert all(facts["seconds"] > 0 and facts["size_bytes"] > 0 for facts in record["conversions"])
    assert len(record["limits"]) == 2
    assert set(record["facts"]["stand-in"]["versions"]) == {"anndata"}
    assert record["facts"]["stand-in"]["more"] == 1
    assert len(list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))) == len(kinds)
    assert text.count("stand-in") >= 4
    lines = [[word.strip() for word in line.split("|")[1:-1]] for line in (tmp_path / "out.md").read_text().splitlines() if "|" in line]
    shown = [line for line in lines if line[0] == "stand-in"]
    assert len(shown) == 4
    assert all(line[3] == "1.00" and re.search(r"disk read|memory", line[4]) and re.match(r"\d\.\d\d/", line[5]) for line in shown)
    assert "rows checked against h5ad" in text


@pytest.mark.parametrize(("factor", "fault"), [(2, "are no rows of the source"), (3, "RuntimeError: out of luck")])
def test_a_peer_that_lies_or_fails_is_told(stand_in: Path, tmp_path: Path, factor: int, fault: str) -> None:
    """It has no figures, the reason is told and recorded, and its process has ended."""
    write_peer(stand_in, factor)

    run, told = contest_of(tmp_path)

    record = run.record()
    assert fault in record["failures"]["stand-in"]
    assert any(fault in words for words in told)
    assert record["lines"] == []
    assert f"stand-in: failed: {record['failures']['stand-in']}" in in_words(run)


def test_a_slow_peer_has_figures_of_what_it_delivered(stand_in: Path, tmp_path: Path) -> None:
    """A turn that its limit cuts short counts the cells that came by then, and some of their rows are compared with the source."""
    write_peer(stand_in, 1, hangs_after=4)

    run, told = contest_of(tmp_path, turn_s=1.5, loader_s=1_000)

    [line] = run.lines.values()
    for found in line.rounds:
        assert found["cells"] == 3 * 20  # after the first batch, whose time is that of opening
        assert found["cut_s"] - found["first_s"] == pytest.approx(found["seconds"], abs=0.01)
        assert (found["rows"], found["strange"]) == (2 * 20, 0)
    assert run.failures == {}
    assert run.cuts["stand-in"] == {"cut_short": 2, "without_a_batch": 0, "left_out": 0}
    assert "stand-in, turns: 2 cut short after 1.5 s, or what was left, with figures of what was delivered by then" in in_words(run)
    assert sum("cut short after 2 s" in words for words in told) == 2


@pytest.mark.parametrize("is_deaf", [False, True])
def test_a_peer_that_hangs_ends_nothing(stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_deaf: bool) -> None:
    """It is killed where nothing interrupts it, left out once its time is used up, and has neither figures nor failed."""
    write_peer(stand_in, 1, hangs_after=0, is_deaf=is_deaf)
    monkeypatch.setattr(contest, "PATIENCE_S", 0.5)

    run, told = contest_of(tmp_path, turn_s=1.0, loader_s=0.9)

    assert (run.lines, run.failures) == ({}, {})
    assert run.cuts["stand-in"] == {"cut_short": 0, "without_a_batch": 1, "left_out": 1}
    assert any("killed: no answer in 1 s" in words for words in told) == is_deaf
    assert "stand-in, turns: 1 without a batch in that time; 1 left out, the 0.9 s of all its turns being used up" in in_words(run)


def test_rows_of_the_source_are_those_of_the_files(tmp_path: Path) -> None:
    """The table of the source knows the rows of all files in their order, whatever the layout, and labels each by its file."""
    import anndata
    import scipy.sparse as sp

    from scdl_gpu.bench import serve

    random = np.random.default_rng(0)
    parts = [sp.csr_matrix(random.poisson(0.3, (n, 50)).astype(np.float32)) for n in (7, 5)]
    anndata.AnnData(X=parts[0]).write_h5ad(tmp_path / "a.h5ad")
    anndata.AnnData(X=parts[1].tocsc()).write_h5ad(tmp_path / "b.h5ad")

    source = open_source([tmp_path], use_x=True)
    table, against = source.table(tmp_path)
    again, _ = source.table(tmp_path)

    numbers = serve.of_dense(sp.vstack(parts).toarray())
    assert (source.n_rows, source.n_vars, source.nnz, against) == (12, 50, sum(part.nnz for part in parts), "h5ad")
    assert table.rows(numbers).tolist() == list(range(12))
    assert again.rows(numbers).tolist() == list(range(12))


def test_an_archive_is_a_source(tmp_path: Path, make_h5ad) -> None:
    """Rows of an archive are known by the same fingerprints as those of the file it was made of."""
    from scdl_gpu import convert_h5ad

    path = make_h5ad(n_rows=30)
    convert_h5ad(path, tmp_path / "archive")
    plain, _ = open_source([path], use_x=True).table(tmp_path)

    table, against = open_source([tmp_path / "archive"], use_x=True).table(tmp_path)

    assert against == "the archive"
    assert np.array_equal(table._sorted, plain._sorted)


def test_peers_that_do_not_fit_are_left_out(stand_in: Path, tmp_path: Path, make_h5ad) -> None:
    """A peer is asked for nothing that it has not: other sampling, or another matrix than X; the reason is told."""
    files = open_source([make_h5ad(n_rows=30)], use_x=True)
    raw = dataclasses.replace(files, matrix="raw/X")
    told: list[str] = []
    how = {"home": tmp_path, "builds": False, "archive": None, "say": told.append}

    found = [
        contenders.peers(["stand-in"], source, tmp_path, **how, sampling=sampling)
        for source, sampling in ((files, "sequential"), (files, "random"), (raw, "shuffle"))
    ]

    assert [len(some) for some in found] == [1, 0, 0]
    assert told == [
        "stand-in: left out: it has no random sampling, but shuffle, sequential",
        "stand-in: left out: it is measured on X, and the files have a raw/X: give --use-X-not-raw",
    ]


def test_unknown_peers_are_refused(stand_in: Path, tmp_path: Path) -> None:
    """The error names those that there are."""
    code, text, _ = run(tmp_path, "--peers", "nobody")

    assert code == 1
    assert "no peer is called 'nobody'; there are stand-in" in text


def test_an_unknown_baseline_is_refused() -> None:
    """Ratios are to somebody who takes part, which is known before anything is measured."""
    report.check_baseline("a", ["a"])
    report.check_baseline(None, [])

    with pytest.raises(ValueError, match="no contender is called 'b'; there are a"):
        report.check_baseline("b", ["a"])


@pytest.mark.parametrize("words", [["--output", "coo"], ["--cache", "hot"], ["--batch-size", "many"], ["--sampling-scheme", "magic"]])
def test_wrong_words_are_refused(words: list[str], tmp_path: Path) -> None:
    """Nothing is made for options that name nothing."""
    code, text, _ = run(tmp_path, *words)

    assert code == 2, text
    assert not any(tmp_path.iterdir())


def test_environments_need_an_interpreter(stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no Python is new enough, the error says which is needed."""
    (stand_in / "late.py").write_text('MODULE, PYTHON, REQUIRES, VARIANTS, READS_ARCHIVES = "no_such", (3, 99), [], [], False\n')
    monkeypatch.setattr(peer.Path, "home", lambda: tmp_path)

    with pytest.raises(peer.PeerError, match=r"late needs Python 3\.99 or newer"):
        peer.build("late", tmp_path)

    assert peer.python_of("late", tmp_path) is None


def test_the_script_is_the_command() -> None:
    """benchmarks/tahoe100m.py offers the function that `scdl-gpu bench` is."""
    from scdl_gpu.cli.bench import bench

    script = Path(__file__).parents[2] / "benchmarks" / "tahoe100m.py"

    assert "app.command(context_settings=SETTINGS)(bench)" in script.read_text()
    assert bench in [command.callback for command in app.registered_commands]
    assert isinstance(app, typer.Typer)


def test_every_peer_takes_what_a_turn_gives() -> None:
    """The Loader of each script takes sources, a store and settings, whatever it makes of them."""
    scripts = {path: ast.parse(path.read_text()) for path in (Path(__file__).parents[2] / "benchmarks" / "peers").glob("*.py")}

    for path, script in scripts.items():
        loader = next(node for node in script.body if isinstance(node, ast.ClassDef) and node.name == "Loader")
        make = next(node for node in loader.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
        assert [one.arg for one in make.args.args] == ["self", "sources", "store", "settings"], path
    assert len(scripts) > 5


def test_what_has_no_limit_has_no_share_of_it() -> None:
    """Where pages of a disk cannot be dropped its speed is 0: there is a row without a percentage; failures are in both reports."""
    once = {
        "round": 0,
        "cells": 10,
        "seconds": 1.0,
        "cut_s": None,
        "peak_pss_bytes": 1,
        "peak_private_bytes": 1,
        "device_bytes": 0,
        "resident": 1,
    }
    record = {
        "machine": {"cpu": "any", "cores": 2, "commit": "c"},
        "time": "now",
        "rules": {"device": "cpu", "rounds": 1},
        "checked_against": "nothing",
        "source": {"cells": 10, "genes": 5, "nonzeros": 20},
        "sizes": {"a": 100},
        "limits": [{"disk read": 0.0}],
        "conversions": [],
        "cuts": {},
        "failures": {"b": "rows that are not there"},
        "lines": [{"label": "a", "output": "csr", "batch_size": 2, "cache": "cold", "rounds": [once]}],
    }

    [row] = rows = report.summary(record, "b")

    assert (row["percent_of_limit"], row["ratio"]) == (None, None)
    for text in (report.as_text(record, rows), report.as_markdown(record, rows)):
        assert "b: failed: rows that are not there" in text


def test_what_is_killed_leaves_nothing_that_it_began(tmp_path: Path) -> None:
    """A process that does not answer takes those below it along, in sessions of their own too."""
    script = tmp_path / "script.py"
    script.write_text(
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
        "child.wait()\n"
    )
    process = subprocess.Popen([sys.executable, str(script)])
    while len(pids := tree(process.pid)) < 2:
        time.sleep(0.01)

    peer.kill(process.pid)

    process.wait()
    end = time.monotonic() + 60
    while any(state_of(pid) in "RSD" for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.01)


def state_of(pid: int) -> str:
    """Give the state of a process, X where it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


@pytest.mark.exhaustive
def test_ranks_share_the_rows(stand_in: Path, tmp_path: Path) -> None:
    """Two ranks that torchrun started are one loader, with the cells and the rows of both."""
    code, text, record = run(tmp_path, "--raw", "--cache", "warm", "--num-runs", "1", "--world-size", "2")

    assert code == 0, text
    [row] = record["summary"]
    assert row["label"] == "scdl_gpu raw, 2 ranks"
    assert row["cells_per_second"] > 0
    assert row["rows_checked"] >= 2 * 2 * 20


@pytest.mark.exhaustive
def test_archives_are_measured(stand_in: Path, tmp_path: Path, make_h5ad) -> None:
    """Of a raw archive the packed one is made too; of a packed one asked for alone nothing is made; peers that want h5ad are left out."""
    from scdl_gpu import convert_h5ad

    convert_h5ad(make_h5ad(n_rows=90), tmp_path / "raw")
    convert_h5ad(make_h5ad(n_rows=90), tmp_path / "packed", packed=True)
    words = ["--cache", "warm", "--num-runs", "1", "--peers", "all", "-s", "sequential"]

    code, text, record = run(tmp_path, "-i", str(tmp_path / "raw"), *words)
    packed_code, _, packed = run(tmp_path, "-i", str(tmp_path / "packed"), "--packed", *words)

    assert (code, packed_code) == (0, 0), text
    assert "stand-in: left out" in text
    assert [line["label"] for line in record["lines"]] == ["scdl_gpu raw", "scdl_gpu packed"]
    assert [facts["store"] for facts in record["conversions"]] == ["scdl_gpu.packed"]
    assert [line["label"] for line in packed["lines"]] == ["scdl_gpu packed"]
    assert packed["conversions"] == []


def test_plots_are_drawn(tmp_path: Path) -> None:
    """There is a PNG for throughput and for the limit of each kind of batch, one for each line by batch size, one for the disk."""
    pytest.importorskip("matplotlib", reason="of the extra bench")
    from scdl_gpu.bench.plots import write_plots

    figures = {"cells_per_second": 10.0, "percent_of_limit": 3.0, "limit": "memory copy", "disk_mb": 1.0, "output": "csr", "cache": "warm"}
    rows = [{"label": label, "batch_size": size, **figures} for label in ("scdl_gpu raw", "other") for size in (64, 1024)]

    written = write_plots(rows, tmp_path / "plots")

    names = {
        "throughput-csr-64-warm",
        "throughput-csr-1024-warm",
        "limit-csr-64-warm",
        "limit-csr-1024-warm",
        "batch-size-csr-warm",
        "disk",
    }
    assert {path.stem for path in written} == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
