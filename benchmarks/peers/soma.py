"""TileDB-SOMA-ML: a shuffled ExperimentDataset over an experiment whose tiles are as its documentation tunes them, 64 cells x 8,192 genes.

Run by scdl_gpu/bench/serve.py, in an environment that has it. Shuffle chunks are of 64 rows, as tiles; what is fetched at once is
16,384 rows. Without worker processes, with which it gives no sparse batches.
"""


MODULE, PYTHON = "tiledbsoma_ml", (3, 10)
REQUIRES = ["tiledbsoma-ml==0.1.0", "torch"]
USES, PACKAGES = ("tiledbsoma.io", "tiledbsoma_ml"), ("tiledbsoma-ml", "tiledbsoma", "torch", "numpy")
READS_ARCHIVES, ONLY_X, SAMPLINGS = False, True, ("shuffle", "sequential")
WINDOW, CHUNK = 16_384, 64
VARIANTS = [{"label": "TileDB-SOMA-ML", "store": "soma"}]
DIMENSIONS = {"soma_dim_0": {"tile": CHUNK, "filters": [{"_type": "ZstdFilter", "level": 3}]}, "soma_dim_1": {"tile": 8_192}}


def convert(sources, store, settings):
    """Register all files, and write one after the other."""
    import tiledbsoma.io

    how = {"platform_config": {"tiledb": {"create": {"dims": DIMENSIONS}}}}
    mapping = tiledbsoma.io.register_h5ads(None, sources, measurement_name="RNA", obs_field_name="obs_id", var_field_name="var_id")
    tiledbsoma.io.from_h5ad(store, sources[0], "RNA", ingest_mode="schema_only", **how)
    mapping.prepare_experiment(store)
    for source in sources:
        tiledbsoma.io.from_h5ad(store, source, "RNA", registration_mapping=mapping, **how)


class Loader:
    """An experiment_dataloader; what is asked for dense it makes dense itself."""

    def __init__(self, sources, store, settings):
        import tiledbsoma
        from tiledbsoma_ml import ExperimentDataset, experiment_dataloader

        self._experiment = tiledbsoma.Experiment.open(store)
        query = self._experiment.axis_query(measurement_name="RNA")
        self._is_dense, self._batch_size = settings["output"] == "dense", settings["batch_size"]
        sizes = {"batch_size": self._batch_size, "io_batch_size": WINDOW, "shuffle_chunk_size": CHUNK, "seed": settings["seed"]}
        shuffle = settings["sampling"] == "shuffle"
        self._dataset = ExperimentDataset(query, layer_name="data", shuffle=shuffle, return_sparse_X=not self._is_dense, **sizes)
        self._loader = experiment_dataloader(self._dataset)

    def epoch(self, number):
        """Begin an epoch."""
        self._dataset.set_epoch(number)
        return (x for x, obs in self._loader)

    def close(self):
        """Close the experiment."""
        del self._loader, self._dataset
        self._experiment.close()
