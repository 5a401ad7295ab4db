"""AnnLoader of anndata.experimental, over backed files: what bionemo-scdl's own speed test has as its baseline.

Run by scdl_gpu/bench/serve.py, in an environment that has it. Batches come dense, as it makes them; a CSR batch is made of
a dense one, as in that speed test.
"""

import warnings
from importlib import metadata

MODULE, PYTHON = "anndata", (3, 10)
REQUIRES = ["anndata<0.13", "torch"]
READS_ARCHIVES = False
VARIANTS = [{"label": "AnnLoader", "store": None}]


def facts():
    """Import what is used, and give the versions."""
    import anndata.experimental  # noqa: F401
    import torch.utils.data  # noqa: F401

    return {"versions": {name: metadata.version(name) for name in ("anndata", "torch", "numpy")}}


def open(sources, store, settings):
    """Open the files, and make the loader."""
    return Loader(sources, settings)


class Loader:
    """An AnnLoader, one seed for the order of its rows."""

    def __init__(self, sources, settings):
        import anndata
        import torch
        from anndata.experimental import AnnCollection, AnnLoader
        from torch.utils.data import RandomSampler

        warnings.filterwarnings("ignore", category=FutureWarning)
        torch.manual_seed(settings["seed"])
        self._files = [anndata.read_h5ad(source, backed="r") for source in sources]
        data = self._files[0] if len(sources) == 1 else AnnCollection(self._files, join_vars="inner", join_obs=None, index_unique=None)
        order = {"shuffle": settings["sampling"] == "shuffle"}
        if settings["sampling"] == "random":
            order = {"sampler": RandomSampler(range(len(data)), replacement=True)}
        self._loader = AnnLoader(data, batch_size=settings["batch_size"], drop_last=True, use_cuda=False, **order)
        self._is_dense = settings["output"] == "dense"

    def epoch(self, number):
        """Begin an epoch."""
        return (batch.X if self._is_dense else batch.X.to_sparse_csr() for batch in self._loader)

    def n_cells(self, batch):
        """Count rows."""
        return batch.shape[0]

    def rows(self, batch):
        """Give what the batch holds."""
        if self._is_dense:
            return batch.numpy()
        return batch.crow_indices().numpy(), batch.col_indices().numpy(), batch.values().numpy()

    def close(self):
        """Close the files."""
        del self._loader
        for file in self._files:
            file.file.close()
