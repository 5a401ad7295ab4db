"""scDataset: blocks of 1, 16 or 64 rows in random order, fetched 16,384 rows at once, over backed AnnData and over a bionemo-scdl archive.

Run by scdl_gpu/bench/serve.py, in an environment that has it. Several h5ad files are one AnnCollection, as its documentation has Tahoe's
plates. A fetch gives a CSR matrix of which batches are rows; they are made dense, on request, batch by batch.
"""

import importlib.util
from pathlib import Path

MODULE, PYTHON = "scdataset", (3, 10)
REQUIRES = ["scDataset==0.3.0", "bionemo-scdl==0.1.3", "anndata", "torch"]
USES = ("anndata.experimental", "bionemo.scdl.io.single_cell_memmap_dataset", "scdataset")
PACKAGES = ("scDataset", "bionemo-scdl", "anndata", "torch", "numpy")
READS_ARCHIVES, ONLY_X, SAMPLINGS = False, False, ("shuffle", "sequential")
WINDOW = 16_384
VARIANTS = [
    {"label": f"scDataset over {over}, block {block}", "store": store, "over": over, "block": block}
    for over, store in (("AnnData", None), ("SCDL", "bionemo-scdl"))
    for block in (1, 16, 64)
]


def convert(sources, store, settings):
    """Make the archive as the peer bionemo-scdl does."""
    _beside("bionemo-scdl").convert(sources, store, settings)


def _beside(name):
    """Import the script of another peer by its path: by name it would shadow what it imports."""
    spec = importlib.util.spec_from_file_location(f"peer_{name}", Path(__file__).with_name(f"{name}.py"))
    peer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peer)
    return peer


def _rows_of_adata(collection, rows):
    x = collection[rows].X
    return x if hasattr(x, "indptr") else x.tocsr()


def _rows_of_archive(dataset, rows):
    import numpy as np
    from scipy.sparse import csr_matrix

    found = [dataset.get_row(int(row))[0] for row in rows]
    indptr = np.concatenate([[0], np.cumsum([values.size for values, _ in found])])
    values, columns = (np.concatenate([row[part] for row in found]) for part in (0, 1))
    return csr_matrix((values, columns.astype(np.int32), indptr), shape=(len(found), dataset.number_of_variables()[0]))


def _archive(store):
    from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset

    return SingleCellMemMapDataset(store)


class Loader:
    """An scDataset in a DataLoader without workers."""

    def __init__(self, sources, store, settings):
        from scdataset import BlockShuffling, Streaming, scDataset
        from torch.utils.data import DataLoader

        self._files = []
        if settings["over"] == "AnnData":
            (self._files, data), fetch = _beside("annloader").backed(sources), _rows_of_adata
        else:
            data, fetch = _archive(store), _rows_of_archive
        strategy = Streaming() if settings["sampling"] == "sequential" else BlockShuffling(block_size=settings["block"])
        self._is_dense, factor = settings["output"] == "dense", max(1, WINDOW // settings["batch_size"])
        options = {"batch_size": settings["batch_size"], "fetch_factor": factor, "drop_last": True, "seed": settings["seed"]}
        transform = {"batch_transform": lambda x: x.toarray()} if self._is_dense else {}
        self._loader = DataLoader(scDataset(data, strategy, fetch_callback=fetch, **options, **transform), batch_size=None, num_workers=0)

    def epoch(self, number):
        """Begin an epoch; it counts them itself."""
        return iter(self._loader)

    def close(self):
        """Close the files."""
        del self._loader
        for file in self._files:
            file.file.close()
