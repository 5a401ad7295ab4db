"""benchmarks/packed_loader.py runs at a tiny size, warm and cold, and notices archives that differ."""

import json
import os
import subprocess
import sys
from pathlib import Path

from cells import matrix, write
from packed_cells import write_packed

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "packed_loader.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the script."""
    command = [sys.executable, "-W", "ignore", str(SCRIPT), *map(str, arguments), "--rounds", "1", "--batch-size", "16", "--cells", "64"]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(SCRIPT.parent)})


def test_it_compares_what_is_equal(tmp_path: Path) -> None:
    """A line of JSON for each alternative, cache and output; the packed archive is made beside the raw one."""
    raw = write(tmp_path / "raw", matrix())

    done = run(raw, "--output", "csr", "dense")

    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    alternatives = ["packed, var order", "packed, stored order", "raw"]
    assert [(r["output"], r["cache"], r["what"]) for r in results] == [
        (output, cache, what) for output in ("csr", "dense") for cache in ("warm", "cold") for what in alternatives
    ]
    assert all(r["cells_per_second"] > 0 for r in results)
    assert (tmp_path / "raw.packed").is_dir()


def test_it_refuses_what_differs(tmp_path: Path) -> None:
    """A packed archive of other rows is no alternative."""
    done = run(write(tmp_path / "raw", matrix()), write_packed(tmp_path / "packed", matrix(seed=1)))

    assert done.returncode == 1
    assert "does not hold the rows of" in done.stderr
