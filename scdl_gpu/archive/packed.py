"""Packed archives: shards of packed rows, beside the header and feature tables that a raw archive has, too.

Knows the directory and that its files tell one story; `packed_shard` knows the bytes of a shard. The list of shards in
metadata.json is what commits them: other files in the directory are ignored. Opening costs a page of every shard.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from scdl_gpu.archive.constants import ArrayDType, Backend, FileNames
from scdl_gpu.archive.dtypes import DEFAULT_DTYPES
from scdl_gpu.archive.features import ObservedFeatureIndex, RowFeatureIndex, VariableFeatureIndex
from scdl_gpu.archive.graphs import NEIGHBOR_FILES, Graph, open_neighbors, open_obsm, open_obsp
from scdl_gpu.archive.header import ArrayInfo, SCDLHeader
from scdl_gpu.archive.maps import Array
from scdl_gpu.archive.packed_shard import PackedShard
from scdl_gpu.archive.packed_writer import ShardRecord
from scdl_gpu.archive.raw import PACKED, RawArchive, check_features, load_features, load_raw, open_whole, read_header, read_metadata, stamp
from scdl_gpu.archive.remote import Remote
from scdl_gpu.archive.version import SCDLVersion
from scdl_gpu.archive.writer import feature_info
from scdl_gpu.errors import ArchiveError
from scdl_gpu.version import __version__

VERSION = 1
"""Of the entry "packed" of metadata.json."""
SCHEMA = (0, 2, 0)
"""Schema version of header.sch; bionemo-scdl refuses the backend that goes with it."""
PACKED_ARRAY = "PACKED"
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.scdp")
_CURE = "copy the archive again, or pack the source anew"


@dataclass(frozen=True, slots=True)
class PackedArchive:
    """One opened packed archive. Rows are those of its shards, one after the other; all are canonical.

    remote: the files that stay behind a URL, whose shards have no payload here.
    """

    path: Path
    header: SCDLHeader
    metadata: dict[str, Any]
    shards: tuple[PackedShard, ...]
    var: VariableFeatureIndex
    obs: ObservedFeatureIndex
    neighbors: Graph | None
    obsm: dict[str, Array]
    obsp: dict[str, Graph]
    stamp: tuple[Any, ...] = field(default=())
    remote: Remote | None = field(default=None)

    @property
    def place(self) -> str:
        """Where it lies, a path or a URL."""
        return str(self.path) if self.remote is None else self.remote.url

    @property
    def n_rows(self) -> int:
        """Rows of all shards."""
        return sum(shard.n_rows for shard in self.shards)

    @property
    def nnz(self) -> int:
        """Nonzeros of all shards."""
        return sum(shard.nnz for shard in self.shards)

    @property
    def n_vars(self) -> int:
        """Genes of a row, the most of any."""
        return max([*self.var.column_dims(), 0]) or max((shard.n_vars for shard in self.shards), default=0)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the stored values; the one that holds all where shards differ."""
        return np.result_type(*{shard.dtype for shard in self.shards}) if self.shards else np.dtype(np.float32)

    @property
    def dtypes(self) -> dict[str, str]:
        """Names of the dtypes of values, and of neighbour graphs, by the names of files that a raw archive would have."""
        return {FileNames.DATA.value: self.dtype.name} | {name: DEFAULT_DTYPES[name] for name in NEIGHBOR_FILES}

    @property
    def canonical(self) -> bool:
        """True: packed rows cannot be anything else."""
        return True


def open_packed(path: Path) -> PackedArchive:
    """Open the packed archive at `path`.

    Raises MissingFileError where a file is not there, ArchiveError where one is damaged, or where the archive is a raw one.
    An archive that is exchanged while it is being opened is opened anew.
    """
    return open_whole(path, lambda: _load(path, read_metadata(path)))


def open_archive(path: Path, *, data_dtype: str | None = None, remote: Remote | None = None) -> RawArchive | PackedArchive:
    """Open the archive at `path`, of either kind. data_dtype: of raw values, as of `open_raw`; packed shards know theirs.

    remote: `path` is its mirror, which has neither rows, graphs nor obsm. Errors as of `open_raw` and `open_packed`.
    """

    def load() -> RawArchive | PackedArchive:
        metadata = read_metadata(path, is_mirror=remote is not None)
        return _load(path, metadata, remote) if PACKED in metadata else load_raw(path, data_dtype=data_dtype, remote=remote)

    return open_whole(path, load)


def finish_packed(
    directory: Path,
    *,
    shards: Sequence[ShardRecord],
    var: VariableFeatureIndex,
    obs: ObservedFeatureIndex,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write what makes `directory`, which holds the files of `shards`, an archive: features, header, metadata, version.

    extra: further entries of metadata.json. metadata.json is the last file to be written.
    """
    n_rows, nnz = sum(shard.n_rows for shard in shards), sum(shard.nnz for shard in shards)
    tables: tuple[tuple[FileNames, RowFeatureIndex], ...] = ((FileNames.VAR_FEATURES, var), (FileNames.OBS_FEATURES, obs))
    for name, index in tables:
        index.save(str(directory / name.value), legacy_labels=True)
    arrays = [ArrayInfo(PACKED_ARRAY, n_rows, ArrayDType.UINT8_ARRAY)]
    header = SCDLHeader(SCDLVersion(*SCHEMA), Backend.PACKED_V1, arrays, [feature_info(directory, *table) for table in tables])
    header.save(str(directory / FileNames.HEADER.value))
    (directory / FileNames.VERSION.value).write_text(json.dumps(__version__))
    own = {
        "num_rows": n_rows,
        "nnz": nnz,
        "canonical": True,
        "names": {name.value: index.named_blocks() for name, index in tables},
        PACKED: {"version": VERSION, "shards": [shard.as_json() for shard in shards]},
    }
    (directory / FileNames.METADATA.value).write_text(json.dumps(own | (extra or {}) | own))


def _load(path: Path, metadata: dict[str, Any], remote: Remote | None = None) -> PackedArchive:
    """Open the packed archive at `path` once, if nobody exchanges it."""
    opened = stamp(path)
    records = records_of(path / FileNames.METADATA.value, metadata)
    header = _packed_header(path, sum(record.n_rows for record in records))
    shards = tuple(_open_shard(path, record, remote) for record in records)
    n_rows = sum(shard.n_rows for shard in shards)
    var, _ = load_features(path, VariableFeatureIndex, (FileNames.VAR_FEATURES.value,))
    obs, _ = load_features(path, ObservedFeatureIndex, (FileNames.OBS_FEATURES.value,))
    check_features(path, header, FileNames.VAR_FEATURES.value, var, n_rows)
    check_features(path, header, FileNames.OBS_FEATURES.value, obs, n_rows)
    _check_genes(shards, var)
    return PackedArchive(
        path=path,
        header=header,
        metadata=metadata,
        shards=shards,
        var=var,
        obs=obs,
        neighbors=None if remote else open_neighbors(path, DEFAULT_DTYPES),
        obsm={} if remote else open_obsm(path, metadata, n_rows),
        obsp={} if remote else open_obsp(path, metadata, n_rows),
        stamp=opened,
        remote=remote,
    )


def records_of(file: Path | str, metadata: dict[str, Any]) -> list[ShardRecord]:
    """Read the list of shards in metadata.json, which is at `file`. Raises ArchiveError for what is none."""
    told = metadata.get(PACKED)
    if not isinstance(told, dict):
        raise ArchiveError(f"{file} lists no packed shards: its archive is a raw one; pack it with `scdl-gpu pack`")
    if told.get("version") != VERSION:
        raise ArchiveError(f"{file}: packed archives of version {told.get('version')!r}, expected {VERSION}; upgrade scdl_gpu")
    kinds = {"name": str, "rows": int, "nnz": int, "bytes": int, "hash": str}
    records = []
    entries = told.get("shards")
    for entry in entries if isinstance(entries, list) else [entries]:
        if not isinstance(entry, dict) or any(type(entry.get(key)) is not kind for key, kind in kinds.items()):
            raise ArchiveError(f"{file}: a shard is {entry!r}, expected an object with {', '.join(kinds)}; {_CURE}")
        if not _SHARD_NAME.fullmatch(entry["name"]):
            raise ArchiveError(f"{file}: a shard is named {entry['name']!r}, expected one such as 'shard-00000.scdp'; {_CURE}")
        records.append(ShardRecord(*(entry[key] for key in kinds)))
    if (metadata.get("num_rows"), metadata.get("nnz")) != (sum(r.n_rows for r in records), sum(r.nnz for r in records)):
        raise ArchiveError(
            f"{file}: its shards do not add up to {metadata.get('num_rows')!r} rows of {metadata.get('nnz')!r} nonzeros; {_CURE}"
        )
    return records


def _packed_header(path: Path, n_rows: int) -> SCDLHeader:
    """Read header.sch. Raises ArchiveError unless it describes packed rows."""
    file, header = path / FileNames.HEADER.value, read_header(path)
    if header is None:
        raise ArchiveError(f"{file} is missing; the copy is incomplete: {_CURE}")
    info = header.get_array(PACKED_ARRAY)
    if header.backend is not Backend.PACKED_V1 or info is None or info.length != n_rows:
        raise ArchiveError(f"{file}: backend {header.backend.name} and arrays {header.arrays}, expected {n_rows:,} packed rows; {_CURE}")
    return header


def _open_shard(path: Path, record: ShardRecord, remote: Remote | None) -> PackedShard:
    """Open a shard. Raises ArchiveError unless it is the one that is listed."""
    shard = PackedShard.open(path, record.name, pin=None if remote is None else remote.pins[record.name])
    found = ShardRecord.of(shard)
    if found != record:
        raise ArchiveError(f"{shard.place}: {found.as_json()}, {FileNames.METADATA.value} lists {record.as_json()}: another file; {_CURE}")
    return shard


def _check_genes(shards: Sequence[PackedShard], var: VariableFeatureIndex) -> None:
    """Raise ArchiveError for a shard that has more or fewer genes than var has for its rows; a row table knows at least one gene."""
    first = 0
    for shard in shards:
        if var.number_of_rows() and shard.n_rows:
            blocks = var.block_of([first, first + shard.n_rows - 1])
            widths = set(var.column_dims()[int(blocks[0]) : int(blocks[1]) + 1])
            if {max(1, width) for width in widths} != {shard.n_vars}:
                raise ArchiveError(
                    f"{shard.path}: rows of {shard.n_vars:,} genes, {FileNames.VAR_FEATURES.value} has {sorted(widths)} for them; {_CURE}"
                )
        first += shard.n_rows
