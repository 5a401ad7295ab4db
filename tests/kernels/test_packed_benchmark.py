"""benchmarks/packed_rows.py runs, at a tiny size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "packed_rows.py"
ALTERNATIVES = {
    "encode_rows, ranked", "encode_rows, identity", "decode_csr, var order", "decode_csr, stored order", "decode_csr, identity order",
    "gather_csr, raw",
}  # fmt: skip


@pytest.mark.parametrize("arguments", [["--cells", "30", "--rounds", "2", "--batch-size", "8"]])
def test_packed_rows_are_measured(arguments: list[str], tmp_path: Path) -> None:
    """Each alternative has its line of JSON, and the table its last line of raw rows."""
    run = subprocess.run([sys.executable, SCRIPT, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)

    assert run.returncode == 0, run.stderr
    results = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert {result["what"] for result in results} == ALTERNATIVES
    assert run.stdout.splitlines()[-1].startswith("gather_csr, raw")
