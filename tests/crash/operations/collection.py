# ruff: noqa: D102 - the methods are described once, in operation.py
"""What a person does to collections: load files into them, and make one archive of them.

Knows the package's API and nothing of its files; what rows are expected is in `archive`.
"""

from pathlib import Path
from typing import Any

from operation import Creation, Operation, TornError
from operations.archive import FIRST, SECOND, THIRD, check, whole

from scdl_gpu.archive.commit import Staging
from scdl_gpu.collection import SingleCellCollection
from scdl_gpu.dataset import SingleCellMemMapDataset

PARTS = {"first": FIRST, "second": SECOND, "third": THIRD}


def write_sources(directory: Path) -> None:
    """Write the sources of all parts, to be loaded in the order of their names."""
    (directory / "sources").mkdir()
    for name, part in PARTS.items():
        part.write(directory / "sources" / f"{name}.h5ad")


class LoadOne(Operation):
    """One more file loaded into a collection."""

    def setup(self, directory: Path) -> None:
        write_sources(directory)
        SingleCellCollection(directory / "collection").load_h5ad(directory / "sources" / "first.h5ad", use_X_not_raw=True)

    def act(self, directory: Path) -> Any:
        collection = SingleCellCollection(directory / "collection")
        collection.load_h5ad(directory / "sources" / "second.h5ad", use_X_not_raw=True)
        return collection

    def state(self, directory: Path) -> str:
        archives = SingleCellCollection(directory / "collection").fname_to_mmap
        for path, dataset in archives.items():
            check(dataset, [PARTS[path.stem]])
        return "new" if len(archives) > 1 else "old"

    def open(self, directory: Path) -> Any:
        return SingleCellCollection(directory / "collection")

    def check_reader(self, reader: Any) -> None:
        [dataset] = reader.fname_to_mmap.values()
        check(dataset, [FIRST])

    def again(self, directory: Path, state: str) -> None:
        if state == "old":
            self.act(directory)
        else:
            SingleCellCollection(directory / "collection")
        if self.state(directory) != "new":
            raise TornError("run once more, the second file is not there")


class LoadMany(Operation):
    """A directory of files loaded into a new collection."""

    def setup(self, directory: Path) -> None:
        write_sources(directory)

    def act(self, directory: Path) -> Any:
        collection = SingleCellCollection(directory / "collection")
        if not collection.fname_to_mmap:
            collection.load_h5ad_multi(directory / "sources", max_workers=2, use_X_not_raw=True)
        return collection

    def state(self, directory: Path) -> str:
        present = {name: whole(directory / "collection" / name, [part]) for name, part in PARTS.items()}
        return "new" if all(present.values()) else "old"

    def again(self, directory: Path, state: str) -> None:
        collection = SingleCellCollection(directory / "collection")
        for name in PARTS:
            if directory / "collection" / name not in collection.fname_to_mmap:
                collection.load_h5ad(directory / "sources" / f"{name}.h5ad", use_X_not_raw=True)
        if self.state(directory) != "new":
            raise TornError("the files that were left could not be loaded")


class Flatten(Creation):
    """One archive made of a collection."""

    destroy = False

    def setup(self, directory: Path) -> None:
        write_sources(directory)
        SingleCellCollection(directory / "collection").load_h5ad_multi(directory / "sources", max_workers=1, use_X_not_raw=True)

    def act(self, directory: Path) -> Any:
        SingleCellCollection(directory / "collection").flatten(directory / "flat", destroy_on_copy=self.destroy)

    def state(self, directory: Path) -> str:
        present = [whole(directory / "collection" / name, [part]) for name, part in PARTS.items()]
        if whole(directory / "flat", [FIRST, SECOND, THIRD]):
            if not (all(present) or self.destroy):
                raise TornError(f"of the collection only {present} are there")
            return "new"
        if not all(present):
            raise TornError(f"the result is not there, and of the collection only {present}")
        return "old"

    def write_next(self, directory: Path) -> None:
        SingleCellMemMapDataset(directory / "flat").save()


class FlattenDestroying(Flatten):
    """One archive made of a collection, which is removed."""

    destroy = True

    def again(self, directory: Path, state: str) -> None:
        if state == "old":
            super().again(directory, state)
            return
        self.write_next(directory)
        if (directory / "collection").exists():
            for path, dataset in SingleCellCollection(directory / "collection").fname_to_mmap.items():
                check(dataset, [PARTS[path.stem]])
        else:
            Staging.create(directory / "collection").discard()


OPERATIONS: dict[str, Operation] = {
    "collection load": LoadOne(),
    "collection load many": LoadMany(),
    "flatten": Flatten(),
    "flatten destroying": FlattenDestroying(),
}
