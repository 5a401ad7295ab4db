# ruff: noqa: D102 - the methods are described once, in operation.py
"""Operations on `Staging` with small made-up directories, and some that are torn on purpose.

Knows names and bytes, not archives. The state of a directory is compared whole, every name and byte of it.
"""

import mmap
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from operation import Creation, Operation, TornError

from scdl_gpu.archive.commit import Staging

OLD = {"header": b"old", "big": b"\x01" * 5000, "tables/a": b"aaaa", "tables/b": b"bb", "kept": b"k" * 300, "deep/er/one": b"1"}
NEW = {"header": b"new", "big": b"\x02" * 7000, "tables/c": b"ccc", "kept": b"k" * 300, "deep/er/one": b"1"}


def write(directory: Path, files: dict[str, bytes]) -> None:
    """Write files by name, in several pieces each."""
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb", buffering=1024) as file:
            for start in range(0, len(content), 2000):
                file.write(content[start : start + 2000])
                file.flush()


def read(directory: Path) -> dict[str, bytes]:
    """Return every file below a directory by its name."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def known(directory: Path) -> str:
    """Return which of the two states a directory holds; raises TornError where it is neither."""
    if not directory.exists():
        return "absent"
    found = read(directory)
    if found == OLD:
        return "old"
    if found == NEW:
        return "new"
    raise TornError(
        f"{directory} holds {sorted(found)}, {[name for name in found if found[name] not in (OLD.get(name), NEW.get(name))]} differ"
    )


class Create(Creation):
    """A new directory, by staging."""

    def act(self, directory: Path) -> None:
        with Staging.create(directory / "archive") as staging:
            write(staging.directory, NEW)

    def state(self, directory: Path) -> str:
        return {"absent": "old", "new": "new"}[known(directory / "archive")]


class CreateBelowNew(Create):
    """A new directory in parents that are not there yet."""

    def act(self, directory: Path) -> None:
        with Staging.create(directory / "not" / "yet" / "archive") as staging:
            write(staging.directory, NEW)

    def state(self, directory: Path) -> str:
        return {"absent": "old", "new": "new"}[known(directory / "not" / "yet" / "archive")]


class Change(Operation):
    """A directory changed by staging: files replaced, added, removed and kept."""

    name = "archive"

    def setup(self, directory: Path) -> None:
        write(directory / self.name, OLD)

    def act(self, directory: Path) -> None:
        with Staging.change(directory / self.name, replaced=("header", "big", "tables")) as staging:
            write(staging.directory, {name: content for name, content in NEW.items() if name not in ("kept", "deep/er/one")})

    def state(self, directory: Path) -> str:
        return known(directory / self.name)

    def open(self, directory: Path) -> dict[str, Any]:
        maps = {}
        for name in OLD:
            with (directory / self.name / name).open("rb") as file:
                maps[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return maps

    def check_reader(self, reader: dict[str, Any]) -> None:
        for name, mapped in reader.items():
            if mapped[:] != OLD[name]:
                raise TornError(f"{name}, mapped before, reads otherwise now")


class ChangeOddName(Change):
    """A change of a directory whose name means something to a shell."""

    name = "[a]*? b"


class WriteInPlace(Change):
    """What staging is for avoiding: files of a directory written over one by one."""

    def act(self, directory: Path) -> None:
        shutil.rmtree(directory / self.name / "tables")
        write(directory / self.name, NEW)

    def again(self, directory: Path, state: str) -> None:
        pass


class RenameUnsynced(Creation):
    """A whole directory renamed into place, its files not synced before."""

    def act(self, directory: Path) -> None:
        shutil.rmtree(directory / "hidden", ignore_errors=True)
        if (directory / "archive").exists():
            raise FileExistsError(directory)
        write(directory / "hidden", NEW)
        (directory / "hidden").rename(directory / "archive")

    def state(self, directory: Path) -> str:
        return {"absent": "old", "new": "new"}[known(directory / "archive")]


class IgnoreShortWrites(Creation):
    """A writer that believes that every write takes all it is given."""

    def act(self, directory: Path) -> None:
        fd = os.open(directory / "archive", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.write(fd, b"x" * 1000)
        os.close(fd)

    def state(self, directory: Path) -> str:
        file = directory / "archive"
        return "new" if file.exists() and file.stat().st_size == 1000 else "old"


class EveryRoute(Creation):
    """One file per way of writing that this project's dependencies use."""

    def act(self, directory: Path) -> None:
        import h5py
        import pyarrow as pa
        import pyarrow.parquet as pq

        array = np.arange(1000)
        (directory / "path.write_bytes").write_bytes(b"x")
        array.tofile(directory / "ndarray.tofile")
        np.save(directory / "np.save.npy", array)
        mapped = np.memmap(directory / "np.memmap", dtype=np.int64, mode="w+", shape=10)
        mapped.flush()
        pq.write_table(pa.table({"a": array}), directory / "parquet")
        shutil.copyfile(directory / "parquet", directory / "shutil.copyfile")
        with h5py.File(directory / "h5py", "w") as file:
            file["a"] = array
        os.posix_fallocate(fd := os.open(directory / "fallocate", os.O_RDWR | os.O_CREAT), 0, 10)
        os.close(fd)
        os.truncate(directory / "fallocate", 5)
        os.link(directory / "fallocate", directory / "linked")
        (directory / "symlinked").symlink_to("fallocate")
        (directory / "linked").replace(directory / "renamed")
        (directory / "symlinked").unlink()
        (directory / "made").mkdir()
        (directory / "made").rmdir()

    def state(self, directory: Path) -> str:
        return "new"


OPERATIONS: dict[str, Operation] = {
    "staging create": Create(),
    "staging create below new parents": CreateBelowNew(),
    "staging change": Change(),
    "staging change odd name": ChangeOddName(),
    "torn: in place": WriteInPlace(),
    "torn: unsynced": RenameUnsynced(),
    "torn: short writes": IgnoreShortWrites(),
    "every route": EveryRoute(),
}
