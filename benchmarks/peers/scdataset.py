"""scDataset: blocks of 1, 16 or 64 rows in random order, fetched 16,384 rows at once, over backed AnnData and over a bionemo-scdl archive.

Run by scdl_gpu/bench/serve.py, in an environment that has it. Several h5ad files are one AnnCollection, as its documentation has Tahoe's
plates. A fetch gives a CSR matrix of which batches are rows; they are made dense, on request, batch by batch.
"""

from importlib import metadata
from pathlib import Path

MODULE, PYTHON = "scdataset", (3, 10)
REQUIRES = ["scDataset==0.3.0", "bionemo-scdl==0.1.3", "anndata", "torch"]
READS_ARCHIVES = False
WINDOW = 16_384
VARIANTS = [
    {"label": f"scDataset over {over}, block {block}", "store": store, "over": over, "block": block}
    for over, store in (("AnnData", None), ("SCDL", "bionemo-scdl"))
    for block in (1, 16, 64)
]


def facts():
    """Import what is used, and give the versions."""
    import anndata.experimental  # noqa: F401
    import bionemo.scdl.io.single_cell_memmap_dataset  # noqa: F401
    import scdataset  # noqa: F401

    return {"versions": {name: metadata.version(name) for name in ("scDataset", "bionemo-scdl", "anndata", "torch", "numpy")}}


def convert(sources, store, settings):
    """Make the archive as the peer bionemo-scdl does."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("bionemo_scdl_peer", Path(__file__).with_name("bionemo-scdl.py"))
    peer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peer)
    peer.convert(sources, store, settings)


def open(sources, store, settings):
    """Open the files or the archive, and make the loader."""
    return Loader(sources, store, settings)


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


class Loader:
    """An scDataset in a DataLoader without workers."""

    def __init__(self, sources, store, settings):
        from scdataset import BlockShuffling, Streaming, scDataset
        from torch.utils.data import DataLoader

        if settings["sampling"] == "random":
            raise ValueError("scDataset has no rows with replacement of equal weight")
        self._files = []
        data, fetch = (
            (self._collection(sources), _rows_of_adata) if settings["over"] == "AnnData" else (self._archive(store), _rows_of_archive)
        )
        strategy = Streaming() if settings["sampling"] == "sequential" else BlockShuffling(block_size=settings["block"])
        self._is_dense, factor = settings["output"] == "dense", max(1, WINDOW // settings["batch_size"])
        options = {"batch_size": settings["batch_size"], "fetch_factor": factor, "drop_last": True, "seed": settings["seed"]}
        transform = {"batch_transform": lambda x: x.toarray()} if self._is_dense else {}
        self._loader = DataLoader(scDataset(data, strategy, fetch_callback=fetch, **options, **transform), batch_size=None, num_workers=0)

    def _collection(self, sources):
        import anndata
        from anndata.experimental import AnnCollection

        self._files = [anndata.read_h5ad(source, backed="r") for source in sources]
        return self._files[0] if len(sources) == 1 else AnnCollection(self._files, join_vars="inner", join_obs=None, index_unique=None)

    def _archive(self, store):
        from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset

        return SingleCellMemMapDataset(store)

    def epoch(self, number):
        """Begin an epoch; it counts them itself."""
        return iter(self._loader)

    def n_cells(self, batch):
        """Count rows."""
        return batch.shape[0]

    def rows(self, batch):
        """Give what the batch holds."""
        if self._is_dense:
            return batch
        return batch.indptr, batch.indices, batch.data

    def close(self):
        """Close the files."""
        del self._loader
        for file in self._files:
            file.file.close()
