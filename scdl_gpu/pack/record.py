"""How far packing has come, in a small file beside the shards that are finished, so that a crash costs one shard.

Knows names, hashes and counts of shards, not rows. The file is exchanged whole, after the shard is durable: what it lists
can be gone on with, where it was begun for the same source, unchanged, with the same options.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scdl_gpu.archive.packed_shard import PackedShard
from scdl_gpu.archive.packed_writer import ShardRecord
from scdl_gpu.errors import ArchiveError
from scdl_gpu.pack.canonical import Mended

NAME = "packing.json"
VERSION = 1


@dataclass
class Record:
    """What is done. what: source and options, as JSON has them; shards: what metadata.json will say of each finished one."""

    directory: Path
    what: dict[str, Any]
    shards: list[dict[str, Any]] = field(default_factory=list)
    mended: Mended = field(default_factory=Mended)

    @property
    def n_rows(self) -> int:
        """Rows of the finished shards."""
        return sum(shard["rows"] for shard in self.shards)

    def add(self, shard: ShardRecord, mended: Mended) -> None:
        """List one more finished shard, durably. mended: what was not canonical up to its end."""
        self.shards.append(shard.as_json())
        self.mended = mended
        text = {"version": VERSION, "what": self.what, "shards": self.shards, "mended": asdict(mended)}
        new = self.directory / f"{NAME}.new"
        with new.open("w") as stream:
            json.dump(text, stream)
            stream.flush()
            os.fsync(stream.fileno())
        new.replace(self.directory / NAME)

    def finished(self) -> list[PackedShard]:
        """Open the finished shards."""
        return [PackedShard.open(self.directory, shard["name"]) for shard in self.shards]

    def remove(self) -> None:
        """Remove the file: the archive is complete."""
        (self.directory / NAME).unlink(missing_ok=True)


def resumed(directory: Path, what: dict[str, Any]) -> Record | None:
    """Return the record in `directory` of packing the same, its shards whole; None where there is none, or it is of something else."""
    try:
        text = json.loads((directory / NAME).read_bytes())
        if text["version"] != VERSION or text["what"] != json.loads(json.dumps(what)):
            return None
        record = Record(directory, what, text["shards"], Mended(**text["mended"]))
        if all(shard.digest == told["hash"] for shard, told in zip(record.finished(), record.shards, strict=True)):
            return record
    except (OSError, ValueError, LookupError, TypeError, ArchiveError):
        pass
    return None


def clean(record: Record) -> None:
    """Remove what else a killed writer left beside the finished shards."""
    kept = {NAME, *(shard["name"] for shard in record.shards)}
    for file in sorted(record.directory.rglob("*"), reverse=True):
        if file.is_dir():
            file.rmdir()
        elif file.parent != record.directory or file.name not in kept:
            file.unlink()
