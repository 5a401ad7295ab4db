"""SLAF: its SLAFDataLoader in raw mode, by the mixture of scanners that is its default, and sequentially, which it calls fastest.

Run by scdl_gpu/bench/serve.py, in an environment that has it. It gives (cell, gene, value) triples as a polars frame; they are made a CSR
matrix, as the others' batches are. Batches are not of constant size; cells are counted as they come.
"""

import warnings
from functools import partial

MODULE, PYTHON = "slaf", (3, 10)
REQUIRES = ["slafdb==0.5.2", "boto3==1.43.117", "aiobotocore==3.10.0", "psutil", "torch"]  # two that agree: pip tries them all otherwise
USES, PACKAGES = ("slaf.ml.dataloaders",), ("slafdb", "pylance", "polars", "torch", "numpy")
READS_ARCHIVES, ONLY_X, SAMPLINGS = False, True, ("shuffle", "sequential")
VARIANTS = [
    {"label": "SLAF, mixture of scanners", "store": "slaf", "mixture": True},
    {"label": "SLAF, sequential", "store": "slaf", "mixture": False},
]


def convert(sources, store, settings):
    """Convert all files into one dataset, by the converter's defaults."""
    from slaf.data import SLAFConverter

    SLAFConverter().convert(sources[0] if len(sources) == 1 else list(sources), store)


class Loader:
    """A SLAFDataLoader for each epoch."""

    def __init__(self, sources, store, settings):
        from slaf import SLAFArray
        from slaf.ml.dataloaders import SLAFDataLoader

        warnings.filterwarnings("ignore")
        self._array = SLAFArray(store)
        self._n_genes, self._is_dense = self._array.shape[1], settings["output"] == "dense"
        mixture = settings["mixture"] and settings["sampling"] == "shuffle"
        how = {"use_mixture_of_scanners": mixture, "by_fragment": mixture, "batches_per_chunk": 1 if mixture else 50}
        self._make = partial(SLAFDataLoader, self._array, batch_size=settings["batch_size"], raw_mode=True, verbose=False, **how)
        self._loader = self._make()

    def epoch(self, number):
        """Begin an epoch; all but the first by a loader of their own, which starts its threads anew."""
        self._loader = self._loader if number == 0 else self._make()
        return (self._matrix(batch) for batch in self._loader)

    def _matrix(self, batch):
        import numpy as np
        from scipy.sparse import csr_matrix

        cells, genes, values = (batch["x"][name].to_numpy() for name in ("cell_integer_id", "gene_integer_id", "value"))
        which, rows = np.unique(cells, return_inverse=True)
        x = csr_matrix((values.astype(np.float32), (rows, genes.astype(np.int32))), shape=(which.size, self._n_genes))
        return x.toarray() if self._is_dense else x

    def close(self):
        """Stop its threads."""
        self._loader.__del__()
        del self._loader, self._make, self._array
