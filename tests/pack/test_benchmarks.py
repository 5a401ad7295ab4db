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


@pytest.mark.exhaustive
def test_tahoe_is_extrapolated(make_h5ad, tmp_path):
    """From plates, a real file and its imitation: its size is that of its nonzeros and rows, with an error bar; one plate is too few."""
    paths = [make_h5ad(f"{k}.h5ad", 200, 80, seed=k) for k in range(4)]

    results, text = run("packed_size.py", "--tahoe", *paths, "--like", paths[0], paths[1], "--out", tmp_path)

    total = results[-1]
    assert total["what"] == "Tahoe-100M"
    assert total["rows_bytes"] == total["payload_per_nonzero"] * 145_997_980_995 + 16 * 100_648_790
    assert total["error_per_nonzero"] == pytest.approx(sum(value**2 for value in total["errors"].values()) ** 0.5)
    assert total["errors"]["imitation"] > 0
    assert "GB of files without obs" in text.splitlines()[-1]
    with pytest.raises(AssertionError, match="two plates or more"):
        run("packed_size.py", "--tahoe", paths[0], "--out", tmp_path)


def test_speed_is_measured(tmp_path):
    """Encoding, packing, unpacking and conversion each have their nonzeros per second."""
    results, _ = run("packing.py", "--rows", 60, "--genes", 300, "--per-row", 40, "--rounds", 1, "--out", tmp_path)

    assert [result["what"] for result in results] == ["encode", "pack", "unpack", "convert --packed"]
    assert all(result["nonzeros_per_second"] > 0 for result in results)
