"""Three ranks train on real cells, are stopped in the middle of an epoch, and go on as if they had not been."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scdl_gpu import SingleCellMemMapDataset, convert_h5ad

ROOT = Path(__file__).resolve().parents[1]
FILE, LABEL = "mix_sc_celseq2_5cl_p1.h5ad", "cell_line_demuxlet"
RANKS, STOP = range(3), 9
Log = list[dict[str, Any]]


@pytest.fixture(scope="module")
def cells(real_files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Give an archive of cells and the obs column to learn: five cell lines, or three made up where the file is absent."""
    real = [path for path in real_files if path.name == FILE]
    return convert_h5ad(real[0] if real else made(), tmp_path_factory.mktemp("cells") / "archive"), LABEL


def made() -> anndata.AnnData:
    """Make 297 cells of three kinds, each with a third of the genes up."""
    random = np.random.default_rng(0)
    kinds = random.integers(0, 3, 297)
    counts = random.poisson(1 + 4 * (np.arange(150) % 3 == kinds[:, None])).astype(np.float32)
    obs = pd.DataFrame({LABEL: pd.Categorical.from_codes(kinds, ["a", "b", "c"])}, index=[f"cell{i}" for i in range(297)])
    return anndata.AnnData(sp.csr_matrix(counts), obs=obs)


@pytest.fixture(scope="module")
def logs(cells: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Log]]:
    """Give what each rank saw in a whole training, in one that was stopped, and in the one that went on from there."""
    folder = tmp_path_factory.mktemp("training")
    for stop in (STOP, 0):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(len(RANKS))]
        command += [str(ROOT / "tests" / "train.py"), str(cells[0]), cells[1], str(folder), str(stop)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
        assert run.returncode == 0, run.stdout + run.stderr
    return {name: [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in RANKS] for name in ("whole", "stopped", "resumed")}


def test_ranks_see_every_cell_once(cells: tuple[Path, str], logs: dict[str, list[Log]]) -> None:
    """In each epoch the ranks' rows are disjoint and complete, and all ranks take as many batches of the same length."""
    n_rows = len(SingleCellMemMapDataset(cells[0]))

    for epoch in range(3):
        steps = [[step for step in log if step["epoch"] == epoch] for log in logs["whole"]]
        rows = [row for log in steps for step in log for row in step["rows"]]
        assert sorted(rows) == list(range(n_rows))
        assert {len(log) for log in steps} == {-(-n_rows // (16 * len(RANKS)))}
        assert {step["n"] for log in steps for step in log} == {16}


def test_epochs_differ(logs: dict[str, list[Log]]) -> None:
    """No two epochs begin with the same cells."""
    firsts = {tuple(next(step for step in logs["whole"][0] if step["epoch"] == epoch)["rows"]) for epoch in range(3)}

    assert len(firsts) == 3


def test_training_learns(logs: dict[str, list[Log]]) -> None:
    """The loss falls: what comes with a row are its label and its values."""
    first, last = ([step["loss"] for log in logs["whole"] for step in log if step["epoch"] == epoch] for epoch in (0, 2))

    assert sum(last) / len(last) < 0.7 * sum(first) / len(first)


def test_a_resumed_training_is_the_one_that_was_not_stopped(logs: dict[str, list[Log]]) -> None:
    """Stopped within an epoch and gone on with in other processes, every later step has the same cells and the very same loss."""
    for rank in RANKS:
        whole, stopped, resumed = (logs[name][rank] for name in ("whole", "stopped", "resumed"))

        assert len(stopped) == STOP
        assert whole[STOP - 1]["epoch"] == whole[STOP]["epoch"]
        assert stopped + resumed == whole
