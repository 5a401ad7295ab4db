"""A LightningDataModule over archives: a loader for each stage and rank, and its place in checkpoints.

Knows Lightning's hooks, not how batches are made. Lightning takes GPUBatchLoader as it is, saves its state and goes on within an
epoch by itself; what it does not know is which epoch a loader is to begin where a checkpoint lies between two. It counts
steps, so that an epoch is gone on with by as many rows a step only. Lightning is imported here, and nowhere else.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray

from scdl_gpu.batch import Batch
from scdl_gpu.loader import GPUBatchLoader, Source
from scdl_gpu.shards import Shards

STAGES = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}
"""The loaders of each stage of Lightning."""
OF_THE_DEVICE = ("device", "placement", "windows", "memory_budget", "host_budget")
"""Options that say where rows lie, not what they are."""
Rows = Source | Sequence[Source]


class EpochLoader(GPUBatchLoader):
    """A loader that begins the epoch which `trainer` is in, or goes on within it.

    A checkpoint of the end of an epoch has the loader at that end, and Lightning restores it or not, depending on who saved; the
    trainer's epoch is right by the time that the first batch is asked for, not when the loader is.
    """

    trainer: Any = None

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of the trainer's epoch."""
        if self.trainer is not None:
            self.set_epoch(self.trainer.current_epoch)
        yield from super().__iter__()


class GPUBatchDataModule(LightningDataModule):
    """Batches of GPUBatchLoader for a Lightning Trainer.

    train, val, test, predict: what GPUBatchLoader takes: a dataset, the path of an archive, or a list of either. options: as of
    GPUBatchLoader, for all of them; but only `train` is shuffled. All must have the same genes, unless `var` names those to keep,
    and columns of `obs` the same categories.

    Loaders are made in `setup`, when the processes know each other: each has its share of the rows, on its own device. Leave
    use_distributed_sampler as it is: it concerns torch's DataLoader. A checkpoint taken within an epoch is resumed at the very
    batch; with another batch size or number of devices it raises ValueError, for Lightning counts batches, not rows. Between
    epochs both may change.
    """

    def __init__(
        self,
        train: Rows | None = None,
        batch_size: int = 1024,
        *,
        val: Rows | None = None,
        test: Rows | None = None,
        predict: Rows | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self._sources = {"train": train, "val": val, "test": test, "predict": predict}
        self._batch_size, self._options = batch_size, options
        self._loaders: dict[str, GPUBatchLoader] = {}

    @property
    def shape(self) -> tuple[int, int]:
        """Rows of the training data, or else of the first there is, and columns of a batch; known before `setup`."""
        return self._described[0]

    @property
    def categories(self) -> dict[str, NDArray[Any]]:
        """What the codes of each coded obs column stand for; known before `setup`."""
        return self._described[1]

    @cached_property
    def _described(self) -> tuple[tuple[int, int], dict[str, NDArray[Any]]]:
        source = next((source for source in self._sources.values() if source is not None), None)
        if source is None:
            raise ValueError("no dataset was given; name one for train, val, test or predict")
        kept = {name: value for name, value in self._options.items() if name not in OF_THE_DEVICE}
        if not {"sampler", "batch_sampler"} & kept.keys():
            kept |= {"rank": 0, "world_size": 1}  # nothing is read, so it may say that rows stream where ranks must be told to
        with GPUBatchLoader(source, self._batch_size, device="cpu", **kept) as loader:
            return loader.shape, loader.categories

    def setup(self, stage: str) -> None:
        """Make the loaders of a stage, for this process."""
        for name in STAGES[stage]:
            source = self._sources[name]
            if source is None or name in self._loaders:
                continue
            where: dict[str, Any] = {}
            if self.trainer is not None:
                rank, world_size = self.trainer.global_rank, self.trainer.world_size
                where = {"device": self.trainer.strategy.root_device, "rank": rank, "world_size": world_size}
            options = where | self._options | ({} if name == "train" else {"shuffle": False, "drop_last": False})
            self._loaders[name] = loader = EpochLoader(source, self._batch_size, **options)
            loader.trainer = self.trainer if name == "train" else None
            self._check_alike(name)

    def _check_alike(self, name: str) -> None:
        """Raise ValueError where a column of batches would be another gene, or a code another category, than in training."""
        train = self._loaders.get("train")
        if train is not None and "var" not in self._options:
            Shards((*train._shards.archives, *self._loaders[name]._shards.archives))
        for column, found in self._loaders[name].categories.items():
            if not np.array_equal(found, self.categories[column]):
                here, elsewhere = found[:8].tolist(), self.categories[column][:8].tolist()
                raise ValueError(
                    f"obs column {column!r} has categories {here} in {name}, {elsewhere} elsewhere: a code would mean two things; "
                    f"give the column of both sources the same categories, and convert them anew"
                )

    def train_dataloader(self) -> GPUBatchLoader:
        """Return the loader of this rank; it follows the trainer's epoch."""
        return self._loader("train")

    def val_dataloader(self) -> GPUBatchLoader | list[GPUBatchLoader]:
        """Return the loader of this rank; an empty list, which lets Lightning train without validation, where there is no `val`."""
        return self._loader("val") if self._sources["val"] is not None else []

    def test_dataloader(self) -> GPUBatchLoader:
        """Return the loader of this rank."""
        return self._loader("test")

    def predict_dataloader(self) -> GPUBatchLoader:
        """Return the loader of this rank."""
        return self._loader("predict")

    def _loader(self, name: str) -> GPUBatchLoader:
        if self._sources[name] is None:
            raise ValueError(f"no dataset was given for {name}: GPUBatchDataModule(..., {name}=...)")
        return self._loaders[name]

    def state_dict(self) -> dict[str, Any]:
        """Return what tells whether the epoch can be gone on with: rows of a step, and how far it is."""
        if "train" not in self._loaders:
            return {}
        state = self._loaders["train"].state_dict()
        return {"step_rows": self._step_rows, "position": state["position"], "n_rows": state["n_rows"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise ValueError where an epoch was left within, and steps have another number of rows now."""
        is_within = 0 < state_dict["position"] < state_dict["n_rows"]
        if "train" in self._loaders and is_within and state_dict["step_rows"] != self._step_rows:
            raise ValueError(
                f"the checkpoint was taken within an epoch, of steps of {state_dict['step_rows']} rows over all devices, they have "
                f"{self._step_rows} now: choose batch_size and devices so that it is the same, or a checkpoint of the end of an epoch"
            )

    @property
    def _step_rows(self) -> int:
        world_size = 1 if self.trainer is None else int(self.trainer.world_size)
        return self._batch_size * world_size

    def teardown(self, stage: str) -> None:
        """Close the loaders of a stage."""
        for name in STAGES[stage]:
            if name in self._loaders:
                self._loaders.pop(name).close()
