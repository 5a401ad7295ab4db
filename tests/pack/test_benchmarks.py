"""The benchmarks of packing run from end to end at a tiny size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("zarr", reason="comes with anndata")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script, *arguments):
    """Run a script; returns the JSON lines that it prints."""
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")], done.stdout


def test_sizes_are_measured(make_h5ad, tmp_path):
    """Every form of a file has its bytes per nonzero; a line of JSON and one of the table a file."""
    path = make_h5ad("a.h5ad", 300, 80)

    [result], text = run("packed_size.py", path, "--out", tmp_path)

    assert set(result["bytes_per_nonzero"]) == {"rows", "files", "h5ad", "scdl", "zarr lz4", "zarr zstd"}
    assert result["bytes_per_nonzero"]["rows"] < 3 < 8 < result["bytes_per_nonzero"]["scdl"]
    assert text.splitlines()[-1].startswith("a.h5ad")


def test_speed_is_measured(tmp_path):
    """Encoding, packing, unpacking and conversion each have their nonzeros per second."""
    results, _ = run("packing.py", "--rows", 60, "--genes", 300, "--per-row", 40, "--rounds", 1, "--out", tmp_path)

    assert [result["what"] for result in results] == ["encode", "pack", "unpack", "convert --packed"]
    assert all(result["nonzeros_per_second"] > 0 for result in results)
