"""benchmarks/loader.py compares the loader with its limit, and with bionemo-scdl where it is installed, in one run."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_every_output_has_its_limit(
    make_h5ad: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each output and batch size has lines of JSON for the limit and for ours, a table, and the share of the limit."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.delitem(sys.modules, "loader", raising=False)
    import loader

    for name in ("bionemo", *(name for name in sys.modules if name.startswith("bionemo."))):
        monkeypatch.setitem(sys.modules, name, None)  # slow to import, and not always there
    monkeypatch.setattr(sys, "argv", ["x", str(make_h5ad(n_rows=61)), "--batch-size", "5", "30", "--rounds", "2"])

    loader.main()

    out = capsys.readouterr().out
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert [(line["output"], line["batch_size"]) for line in lines[::2]] == [("csr", 5), ("csr", 30), ("dense", 5), ("dense", 30)]
    assert all(line["what"].startswith("limit") for line in lines[::2])
    assert all(line["of_limit"] > 0 and line["of_limit_cpu"] > 0 for line in lines[1::2])
    assert all(line["cells_per_second"] > 0 and len(line["seconds"]) == 2 for line in lines)
    assert out.count("60 cells a round") == 4
    assert out.count("% of the limit by the clock") == 4


def test_the_share_is_of_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round in which everything was slow says as much as another."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.delitem(sys.modules, "loader", raising=False)
    import loader

    assert loader.shares([1.0, 10.0, 3.0], [2.0, 20.0, 3.0]) == 0.5
