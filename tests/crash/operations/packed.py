# ruff: noqa: D102 - the methods are described once, in operation.py
"""What a person does to packed archives: pack, unpack, convert straight into one, join.

Knows the package's API and nothing of its files; what rows are expected is in `archive`. A packed archive is looked at
through the raw one that unpacking makes of it, and by reading every check of it.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from operation import Creation, TornError
from operations.archive import FIRST, SECOND, Part, whole

from scdl_gpu.archive.commit import Staging
from scdl_gpu.archive.packed import open_packed
from scdl_gpu.convert import convert_h5ad
from scdl_gpu.pack import concat, pack, unpack

SHARD_BYTES = 60
"""A few rows of the nine: packing is killed between shards too."""


def packed_whole(path: Path, parts: list[Part], dtype: str = "float32") -> bool:
    """Tell whether there is a packed archive at `path`; raise TornError unless it is whole."""
    if not path.exists():
        return False
    for shard in open_packed(path).shards:
        shard.verify()
    folder = Path(tempfile.mkdtemp())
    try:
        unpack(path, folder / "raw", progress=False)
        if len(open_packed(path).shards) < len(parts):
            raise TornError("fewer shards than parts")
        return whole(folder / "raw", parts, dtype)
    finally:
        shutil.rmtree(folder)


class _Packing(Creation):
    """A packed archive made of something."""

    parts = (FIRST,)
    dtype = "float32"

    def state(self, directory: Path) -> str:
        return "new" if packed_whole(directory / "packed", list(self.parts), self.dtype) else "old"

    def write_next(self, directory: Path) -> None:
        """Begin a change of the archive and give it up: whoever holds the lock tidies up."""
        Staging.change(directory / "packed").discard()


class Pack(_Packing):
    """A raw archive packed."""

    def setup(self, directory: Path) -> None:
        FIRST.write(directory / "source.h5ad")
        convert_h5ad(directory / "source.h5ad", directory / "raw", data_dtype="float32", obsm=("pca",), obsp=("next_cell_ids",))

    def act(self, directory: Path) -> Any:
        pack(directory / "raw", directory / "packed", shard_bytes=SHARD_BYTES, progress=False)


class ConvertPacked(_Packing):
    """An h5ad converted straight into a packed archive."""

    def __init__(self, layout: str) -> None:
        self.layout = layout

    def setup(self, directory: Path) -> None:
        FIRST.write(directory / "source.h5ad", self.layout)

    def act(self, directory: Path) -> Any:
        convert_h5ad(directory / "source.h5ad", directory / "packed", packed=True, obsm=("pca",), obsp=("next_cell_ids",), progress=False)


class ConcatPacked(_Packing):
    """Packed archives joined into another."""

    parts = (FIRST, SECOND)

    def setup(self, directory: Path) -> None:
        for name, part in (("first", FIRST), ("second", SECOND)):
            part.write(directory / f"{name}.h5ad")
            convert_h5ad(directory / f"{name}.h5ad", directory / name, packed=True, obsm=("pca",), progress=False)

    def act(self, directory: Path) -> Any:
        concat([directory / "first", directory / "second"], directory / "packed")


class Unpack(Creation):
    """A raw archive made of a packed one."""

    def setup(self, directory: Path) -> None:
        FIRST.write(directory / "source.h5ad")
        convert_h5ad(directory / "source.h5ad", directory / "packed", packed=True, progress=False)

    def act(self, directory: Path) -> Any:
        unpack(directory / "packed", directory / "archive", progress=False)

    def state(self, directory: Path) -> str:
        return "new" if whole(directory / "archive", [FIRST]) else "old"

    def write_next(self, directory: Path) -> None:
        Staging.change(directory / "archive").discard()


OPERATIONS = {
    "pack": Pack(),
    "convert packed csr": ConvertPacked("csr"),
    "convert packed csc": ConvertPacked("csc"),
    "concat packed": ConcatPacked(),
    "unpack": Unpack(),
}
