"""benchmarks/scale.py lists an archive until there are rows enough, and compares the list with the archive alone."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scdl_gpu import convert_h5ad


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give the module that compares lists of an archive."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import scale

    return scale


@pytest.mark.exhaustive
def test_a_list_is_opened_and_compared(
    scale: Any, make_h5ad: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is a line of JSON for each list that is opened, and one for each that is read, with its ratios, and a table."""
    archive = convert_h5ad(make_h5ad(n_rows=60), tmp_path / "archive")
    arguments = [str(archive), "--rows", "100", "1000", "--batch-size", "10", "--rounds", "2", "--obs", "batch"]
    monkeypatch.setattr(sys, "argv", ["x", *arguments])

    scale.main()

    out = capsys.readouterr().out
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert [(line["rows"], line["listed"]) for line in lines[:2]] == [(120, 2), (1020, 17)]
    assert all(line["held_bytes"] > 0 and line["open_seconds"] > 0 for line in lines[:2])
    assert [line["what"].split(",")[0] for line in lines[2:]] == ["120 rows", "1", "the archive alone", "60 rows"]
    assert all(line["cells_per_second"] > 0 and line["cpu_us_per_cell"] > 0 for line in lines[2:])
    assert all(line["ratio"]["low"] <= line["ratio"]["median"] <= line["ratio"]["high"] for line in lines[2:])
    assert lines[-1]["ratio"] == lines[-1]["cpu_ratio"] == {"median": 1, "low": 1, "high": 1, "at_least_90_percent": "shown"}
    assert "60 cells a turn" in out


def test_rounds_show_refute_or_leave_open(scale: Any) -> None:
    """The interval is that of the 40th and the 61st of 100 ratios, of few ratios all; it decides what is said."""
    ones = [1.0] * 100
    shown = scale.ratio([0.95 + 0.001 * number for number in range(100)], ones)
    refuted = scale.ratio([0.7 + 0.001 * number for number in range(100)], ones)
    left = scale.ratio([0.5, 1.0, 1.5], [1.0, 1.0, 1.0])

    assert shown == {"median": pytest.approx(0.9995, abs=1e-3), "low": 0.99, "high": 1.009, "at_least_90_percent": "shown"}
    assert refuted == {"median": pytest.approx(0.7495, abs=1e-3), "low": 0.74, "high": 0.759, "at_least_90_percent": "refuted"}
    assert left == {"median": 1.0, "low": 0.5, "high": 1.5, "at_least_90_percent": "open"}
