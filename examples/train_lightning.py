"""Train a classifier of cells with Lightning, on as many devices as there are, and resume it where it was stopped.

    python examples/train_lightning.py ARCHIVE LABEL [--val ARCHIVE] [--devices 2] [--epochs 3] [--folder checkpoints]

ARCHIVE is what `scdl-gpu convert` makes, LABEL a column of its obs. Started again with the same --folder it goes on after the step
that was saved last. Needs the extra: pip install '.[lightning]' in a checkout.
"""

import argparse
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn.functional import cross_entropy

from scdl_gpu import Batch
from scdl_gpu.lightning import GPUBatchDataModule


class Classifier(LightningModule):
    """One linear layer."""

    def __init__(self, n_genes: int, n_labels: int, label: str) -> None:
        super().__init__()
        self.model, self.label = torch.nn.Linear(n_genes, n_labels), label

    def training_step(self, batch: Batch, number: int) -> torch.Tensor:
        """Return the loss, so that the mean over devices, which DDP takes of gradients, is the mean over all cells of the step."""
        labels = batch.obs[self.label].masked_fill(batch.is_padding, -1)
        loss = cross_entropy(self.model(batch.x), labels, ignore_index=-1, reduction="sum")
        n_cells = self.trainer.strategy.reduce((labels >= 0).sum().float(), reduce_op="sum")
        return loss * self.trainer.world_size / n_cells.clamp(min=1)

    def validation_step(self, batch: Batch, number: int) -> None:
        """Note the share of cells that are recognised."""
        real = ~batch.is_padding
        right = (self.model(batch.x).argmax(1) == batch.obs[self.label])[real]
        self.log("accuracy", right.float().mean(), batch_size=int(real.sum()), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the optimizer."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def main() -> None:
    """Parse the arguments, train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("label")
    parser.add_argument("--val", type=Path, help="archive to validate on, with the same labels")
    parser.add_argument("--batch-size", type=int, default=64, help="rows of a batch, on each device")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("checkpoints"))
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    arguments = parser.parse_args()
    data = GPUBatchDataModule(
        arguments.archive,
        arguments.batch_size,
        val=arguments.val,
        output="dense",
        normalize_total=1e4,
        log1p=True,
        obs=[arguments.label],
    )
    model = Classifier(data.shape[1], len(data.categories[arguments.label]), arguments.label)
    saved = ModelCheckpoint(arguments.folder, "step", every_n_train_steps=arguments.save_every, enable_version_counter=False)
    trainer = Trainer(
        max_epochs=arguments.epochs,
        devices=arguments.devices,
        strategy="ddp" if arguments.devices > 1 else "auto",
        callbacks=[saved],
        logger=False,
        enable_progress_bar=False,
    )
    last = arguments.folder / "step.ckpt"
    trainer.fit(model, data, ckpt_path=last if last.exists() else None)
    if trainer.is_global_zero:
        print(f"{trainer.global_step} steps", *(f"{name} {value:.4f}" for name, value in trainer.callback_metrics.items()))


if __name__ == "__main__":
    main()
