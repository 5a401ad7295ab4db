"""torchrun trains on real cells by examples/train_ddp.py: as one process would, and on after a rank was killed, as if it had not been.

Every step of every rank is in a log, which the script writes; what is expected is arithmetic on row numbers, or another run.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from scdl_gpu import SingleCellMemMapDataset, convert_h5ad

ROOT = Path(__file__).resolve().parents[1]
SCRIPT, KILLER = ROOT / "examples" / "train_ddp.py", ROOT / "tests" / "killed_rank.py"
FILE, LABEL = "mix_sc_celseq2_5cl_p1.h5ad", "cell_line_demuxlet"
STEP_ROWS, EPOCHS = 48, 3
KILLED, SAVED = 11, 9
"""The step that no rank finishes, and the last one with a checkpoint: both within the second epoch."""
Log = list[list[dict[str, Any]]]


@pytest.fixture(scope="module")
def cells(real_files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give an archive of cells with a label: five cell lines, or three made up where the real file is absent."""
    real = [path for path in real_files if path.name == FILE]
    return convert_h5ad(real[0] if real else made(), tmp_path_factory.mktemp("cells") / "archive")


def made() -> anndata.AnnData:
    """Make 297 cells of three kinds, each with a third of the genes up."""
    random = np.random.default_rng(0)
    kinds = random.integers(0, 3, 297)
    counts = random.poisson(1 + 4 * (np.arange(150) % 3 == kinds[:, None])).astype(np.float32)
    obs = pd.DataFrame({LABEL: pd.Categorical.from_codes(kinds, ["a", "b", "c"])}, index=[f"cell{i}" for i in range(297)])
    return anndata.AnnData(sp.csr_matrix(counts), obs=obs)


@pytest.fixture(scope="module")
def n_rows(cells: Path) -> int:
    """Give the number of cells; the last step of an epoch is not full."""
    n = len(SingleCellMemMapDataset(cells))
    assert 2 * SAVED * STEP_ROWS > 2 * n > KILLED * STEP_ROWS > SAVED * STEP_ROWS > n
    assert n % STEP_ROWS
    return n


@pytest.fixture(scope="module")
def torchrun(cells: Path, tmp_path_factory: pytest.TempPathFactory) -> "Torchrun":
    """Give what trains on `cells` in processes of torchrun."""
    return Torchrun(cells, tmp_path_factory.mktemp("training"))


class Torchrun:
    """Runs of the script, each with a folder of its own for the checkpoint and the logs."""

    def __init__(self, cells: Path, folder: Path) -> None:
        self._cells, self._folder = cells, folder

    def run(self, n: int, batch_size: int, *options: Any, after: Path | None = None, killed: tuple[int, int] | None = None) -> Path:
        """Train with n processes, from the checkpoint in `after` where there is one; returns the folder.

        killed: a rank, and after how many batches it gets SIGKILL; then the job must fail, otherwise it must not.
        """
        folder = self._folder / str(len(list(self._folder.iterdir())))
        folder.mkdir()
        if after is not None:
            shutil.copy(after / "checkpoint.pt", folder)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
        command += [] if killed is None else [str(KILLER), *map(str, killed)]
        command += [str(SCRIPT), str(self._cells), LABEL, "--batch-size", str(batch_size), *map(str, options)]
        command += ["--checkpoint", str(folder / "checkpoint.pt"), "--save-every", "3", "--record", str(folder)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", "PYTHONPATH": str(ROOT)}
        run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
        said = run.stdout + run.stderr
        assert (run.returncode == 0) == (killed is None), said
        assert killed is None or "exitcode: -9 (pid" in re.sub(r"exitcode +:", "exitcode:", said), said
        return folder


def log_of(folder: Path) -> Log:
    """Read what the ranks of a run saw: a list for each, of steps."""
    files = sorted(folder.glob("*.jsonl"))
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def rows_of(log: Log, epoch: int) -> list[int]:
    """Give the rows that all ranks trained on in an epoch, in ascending order."""
    return sorted(row for steps in log for step in steps if step["epoch"] == epoch for row in step["rows"])


def losses_of(log: Log) -> dict[int, float]:
    """Give the loss of each step, which all ranks must report alike."""
    assert all([step["loss"] for step in steps] == [step["loss"] for step in log[0]] for steps in log)
    return {step["step"]: step["loss"] for step in log[0]}


@pytest.fixture(scope="module")
def whole(torchrun: Torchrun) -> Path:
    """Give a training of three ranks that nothing interrupts."""
    return torchrun.run(3, STEP_ROWS // 3, "--epochs", EPOCHS)


@pytest.fixture(scope="module")
def killed(torchrun: Torchrun) -> Path:
    """Give the same training, of which one rank is killed within the second epoch."""
    return torchrun.run(3, STEP_ROWS // 3, "--epochs", EPOCHS, killed=(1, KILLED))


@pytest.fixture(scope="module")
def alone(torchrun: Torchrun) -> Path:
    """Give a training by one process with batches of all rows of a step, up to the end of the second epoch."""
    return torchrun.run(1, STEP_ROWS, "--epochs", EPOCHS - 1)


def test_ranks_see_every_cell_once(whole: Path, n_rows: int) -> None:
    """In each epoch the ranks' rows are disjoint and complete, and all ranks take as many batches of the same length."""
    log = log_of(whole)

    assert len(log) == 3
    for epoch in range(EPOCHS):
        assert rows_of(log, epoch) == list(range(n_rows))
        assert {sum(step["epoch"] == epoch for step in steps) for steps in log} == {-(-n_rows // STEP_ROWS)}
    assert {step["n"] for steps in log for step in steps} == {STEP_ROWS // 3}


def test_epochs_differ(whole: Path) -> None:
    """No two epochs begin with the same cells."""
    steps = log_of(whole)[0]

    assert len({tuple(next(step for step in steps if step["epoch"] == epoch)["rows"]) for epoch in range(EPOCHS)}) == EPOCHS


def test_training_learns(whole: Path) -> None:
    """The loss falls: what comes with a row are its label and its values."""
    losses = list(losses_of(log_of(whole)).values())

    assert np.mean(losses[-6:]) < 0.7 * np.mean(losses[:6])


def test_ranks_train_as_one_process(whole: Path, alone: Path) -> None:
    """Three ranks, and one process with batches of three times the rows: each step has the same cells and the same loss.

    But for the order in which float32 are summed, in losses and gradients: a relative error of 1e-7, which Adam carries on from step
    to step. 1e-5 is allowed, 2e-7 was seen; a padding row that counts, or a mean of unequal means, would make 1e-2.
    """
    ranks, one = log_of(whole), log_of(alone)
    steps = len(one[0])

    for number in range(steps):
        assert sorted(row for rank in ranks for row in rank[number]["rows"]) == sorted(one[0][number]["rows"])
    np.testing.assert_allclose([losses_of(ranks)[k + 1] for k in range(steps)], list(losses_of(one).values()), rtol=1e-5)


def test_a_killed_rank_ends_the_job_and_leaves_a_whole_checkpoint(killed: Path, whole: Path) -> None:
    """No rank goes on without the killed one, and up to there all is as in the training without a kill."""
    found, expected = log_of(killed), log_of(whole)

    assert [len(steps) for steps in found] == [KILLED] * 3
    assert found == [steps[:KILLED] for steps in expected]
    assert [file.name for file in killed.glob("checkpoint*")] == ["checkpoint.pt"]


def test_a_training_after_a_kill_is_the_one_without(torchrun: Torchrun, killed: Path, whole: Path) -> None:
    """Started again, the job goes on after the checkpoint: every later step has the same cells and the very same loss."""
    found = log_of(torchrun.run(3, STEP_ROWS // 3, "--epochs", EPOCHS, after=killed))

    assert found == [steps[SAVED:] for steps in log_of(whole)]


def test_another_number_of_ranks_goes_on_within_an_epoch(torchrun: Torchrun, killed: Path, n_rows: int) -> None:
    """Two ranks, and other steps, go on where three were: what the checkpoint has seen and what follows is each cell once an epoch."""
    before = [steps[:SAVED] for steps in log_of(killed)]

    after = log_of(torchrun.run(2, STEP_ROWS // 3, "--epochs", 2, after=killed))

    assert len(after) == 2
    assert {step["epoch"] for steps in after for step in steps} == {1}
    assert rows_of(before + after, 0) == rows_of(before + after, 1) == list(range(n_rows))


def test_another_number_of_ranks_goes_on_at_the_end_of_an_epoch(torchrun: Torchrun, alone: Path, whole: Path, n_rows: int) -> None:
    """Two ranks take over from one, between epochs: each cell once, and the losses of three ranks, tolerance as above."""
    after = log_of(torchrun.run(2, STEP_ROWS // 2, "--epochs", EPOCHS, after=alone))

    assert rows_of(after, EPOCHS - 1) == list(range(n_rows))
    expected = losses_of(log_of(whole))
    assert all(abs(loss / expected[step] - 1) < 1e-5 for step, loss in losses_of(after).items())
    assert list(losses_of(after)) == list(expected)[-len(after[0]) :]


@pytest.mark.exhaustive
def test_a_job_that_stopped_with_an_epoch_ends(torchrun: Torchrun, alone: Path, n_rows: int, tmp_path: Path) -> None:
    """From a checkpoint of the last step, before that of the epoch's end, there is no batch left, and nothing to print."""
    saved = torch.load(alone / "checkpoint.pt")
    saved["loader"] |= {"epoch": EPOCHS - 1, "position": n_rows}
    torch.save(saved, tmp_path / "checkpoint.pt")

    found = torchrun.run(1, STEP_ROWS, "--epochs", EPOCHS, after=tmp_path)

    assert log_of(found) == [[]]
