"""AnnLoader of anndata.experimental, over backed files: what bionemo-scdl's own speed test has as its baseline.

Run by scdl_gpu/bench/serve.py, in an environment that has it. Batches come dense, as it makes them; a CSR batch is made of
a dense one, as in that speed test.
"""

import warnings

MODULE, PYTHON = "anndata", (3, 10)
REQUIRES = ["anndata<0.13", "torch"]
USES, PACKAGES = ("anndata.experimental", "torch.utils.data"), ("anndata", "torch", "numpy")
READS_ARCHIVES, ONLY_X, SAMPLINGS = False, False, ("shuffle", "sequential", "random")
VARIANTS = [{"label": "AnnLoader", "store": None}]


def backed(sources):
    """Open h5ad files, and give them with what looks like one AnnData of all rows."""
    import anndata
    from anndata.experimental import AnnCollection

    files = [anndata.read_h5ad(source, backed="r") for source in sources]
    return files, files[0] if len(files) == 1 else AnnCollection(files, join_vars="inner", join_obs=None, index_unique=None)


class Loader:
    """An AnnLoader, one seed for the order of its rows."""

    def __init__(self, sources, store, settings):
        import torch
        from anndata.experimental import AnnLoader
        from torch.utils.data import RandomSampler

        warnings.filterwarnings("ignore", category=FutureWarning)
        torch.manual_seed(settings["seed"])
        self._files, data = backed(sources)
        order = {"shuffle": settings["sampling"] == "shuffle"}
        if settings["sampling"] == "random":
            order = {"sampler": RandomSampler(range(len(data)), replacement=True)}
        self._loader = AnnLoader(data, batch_size=settings["batch_size"], drop_last=True, use_cuda=False, **order)
        self._is_dense = settings["output"] == "dense"

    def epoch(self, number):
        """Begin an epoch."""
        return (batch.X if self._is_dense else batch.X.to_sparse_csr() for batch in self._loader)

    def close(self):
        """Close the files."""
        del self._loader
        for file in self._files:
            file.file.close()
