"""annbatch: its shuffled zarr store, read by zarrs in chunks of 64 or of 512 rows, a window of 16,384 rows.

Run by scdl_gpu/bench/serve.py, in an environment that has it. The store is made as it advises, shuffled once and for all. Neither obs nor
anything else but X is read. Without torch in its environment it gives SciPy matrices, which spares it the way to torch.
"""

from importlib.util import find_spec

MODULE, PYTHON = "annbatch", (3, 12)
REQUIRES = ["annbatch[zarrs]==0.3.1"]
READS_ARCHIVES, ONLY_X, SAMPLINGS = False, True, ("shuffle", "sequential")
WINDOW = 16_384
VARIANTS = [{"label": f"annbatch, chunk {chunk}", "store": "annbatch.zarr", "chunk": chunk} for chunk in (64, 512)]
USES, PACKAGES = ("annbatch",), ("annbatch", "zarr", "zarrs", "anndata", "numpy", "scipy", "torch")


def _with_zarrs():
    import zarr

    if find_spec("zarrs"):
        zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})


def convert(sources, store, settings):
    """Make the store, of X."""
    from annbatch import DatasetCollection

    _with_zarrs()
    DatasetCollection(store).add_adatas(list(sources))


class Loader:
    """annbatch's Loader, batches made dense on request."""

    def __init__(self, sources, store, settings):
        import anndata
        from annbatch import DatasetCollection
        from annbatch import Loader as Batches

        def without_obs(group):
            return anndata.AnnData(X=anndata.io.sparse_dataset(group["X"]))

        _with_zarrs()
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

    def close(self):
        """Let go of the store."""
        del self._loader
