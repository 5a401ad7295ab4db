"""Under ASan and UBSan the CUDA kernels touch no byte beyond their buffers and do nothing that C++ leaves undefined."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from emulator import build

HERE = Path(__file__).parent
FEW = [
    "hundreds of rows of no to three elements", "unsorted columns", "shards of four dtypes, one unsorted read in address order",
    "identity: ragged rows", "ranked: ragged rows", "three shards, several orders, read in another order",
    "ranked: the last row, of raw doubles", "identity: long rows of raw doubles",
]  # fmt: skip


@pytest.mark.parametrize(
    ("seeds", "names", "cases"),
    [pytest.param(2, FEW, 8, id="few"), pytest.param(4, [], 40, id="all", marks=pytest.mark.exhaustive)],
)
def test_sanitizers_see_nothing(seeds: int, names: list[str], cases: int) -> None:
    """Every kernel over the named cases, in buffers of exactly their size."""
    for source in (HERE.parents[1] / "kernels").glob("*.cu"):
        build.library(source, "sanitized")
    environment = os.environ | build.sanitizer_environment()

    run = subprocess.run(
        [sys.executable, str(HERE / "sanitized.py"), str(seeds), *names], capture_output=True, text=True, check=False, env=environment
    )

    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout == f"{cases} cases under {seeds} orders: no fault\n"
