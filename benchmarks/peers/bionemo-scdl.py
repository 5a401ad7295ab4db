"""bionemo-scdl: its memory-mapped dataset in torch's DataLoader, shuffled row by row, with its own collate function; by 0 and by 2 workers.

Run by scdl_gpu/bench/serve.py, in an environment that has it. An archive is made by its own collection, values as float32.
"""

import tempfile
from pathlib import Path

MODULE, PYTHON = "bionemo.scdl", (3, 10)
REQUIRES = ["bionemo-scdl==0.1.3", "torch"]
USES, PACKAGES = ("bionemo.scdl.io.single_cell_collection", "torch.utils.data"), ("bionemo-scdl", "torch", "numpy")
READS_ARCHIVES, ONLY_X, SAMPLINGS = True, False, ("shuffle", "sequential", "random")
VARIANTS = [
    {"label": "bionemo-scdl", "store": "bionemo-scdl", "workers": 0},
    {"label": "bionemo-scdl, 2 workers", "store": "bionemo-scdl", "workers": 2},
]


def convert(sources, store, settings):
    """Convert each file into a part, and join the parts; one file at once."""
    from bionemo.scdl.io.single_cell_collection import SingleCellCollection
    from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset

    with tempfile.TemporaryDirectory(dir=Path(store).parent) as folder:
        made = Path(folder) / "whole"
        if len(sources) == 1:
            SingleCellMemMapDataset(str(made), h5ad_path=sources[0], use_X_not_raw=settings["x"] == "X").save()
        else:
            collection = SingleCellCollection(str(Path(folder) / "parts"))
            for source in sources:
                collection.load_h5ad(source, use_X_not_raw=settings["x"] == "X")
            collection.flatten(str(made))
        made.rename(store)


class Loader:
    """A DataLoader of CSR batches, made dense on request."""

    def __init__(self, sources, store, settings):
        import torch
        from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset
        from bionemo.scdl.util.torch_dataloader_utils import collate_sparse_matrix_batch
        from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

        dataset = SingleCellMemMapDataset(store)
        generator = torch.Generator().manual_seed(settings["seed"])
        sampling = settings["sampling"]
        sampler = (
            SequentialSampler(dataset)
            if sampling == "sequential"
            else RandomSampler(dataset, replacement=sampling == "random", generator=generator)
        )
        self._is_dense = settings["output"] == "dense"
        options = {"batch_size": settings["batch_size"], "drop_last": True, "num_workers": settings["workers"]}
        self._loader = DataLoader(dataset, sampler=sampler, collate_fn=collate_sparse_matrix_batch, **options)

    def epoch(self, number):
        """Begin an epoch."""
        return (batch.to_dense() for batch in self._loader) if self._is_dense else iter(self._loader)

    def close(self):
        """Let go of the maps."""
        del self._loader
