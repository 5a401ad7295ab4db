"""Lightning's Trainer with GPUBatchDataModule: every row once an epoch, and on after any checkpoint as if nothing had been stopped."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from scdl_gpu import SingleCellMemMapDataset, budget, convert_h5ad, loader

if TYPE_CHECKING:
    from scdl_gpu.lightning import GPUBatchDataModule

ROOT = Path(__file__).resolve().parents[1]
N_ROWS, BATCH, STEPS = 61, 8, 8
FILE = "mix_sc_celseq2_5cl_p1.h5ad"
LABEL = "cell_line_demuxlet"

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="lightning is not installed; the extra `dev` has it"),
    pytest.mark.filterwarnings("ignore"),  # Lightning's own: of its dependencies, of workers, of loggers
]
Rows = list[tuple[int, list[int]]]


def cells(categories: str, n_rows: int = N_ROWS) -> anndata.AnnData:
    """Make rows with an obs column `kind` of these categories."""
    random = np.random.default_rng(0)
    kinds = pd.Categorical.from_codes(np.arange(n_rows) % len(categories), list(categories))
    matrix = sp.random(n_rows, 20, 0.3, "csr", random_state=random)
    return anndata.AnnData(matrix, obs=pd.DataFrame({"kind": kinds}, index=[f"c{i}" for i in range(n_rows)]))


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give an archive of N_ROWS rows."""
    return convert_h5ad(cells("abc"), tmp_path_factory.mktemp("lightning") / "archive")


Fit = Callable[..., Rows]


@pytest.fixture
def fit(tmp_path: Path) -> Fit:
    """Give what trains with a datamodule, and returns epoch and rows of each step; `checkpoint` as of ModelCheckpoint."""
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Noting(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.seen = torch.nn.Linear(20, 1), Rows()

        def training_step(self, batch: Any, number: int) -> torch.Tensor:
            self.seen.append((self.current_epoch, batch.rows[~batch.is_padding].tolist()))
            return self.layer(batch.x).sum()

        def validation_step(self, batch: Any, number: int) -> None:
            """See nothing."""

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    def run(data: "GPUBatchDataModule", epochs: int, *, checkpoint: Any = None, after: Path | None = None, **options: Any) -> Rows:
        callbacks = [ModelCheckpoint(tmp_path, save_top_k=-1, filename="{step}", **checkpoint)] if checkpoint else []
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = Trainer(
            accelerator="cpu", devices=1, max_epochs=epochs, callbacks=callbacks, enable_checkpointing=bool(checkpoint), **quiet, **options
        )
        module = Noting()
        trainer.fit(module, data, ckpt_path=after)
        return module.seen

    return run


@pytest.fixture
def data(archive: Path) -> Callable[..., "GPUBatchDataModule"]:
    """Give what makes a datamodule of dense batches."""
    from scdl_gpu.lightning import GPUBatchDataModule

    def make(batch_size: int = BATCH, **options: Any) -> "GPUBatchDataModule":
        return GPUBatchDataModule(archive, batch_size, output="dense", **options)

    return make


def test_an_epoch_is_every_row_once(fit: Fit, data: Callable[..., Any]) -> None:
    """Each epoch has all rows, in an order of its own; a second fit begins with the first epoch again."""
    module = data()

    seen = fit(module, 3)

    epochs = [[row for number, rows in seen for row in rows if number == epoch] for epoch in range(3)]
    assert [sorted(rows) for rows in epochs] == [list(range(N_ROWS))] * 3
    assert len({tuple(rows) for rows in epochs}) == 3
    assert fit(module, 3) == seen


@pytest.mark.parametrize("val", [False, True], ids=["", "val"])
@pytest.mark.parametrize(
    ("checkpoint", "step"),
    [({"every_n_train_steps": 3}, 12), ({"every_n_train_steps": 4}, 8), ({"save_on_train_epoch_end": True}, 8), ({}, 16)],
    ids=["within", "last step", "end of epoch", "validation"],
)
def test_a_checkpoint_is_gone_on_with(
    fit: Fit, data: Callable[..., Any], archive: Path, tmp_path: Path, checkpoint: dict[str, Any], step: int, val: bool
) -> None:
    """Resumed from a checkpoint of any moment, a training has the steps of one that was not stopped."""
    given = {"val": archive} if val else {}
    whole = fit(data(**given), 3, checkpoint={"monitor": None, **checkpoint})

    found = fit(data(**given), 3, after=tmp_path / f"step={step}.ckpt")

    assert len(whole) == 3 * STEPS
    assert found == whole[step:]


def test_steps_of_another_size_go_on_between_epochs_only(fit: Fit, data: Callable[..., Any], tmp_path: Path) -> None:
    """Within an epoch Lightning would count wrong, and it is refused; at its end the next epoch is whole."""
    fit(data(), 1, checkpoint={"every_n_train_steps": 3})
    fit(data(), 1, checkpoint={"save_on_train_epoch_end": True})

    with pytest.raises(ValueError, match="of steps of 8 rows over all devices, they have 20 now"):
        fit(data(20), 2, after=tmp_path / "step=3.ckpt")
    found = fit(data(20), 2, after=tmp_path / "step=8.ckpt")
    assert [epoch for epoch, _ in found] == [1] * 4
    assert sorted(row for _, rows in found for row in rows) == list(range(N_ROWS))


def test_what_is_known_before_the_processes_are(data: Callable[..., Any]) -> None:
    """The number of genes and the categories, of which a model is made, need no trainer."""
    module = data(obs=["kind"], placement="auto")

    assert module.shape == (N_ROWS, 20)
    assert module.categories["kind"].tolist() == ["a", "b", "c"]


def test_rows_that_stream_are_described_to_ranks(data: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns and categories of rows that fit nowhere are known to each of several processes; nothing is read for them."""
    monkeypatch.setattr(loader, "ranks", lambda rank, world_size: (0, 2) if rank is None else (rank, world_size))
    monkeypatch.setattr(budget, "available_bytes", lambda: 1 << 18)
    monkeypatch.setattr(budget.Room, "holds", lambda room, size_bytes: False)

    assert data(8, obs=["kind"], windows=True, host_budget=1 << 17).shape == (N_ROWS, 20)


def test_codes_that_mean_two_things_are_refused(fit: Fit, data: Callable[..., Any], tmp_path: Path) -> None:
    """A validation set that numbers its categories otherwise raises ValueError with the column and both lists."""
    other = convert_h5ad(cells("acb", 6), tmp_path / "other")

    with pytest.raises(ValueError, match=r"obs column 'kind' has categories \['a', 'c', 'b'\] in val, \['a', 'b', 'c'\] elsewhere"):
        fit(data(obs=["kind"], val=other), 1)


def test_genes_that_differ_are_refused(fit: Fit, data: Callable[..., Any], tmp_path: Path) -> None:
    """A validation set of other genes raises ValueError with the first that differs."""
    other = cells("abc", 6)
    other.var_names = [f"other{i}" for i in range(20)]

    with pytest.raises(ValueError, match=r"has gene 0 'other0' where .* has '0'"):
        fit(data(val=convert_h5ad(other, tmp_path / "other")), 1)


def test_a_stage_without_rows_is_named(data: Callable[..., Any]) -> None:
    """Asking for what was not given says how to give it."""
    with pytest.raises(ValueError, match="no dataset was given for test"):
        data().test_dataloader()


@pytest.fixture(scope="module")
def arguments(real_files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Give the arguments of the example: cell lines, or made-up cells where the real file is absent, a part of them to validate on."""
    folder = tmp_path_factory.mktemp("example")
    real = [path for path in real_files if path.name == FILE]
    whole = anndata.read_h5ad(real[0]) if real else cells("abc", 200)
    label, held_out = LABEL if real else "kind", np.arange(whole.n_obs) % 5 == 0
    train, val = (str(convert_h5ad(whole[rows].copy(), folder / name)) for name, rows in (("train", ~held_out), ("val", held_out)))
    return [train, label, "--val", val, "--folder", str(folder / "checkpoints")]


def example(*arguments: str) -> str:
    """Run examples/train_lightning.py; returns the last line that it prints."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(ROOT / "examples" / "train_lightning.py"), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout.splitlines()[-1]


def test_the_example_trains_on_two_devices(arguments: list[str]) -> None:
    """Two processes train two epochs, with a checkpoint every five steps, and recognise cells that they never saw."""
    said = example(*arguments, "--batch-size", "8", "--save-every", "5", "--devices", "2", "--epochs", "2").split()

    n_rows = len(SingleCellMemMapDataset(arguments[0]))
    assert int(said[0]) == 2 * -(-n_rows // 16)
    assert float(said[-1]) > 0.5


@pytest.mark.exhaustive
def test_the_example_goes_on(arguments: list[str], tmp_path: Path) -> None:
    """Started again with the same folder it goes on from the checkpoint, and ends at the step of a training of as many epochs."""
    small = [*arguments[:-1], str(tmp_path), "--batch-size", "8", "--save-every", "5", "--devices", "2", "--epochs"]

    steps = [int(example(*small, epochs).split()[0]) for epochs in ("2", "3")]

    assert steps[1] * 2 == steps[0] * 3
