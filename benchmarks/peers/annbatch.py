"""annbatch: its shuffled zarr store, read by zarrs in chunks of 64 or of 512 rows, a window of 16,384 rows.

Run by scdl_gpu/bench/serve.py, in an environment that has it. The store is made as it advises, shuffled once and for all. Neither obs nor
anything else but X is read. Without torch in its environment it gives SciPy matrices, which spares it the way to torch.
"""

from importlib import metadata
from importlib.util import find_spec

MODULE, PYTHON = "annbatch", (3, 12)
REQUIRES = ["annbatch[zarrs]==0.3.1"]
READS_ARCHIVES = False
WINDOW = 16_384
VARIANTS = [{"label": f"annbatch, chunk {chunk}", "store": "annbatch.zarr", "chunk": chunk} for chunk in (64, 512)]
PACKAGES = ("annbatch", "zarr", "zarrs", "anndata", "numpy", "scipy", "torch")


def facts():
    """Import what is used, and give the versions."""
    import annbatch  # noqa: F401

    return {"versions": {name: metadata.version(name) for name in PACKAGES if find_spec(name)}}


def _with_zarrs():
    import zarr

    if find_spec("zarrs"):
        zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})


def convert(sources, store, settings):
    """Make the store, of X."""
    from annbatch import DatasetCollection

    if settings.get("x", "X") != "X":
        raise ValueError("annbatch is measured on X: give --use-X-not-raw")
    _with_zarrs()
    DatasetCollection(store).add_adatas(list(sources))


def open(sources, store, settings):
    """Open the store, and make the loader."""
    return Loader(store, settings)


class Loader:
    """annbatch's Loader, batches made dense on request."""

    def __init__(self, store, settings):
        import anndata
        from annbatch import DatasetCollection
        from annbatch import Loader as Batches

        def without_obs(group):
            return anndata.AnnData(X=anndata.io.sparse_dataset(group["X"]))

        _with_zarrs()
        if settings.get("sampling", "shuffle") == "random":
            raise ValueError("annbatch draws no rows with replacement row by row")
        sizes = {"chunk_size": settings["chunk"], "preload_nchunks": WINDOW // settings["chunk"], "batch_size": settings["batch_size"]}
        to = "torch" if find_spec("torch") else None
        shuffle = settings.get("sampling", "shuffle") == "shuffle"
        loader = Batches(**sizes, shuffle=shuffle, drop_last=True, preload_to_gpu=False, to=to)
        how = {} if settings.get("obs") else {"load_adata": without_obs}
        self._loader, self._is_dense = loader.use_collection(DatasetCollection(store), **how), settings["output"] == "dense"

    def epoch(self, number):
        """Begin an epoch."""
        for batch in self._loader:
            x = batch["X"]
            yield x if not self._is_dense else x.to_dense() if hasattr(x, "to_dense") else x.toarray()

    def n_cells(self, x):
        """Count rows."""
        return x.shape[0]

    def rows(self, x):
        """Give what the batch holds."""
        if self._is_dense:
            return x
        if hasattr(x, "crow_indices"):
            return x.crow_indices().numpy(), x.col_indices().numpy(), x.values().numpy()
        return x.indptr, x.indices, x.data

    def close(self):
        """Let go of the store."""
        del self._loader
