"""A classifier of cells, trained by DistributedDataParallel: what test_training.py lets torchrun start, once a rank.

    torchrun --nproc-per-node 3 train.py ARCHIVE LABEL FOLDER STEPS

With STEPS > 0 it first trains from the beginning to the end, then once more, and stops after so many steps, leaving a checkpoint
in FOLDER. With STEPS = 0 it goes on from that checkpoint. Each run writes what it saw to FOLDER/NAME-RANK.json.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from scdl_gpu import GPUBatchLoader

EPOCHS = 3


def train(loader: GPUBatchLoader, label: str, *, checkpoint: Path, stop: int | None) -> list[dict[str, Any]]:
    """Train from the checkpoint, if there is one, to the end, or for `stop` steps; returns epoch, rows and loss of each step."""
    torch.manual_seed(1)
    model = DistributedDataParallel(torch.nn.Linear(loader.shape[1], len(loader.categories[label])))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        loader.load_state_dict(saved["loader"])
    log: list[dict[str, Any]] = []
    for epoch in range(loader.state_dict()["epoch"], EPOCHS):
        loader.set_epoch(epoch)
        for batch in loader:
            real = ~batch.is_padding
            losses = cross_entropy(model(batch.x), batch.obs[label], reduction="none")
            loss = (losses * real).sum() / real.sum().clamp(min=1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            log.append({"epoch": epoch, "rows": batch.rows[real].tolist(), "loss": loss.item(), "n": len(batch)})
            if len(log) == stop:
                saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "loader": loader.state_dict()}
                torch.save(saved, checkpoint)
                return log
    return log


def main(archive: str, label: str, folder: Path, stop: int) -> None:
    """Run what STEPS asks for, in a process group of its own."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    runs = {"resumed": (folder / f"{rank}.pt", None)}
    if stop:
        runs = {"whole": (folder / "none", None), "stopped": (folder / f"{rank}.pt", stop)}
    for name, (checkpoint, steps) in runs.items():
        seed = 0 if name == "resumed" else 5  # the state brings its own
        with GPUBatchLoader(archive, 16, device="cpu", output="dense", normalize_total=1e4, log1p=True, obs=[label], seed=seed) as loader:
            log = train(loader, label, checkpoint=checkpoint, stop=steps)
        (folder / f"{name}-{rank}.json").write_text(json.dumps(log))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
