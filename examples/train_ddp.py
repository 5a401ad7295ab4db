"""Train a classifier of cells by DistributedDataParallel, a process per GPU (or per CPU), and resume it where it was stopped.

    torchrun --nproc-per-node 2 examples/train_ddp.py ARCHIVE LABEL [--batch-size 64] [--epochs 3] [--checkpoint FILE]

ARCHIVE is what `scdl-gpu convert` makes, LABEL a column of its obs. Started again with the same --checkpoint the job goes on after
the step that was saved last, in the middle of an epoch too, and with any number of processes: no cell is repeated or left out.
W processes with batches of B rows train as one with W x B: the gradient of a step is the mean over all cells of the step, those that
only fill up the last batches of an epoch left out. What is left is the order in which floats are summed.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from scdl_gpu import Batch, GPUBatchLoader


def loss_of(model: torch.nn.Module, batch: Batch, label: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what this rank is to differentiate, and the mean loss of the step over all ranks.

    DDP averages gradients over ranks, which may hold different numbers of cells in the last step of an epoch: each sums
    its losses, and divides by the cells of all ranks / ranks. Cells without a label, -1, count nothing either.
    """
    labels = batch.obs[label].masked_fill(batch.is_padding, -1)
    loss = cross_entropy(model(batch.x), labels, ignore_index=-1, reduction="sum")
    whole = torch.stack([loss.detach(), (labels >= 0).sum()])
    dist.all_reduce(whole)
    return loss * dist.get_world_size() / whole[1].clamp(min=1), whole[0] / whole[1].clamp(min=1)


def save(path: Path, state: dict[str, Any]) -> None:
    """Replace the checkpoint by a whole one: rank 0 writes, all ranks check that they stand at the same place."""
    places: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(places, state["loader"])
    if any(place != places[0] for place in places):
        raise RuntimeError(f"the ranks stand at different places: {places}")
    if dist.get_rank() == 0:
        unfinished = path.with_name(f"{path.name}.unfinished")
        with unfinished.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)


def train(loader: GPUBatchLoader, arguments: argparse.Namespace) -> None:
    """Train up to the end of the last epoch, from the checkpoint where there is one."""
    torch.manual_seed(1)  # equal weights on all ranks, whatever their number
    model = torch.nn.Linear(loader.shape[1], len(loader.categories[arguments.label])).to(loader.device)
    optimizer, step = torch.optim.Adam(model.parameters(), lr=1e-3), 0
    if arguments.checkpoint and arguments.checkpoint.exists():
        saved = torch.load(arguments.checkpoint, map_location=loader.device)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        loader.load_state_dict(saved["loader"])
        step = saved["step"]
    ddp = DistributedDataParallel(model)
    record = (arguments.record / f"{dist.get_rank()}.jsonl").open("a", buffering=1) if arguments.record else None

    def save_all() -> None:
        if arguments.checkpoint:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "loader": loader.state_dict(), "step": step}
            save(arguments.checkpoint, state)

    for epoch in range(loader.state_dict()["epoch"], arguments.epochs):
        mean_loss: torch.Tensor | None = None  # a job that is resumed at the end of an epoch has no batch in it
        loader.set_epoch(epoch)  # changes nothing in the epoch that is resumed
        for batch in loader:
            own_loss, mean_loss = loss_of(ddp, batch, arguments.label)
            optimizer.zero_grad()
            own_loss.backward()
            optimizer.step()
            step += 1
            if record:
                rows = batch.rows[~batch.is_padding].tolist()
                print(json.dumps({"step": step, "epoch": epoch, "loss": mean_loss.item(), "rows": rows, "n": len(batch)}), file=record)
            if step % arguments.save_every == 0:
                save_all()
        save_all()
        if dist.get_rank() == 0 and mean_loss is not None:
            print(f"epoch {epoch}, step {step}: loss {mean_loss.item():.4f}")


def main() -> None:
    """Join the other processes, open the archive, train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("label")
    parser.add_argument("--batch-size", type=int, default=64, help="rows of a batch, for each process")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--checkpoint", type=Path, help="file to resume from, and to save to")
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--record", type=Path, help="folder that gets a file per rank: what it saw, a JSON line per step")
    arguments = parser.parse_args()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    wanted: dict[str, Any] = {"output": "dense", "normalize_total": 1e4, "log1p": True, "obs": [arguments.label]}
    with GPUBatchLoader(arguments.archive, arguments.batch_size, device=device, **wanted) as loader:
        train(loader, arguments)
    dist.barrier()  # DDP keeps gloo's threads beyond the group; one that holds a tensor when the interpreter ends would abort it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
