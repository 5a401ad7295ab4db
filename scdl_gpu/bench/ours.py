"""GPUBatchLoader as `serve.py` measures it.

Knows how its settings are spelt here, nothing of clocks. Runs in a process of its own, also as a rank that torchrun started; through a
DataLoader where worker processes are asked for.
"""

import os
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch.utils.data import DataLoader, RandomSampler

from scdl_gpu.convert import convert_h5ad
from scdl_gpu.dataset import SingleCellMemMapDataset
from scdl_gpu.loader import GPUBatchLoader
from scdl_gpu.version import __version__

Settings = dict[str, Any]


def facts() -> dict[str, Any]:
    """Give the versions, and how many threads torch has."""
    versions = {"scdl-gpu": __version__, **{name: metadata.version(name) for name in ("torch", "numpy", "numba")}}
    return {"versions": versions, "threads": torch.get_num_threads()}


def prepare() -> None:
    """Compile what conversion needs, once a machine, by converting two rows."""
    with tempfile.TemporaryDirectory() as folder:
        rows = scipy.sparse.csr_matrix(np.array([[1, 0, 300], [0, 2, 0]], np.float32))
        for packed in (False, True):
            convert_h5ad(rows, Path(folder) / f"{packed}", packed=packed, progress=False)


def convert(sources: list[str], store: str, settings: Settings) -> None:
    """Make a raw or a packed archive of h5ad files."""
    convert_h5ad(sources, store, x=settings["x"], packed=settings["format"] == "packed", progress=False)


class Loader:
    """A loader on the archive at `store`, through torch's DataLoader where there are workers."""

    def __init__(self, sources: list[str], store: str, settings: Settings) -> None:
        sampling, self._workers = settings.get("sampling", "shuffle"), settings.get("workers", 0)
        order: Settings = {"shuffle": sampling == "shuffle", "drop_last": True}
        if sampling == "random":
            n_rows = len(SingleCellMemMapDataset(store))
            order = {"sampler": RandomSampler(range(n_rows), replacement=True), "drop_last": True}
        self._loader = GPUBatchLoader(
            store,
            settings["batch_size"],
            device=settings.get("device", "auto"),
            output=settings.get("output", "csr"),
            placement=settings.get("placement", "auto"),
            windows=settings.get("windows"),
            seed=settings.get("seed", 0),
            rank=int(os.environ.get("RANK", "0")),
            world_size=int(os.environ.get("WORLD_SIZE", "1")),
            **order,
        )
        self._batches: Any = DataLoader(self._loader, batch_size=None, num_workers=self._workers) if self._workers else self._loader

    def epoch(self, number: int) -> Any:
        """Begin an epoch."""
        self._loader.set_epoch(number)
        return iter(self._batches)

    def n_cells(self, batch: Any) -> int:
        """Count rows."""
        return len(batch)

    def rows(self, batch: Any) -> Any:
        """Give the CSR arrays or the dense array of a batch, on the host."""
        x = batch.x
        if x.layout == torch.sparse_csr:
            return tuple(part.cpu().numpy() for part in (x.crow_indices(), x.col_indices(), x.values()))
        return (x.float() if x.dtype == torch.bfloat16 else x).cpu().numpy()

    def words(self) -> str:
        """Say what the loader chose."""
        return repr(self._loader)

    def close(self) -> None:
        """Give back the memory."""
        self._loader.close()


def synchronize() -> None:
    """Wait for the GPU, where one is in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # waits


def device_bytes() -> int:
    """Count what is in use of the GPU's memory, by whomever: the difference is the loader's."""
    if not torch.cuda.is_initialized():
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free
