"""benchmarks/scale.py lists an archive until there are rows enough, and compares the list with the archive alone."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from scdl_gpu import convert_h5ad


def test_a_list_is_opened_and_compared(
    make_h5ad: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is a line of JSON for each list that is opened, and one for each that is read, and a table."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    for name in ("scale", "loader"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import scale

    archive = convert_h5ad(make_h5ad(n_rows=60), tmp_path / "archive")
    arguments = [str(archive), "--rows", "100", "1000", "--batch-size", "10", "--rounds", "2", "--obs", "batch", "depth"]
    monkeypatch.setattr(sys, "argv", ["x", *arguments])

    scale.main()

    out = capsys.readouterr().out
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert [(line["rows"], line["listed"]) for line in lines[:2]] == [(120, 2), (1020, 17)]
    assert all(line["held_bytes"] > 0 and line["open_seconds"] > 0 for line in lines[:2])
    assert [line["what"].split(",")[0] for line in lines[2:]] == ["120 rows", "1", "60 rows"]
    assert all(line["cells_per_second"] > 0 and line["cpu_us_per_cell"] > 0 for line in lines[2:])
    assert "60 cells a round" in out
