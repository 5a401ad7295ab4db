"""Rows divided over the devices of a node: what test_division.py starts, once a rank.

    divided.py FOLDER RANK WORLD KIND

FOLDER has the archives that test_division.py wrote. KIND is `emulated`, or `gpu`: all ranks on the one GPU, for the first scenario
alone. Each rank writes what it saw to FOLDER/RANK.json and FOLDER/RANK.npz.
"""

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from cells import dense
from emulator.device import EmulatedDevice

from scdl_gpu import GPUBatchLoader, peers
from scdl_gpu.errors import ScdlError

BUDGET = 1 << 20
SOURCES = ("raw", "packed", "raw", "unsorted")
UNEVEN = (1 << 20, 8_000, 1 << 20)
"""Budgets of three ranks, the second of which cannot hold a third of the rows."""


class Rank:
    """One rank, and what it saw: `said`, by scenario, and `arrays`."""

    def __init__(self, folder: Path, rank: int, make_device: Callable[[], Any]) -> None:
        self.folder, self.rank, self.make_device = folder, rank, make_device
        self.said: dict[str, Any] = {}
        self.arrays: dict[str, np.ndarray] = {}

    def sources(self, *names: str) -> list[str]:
        """Give the paths of archives."""
        return [str(self.folder / name) for name in names]

    def loader(self, device: Any, *names: str, **options: Any) -> GPUBatchLoader:
        """Make a loader of small batches."""
        return GPUBatchLoader(
            self.sources(*(names or SOURCES)), 16, device=device, **{"memory_budget": BUDGET, "placement": "node"} | options
        )

    def keep(self, name: str, loader: GPUBatchLoader) -> None:
        """Keep the rows and the values of an epoch, and the bits of what batches are made of."""
        batches = list(loader)
        self.arrays[f"{name} rows"] = np.concatenate([batch.rows.cpu().numpy() for batch in batches])
        self.arrays[f"{name} padding"] = np.concatenate([batch.is_padding.cpu().numpy() for batch in batches])
        self.arrays[f"{name} values"] = np.concatenate([dense(batch.x) for batch in batches])

    def served(self) -> None:
        """Keep an epoch of CSR and of dense batches, and what a loader on the CPU makes of the same; and what is held meanwhile."""
        for output in ("csr", "dense"):
            device = self.make_device()
            with self.loader("cpu", placement="auto", memory_budget=None, output=output) as loader:
                self.keep(f"{output} cpu", loader)
            with self.loader(device, output=output, seed=0) as loader:
                self.said["repr"] = repr(loader)
                self.keep(output, loader)
        self.said["size_bytes"] = int(self.said["repr"].split("placement node: ")[1].split(" ")[0].replace(",", ""))

    def held(self) -> None:
        """Note what a rank holds, and opened, while a loader is there and after."""
        device = self.make_device()
        loader = self.loader(device)
        held = sum(os.fstat(fd).st_size for fd in device._shareable.values())
        opened = len(device.opened)
        loader.close()
        self.said["held"] = [held, opened, len(device._shareable), len(device.opened), device.allocated_bytes]

    def uneven(self) -> None:
        """Keep an epoch where one rank has room for little."""
        with self.loader(self.make_device(), memory_budget=UNEVEN[self.rank]) as loader:
            self.keep("uneven", loader)
            self.said["uneven"] = list(loader._assembler._placed.plan.shares)  # type: ignore[attr-defined]

    def refused(self) -> None:
        """Note what ranks say where rows do not fit, are others, or cannot be reached, and where one of them fails."""
        narrow, short, far, closed = (self.make_device() for _ in range(4))
        buses = peers.meet().gather("tell", far.bus_id)
        far.unreachable = frozenset(buses[:1]) if self.rank == 1 else frozenset()
        short.total_bytes, closed.fail_open = (1 << 30) if self.rank != 2 else 100, self.rank == 0
        self.failing("narrow", narrow, memory_budget=2_000)
        self.failing("short", short, memory_budget=BUDGET)
        self.failing("far", far)
        self.failing("closed", closed)
        self.failing("damaged", self.make_device(), "damaged")
        self.failing("other", self.make_device(), "raw" if self.rank == 1 else "packed")
        self.failing("streamed", self.make_device(), windows=True)
        self.failing("cpu", "cpu" if self.rank == 1 else self.make_device(), memory_budget=None)

    def failing(self, name: str, device: Any, *names: str, **options: Any) -> None:
        """Make a loader, which fails; note the error, and what is left on the device."""
        try:
            self.loader(device, *names, **options)
        except (ScdlError, ValueError) as error:
            left = [] if device == "cpu" else [device.allocated_bytes, len(device.opened), len(device._shareable)]
            self.said[name] = [type(error).__name__, str(error), left]

    def auto(self) -> None:
        """Note what "auto" takes: where each device holds all, where none does, and where ranks share a device or are apart."""
        size_bytes = self.said["size_bytes"]
        alone, shared, apart, many = (self.make_device() for _ in range(4))
        shared.bus = "one for all"
        apart.unreachable = frozenset([apart.bus_id()]) if self.rank == 2 else frozenset()
        cases = {
            "alone": (alone, {"memory_budget": 2 * size_bytes}),
            "divided": (many, {"memory_budget": size_bytes - 1 if self.rank == 1 else 2 * size_bytes}),
            "shared": (shared, {"memory_budget": size_bytes - 1}),
            "apart": (apart, {"memory_budget": size_bytes - 1}),
        }
        for name, (device, options) in cases.items():
            with self.loader(device, placement="auto", **options) as loader:
                self.said[name] = loader._assembler._placed.kind  # type: ignore[attr-defined]

    def nodes(self) -> None:
        """Keep an epoch where the last rank is on another node."""
        name = peers.node
        peers.node = lambda: f"node {self.rank // 2}"
        peers._meet.cache_clear()
        with self.loader(self.make_device()) as loader:
            self.keep("nodes", loader)
            self.said["nodes"] = len(loader._assembler._placed.plan.shares)  # type: ignore[attr-defined]
        peers.node = name
        peers._meet.cache_clear()

    def closing(self) -> None:
        """Let the first rank close at once, and the others read on; once more with no patience at all."""
        for name, seconds in (("patient", 1e6), ("hasty", 0.0)):
            peers.CLOSE_SECONDS = seconds
            loader = self.loader(self.make_device())
            if self.rank == 0 and name == "hasty":
                loader.close()
                dist.barrier()  # only now do the others read
                continue
            if self.rank == 0:
                loader.close()
                continue
            if name == "hasty":
                dist.barrier()
            else:
                time.sleep(0.3)  # enough for the first rank to give its memory back, if it did not wait
            self.keep(name, loader)
            peers.CLOSE_SECONDS = 1e6
            loader.close()

    def killed(self) -> None:
        """Let the second rank die with its loader open; the others close theirs."""
        peers.CLOSE_SECONDS = 1e6
        loader = self.loader(self.make_device())
        self.write()
        dist.barrier()
        if self.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        loader.close()
        self.said["survived"] = True
        self.write()

    def write(self) -> None:
        """Write what was seen so far."""
        np.savez(self.folder / f"{self.rank}.npz", **self.arrays)  # type: ignore[arg-type]
        (self.folder / f"{self.rank}.json").write_text(json.dumps(self.said))


def main(folder: Path, rank: int, world: int, kind: str) -> None:
    """Take part in every scenario."""
    dist.init_process_group("gloo", f"file://{folder}/store", timedelta(minutes=5), world_size=world, rank=rank)
    if kind == "gpu":
        from scdl_gpu.device import CudaDevice

        seen = Rank(folder, rank, lambda: CudaDevice(0))
        seen.served()
        seen.write()
        return
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("scdl_gpu").addHandler(handler)
    seen = Rank(folder, rank, EmulatedDevice)
    for scenario in (seen.served, seen.held, seen.uneven, seen.refused, seen.auto, seen.nodes, seen.closing):
        scenario()
        seen.said["logged"] = logged
    seen.killed()
    os._exit(0)  # torch.distributed would wait for the rank that died


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
