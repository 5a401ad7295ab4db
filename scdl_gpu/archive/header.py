"""header.sch: what an archive holds, as bytes.

Knows the order of the header's fields and which versions and backends are understood, not whether the arrays are
there. Whatever the bytes, reading them ends in a header or a `HeaderSerializationError`, with memory in proportion
to the file. Names it does not know and bytes behind the known part are kept and written back: another version may
need them; in return such bytes cannot be told from garbage.
"""

import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from scdl_gpu.archive.codec import BinaryHeaderCodec, Endianness, FieldReader
from scdl_gpu.archive.constants import ArrayDType, Backend
from scdl_gpu.archive.header_entries import ArrayInfo, FeatureIndexInfo
from scdl_gpu.archive.version import SCDL_MAGIC_NUMBER, CurrentSCDLVersion, SCDLVersion
from scdl_gpu.errors import HeaderSerializationError, MissingFileError

__all__ = [
    "ArrayInfo",
    "FeatureIndexInfo",
    "HeaderReader",
    "SCDLHeader",
    "create_header_from_arrays",
    "merge_headers",
    "validate_header_compatibility",
]

# A header has about 40 bytes a feature block: this is more than a million blocks, and never the data file by mistake.
MAX_HEADER_BYTES = 64 << 20
MAX_NAME_BYTES = 1024
_NETWORK_CODE = 1
_DAMAGED = "the header is damaged: copy the archive again, or convert the source anew"

_Entry = TypeVar("_Entry", ArrayInfo, FeatureIndexInfo)


class SCDLHeader:
    """The header of an archive: version, backend, arrays, feature indices, and bytes of a later version.

    The lists are the header's own to change; `serialize` and `save` check them.
    """

    CORE_HEADER_SIZE = 16  # bytes up to and including the number of arrays

    def __init__(
        self,
        version: SCDLVersion | None = None,
        backend: Backend = Backend.MEMMAP_V0,
        arrays: list[ArrayInfo] | None = None,
        feature_indices: list[FeatureIndexInfo] | None = None,
        *,
        trailing: bytes = b"",
    ) -> None:
        self.version = version or CurrentSCDLVersion()
        self.endianness = Endianness.NETWORK
        self.backend = backend
        self.arrays = arrays or []
        self.feature_indices = feature_indices or []
        self.trailing = trailing

    def add_array(self, array_info: ArrayInfo) -> None:
        """Add an array."""
        self.arrays.append(array_info)

    def get_array(self, name: str) -> ArrayInfo | None:
        """Find the array `name`, or None."""
        return _find(self.arrays, name)

    def remove_array(self, name: str) -> bool:
        """Remove the array `name`; False if there is none."""
        return _remove(self.arrays, name)

    def add_feature_index(self, feature_index: FeatureIndexInfo) -> None:
        """Add a feature index."""
        self.feature_indices.append(feature_index)

    def get_feature_index(self, name: str) -> FeatureIndexInfo | None:
        """Find the feature index `name`, or None."""
        return _find(self.feature_indices, name)

    def remove_feature_index(self, name: str) -> bool:
        """Remove the feature index `name`; False if there is none."""
        return _remove(self.feature_indices, name)

    def serialize(self) -> bytes:
        """Write as bytes.

        Raises HeaderSerializationError for whatever `validate` refuses or no field can hold.
        """
        self.validate()
        codec = BinaryHeaderCodec(self.endianness)
        version = self.version
        return b"".join(
            [
                SCDL_MAGIC_NUMBER,
                *(codec.pack_uint8(number) for number in (version.major, version.minor, version.point, _NETWORK_CODE)),
                codec.pack_uint32(int(self.backend)),
                codec.pack_uint32(len(self.arrays)),
                *(array.serialize(codec) for array in self.arrays),
                codec.pack_uint32(len(self.feature_indices)),
                *(feature_index.serialize(codec) for feature_index in self.feature_indices),
                self.trailing,
            ]
        )

    @classmethod
    def deserialize(cls, data: bytes) -> "SCDLHeader":
        """Read from bytes.

        A newer minor version is read as far as it is understood; the rest is kept in `trailing`.
        Raises HeaderSerializationError for a newer major version, an unknown backend and damaged bytes.
        """
        if not isinstance(data, bytes | bytearray | memoryview):
            raise HeaderSerializationError(f"Expected bytes for the header, got {type(data).__name__}")
        data = bytes(data)
        version = _read_version(data)
        backend = _read_backend(data)
        try:
            return cls._read_entries(version, backend, data)
        except HeaderSerializationError as error:
            newer = version.minor > CurrentSCDLVersion().minor
            cure = f"schema {version} is newer than {CurrentSCDLVersion()}: upgrade scdl_gpu" if newer else _DAMAGED
            raise HeaderSerializationError(f"{error}; {cure}") from error

    @classmethod
    def _read_entries(cls, version: SCDLVersion, backend: Backend, data: bytes) -> "SCDLHeader":
        fields = FieldReader(BinaryHeaderCodec(), data, 12)
        arrays = [_read_entry(ArrayInfo, fields, f"array {i}") for i in range(fields.uint32())]
        feature_indices = []
        if fields.offset < len(data):  # older headers end here
            feature_indices = [_read_entry(FeatureIndexInfo, fields, f"feature index {i}") for i in range(fields.uint32())]
        header = cls(version, backend, arrays, feature_indices, trailing=data[fields.offset :])
        header.validate()
        return header

    def save(self, file_path: str | os.PathLike[str]) -> None:
        """Write to a file, in place: neither atomic nor synced, which is the business of a staging directory.

        An invalid header leaves the file as it was. Raises HeaderSerializationError, also where the file cannot be written.
        """
        data = self.serialize()
        try:
            Path(file_path).write_bytes(data)
        except OSError as error:
            raise HeaderSerializationError(f"Failed to save header to {file_path} ({len(data)} bytes): {error}") from error

    @classmethod
    def load(cls, file_path: str | os.PathLike[str]) -> "SCDLHeader":
        """Read from a file.

        Raises HeaderSerializationError, also where the file is not there or cannot be read.
        """
        try:
            with Path(file_path).open("rb") as file:
                size_bytes = os.fstat(file.fileno()).st_size
                if size_bytes > MAX_HEADER_BYTES:
                    raise HeaderSerializationError(
                        f"{file_path}: {size_bytes:,} bytes, a header has at most {MAX_HEADER_BYTES:,}; {_DAMAGED}"
                    )
                data = file.read()
        except FileNotFoundError as error:
            raise HeaderSerializationError(f"Header file not found: {file_path}; is this an archive?") from error
        except OSError as error:
            raise HeaderSerializationError(f"Failed to load header from {file_path}: {error}") from error
        try:
            return cls.deserialize(data)
        except HeaderSerializationError as error:
            raise HeaderSerializationError(f"Failed to load header from {file_path}: {error}") from error

    def calculate_total_size(self) -> int:
        """Count the bytes that `serialize` returns."""
        entries = sum(array.calculate_size() for array in self.arrays) + sum(index.calculate_size() for index in self.feature_indices)
        return self.CORE_HEADER_SIZE + entries + 4 + len(self.trailing)

    def validate(self) -> None:
        """Check version, backend and names.

        Raises HeaderSerializationError for a newer major version, an unknown backend, and names that are empty,
        longer than 1024 bytes or used twice.
        """
        _refuse_newer_major(self.version)
        _backend_of(self.backend)
        arrays = _checked_names(self.arrays, "array")
        feature_indices = _checked_names(self.feature_indices, "feature index")
        if both := arrays & feature_indices:
            raise HeaderSerializationError(f"Name conflicts between arrays and feature indices: {sorted(both)}")

    def to_json(self) -> str:
        """Write for people to read, as JSON."""
        version = {"major": self.version.major, "minor": self.version.minor, "point": self.version.point}
        return json.dumps(self._as_dict(version), indent=2)

    def to_yaml(self) -> str:
        """Write for people to read, as YAML.

        Raises RuntimeError without PyYAML.
        """
        try:
            import yaml  # type: ignore[import-untyped]
        except ImportError as error:
            raise RuntimeError("PyYAML is required for YAML serialization: pip install pyyaml, or use to_json()") from error
        return str(yaml.dump(self._as_dict(str(self.version)), default_flow_style=False))

    def __str__(self) -> str:
        counts = f"arrays={len(self.arrays)}, feature_indices={len(self.feature_indices)}"
        return f"SCDLHeader(version={self.version}, backend={self.backend.name}, {counts})"

    __repr__ = __str__

    def _as_dict(self, version: str | dict[str, int]) -> dict[str, Any]:
        return {
            "version": version,
            "endianness": self.endianness.name,
            "backend": self.backend.name,
            "arrays": [_entry_as_dict(array) for array in self.arrays],
            "feature_indices": [_entry_as_dict(index, index_files=index.index_files) for index in self.feature_indices],
        }


class HeaderReader:
    """Reads no more of a header file than what is asked for, once.

    Raises HeaderSerializationError for damaged bytes and MissingFileError (a FileNotFoundError) for no file.
    """

    def __init__(self, file_path: str | os.PathLike[str]) -> None:
        self.file_path = file_path

    def validate_magic(self) -> bool:
        """Say whether the file begins as a header does."""
        return self._core.startswith(SCDL_MAGIC_NUMBER)

    def get_version(self) -> SCDLVersion:
        """Read the schema version, of a newer major version too."""
        return _read_version(self._core, refuse_newer=False)

    def get_backend(self) -> Backend:
        """Read the backend."""
        _read_version(self._core)
        return _read_backend(self._core)

    def get_array_count(self) -> int:
        """Read the number of arrays."""
        _read_version(self._core)
        return FieldReader(BinaryHeaderCodec(), self._core, 12).uint32()

    def get_full_header(self) -> SCDLHeader:
        """Read everything; each call returns the same object."""
        return self._header

    @cached_property
    def _header(self) -> SCDLHeader:
        return SCDLHeader.load(self.file_path)

    @cached_property
    def _core(self) -> bytes:
        try:
            with Path(self.file_path).open("rb") as file:
                return file.read(SCDLHeader.CORE_HEADER_SIZE)
        except FileNotFoundError as error:
            raise MissingFileError(f"Header file not found: {self.file_path}; is this an archive?") from error


def create_header_from_arrays(
    array_files: list[str], backend: Backend = Backend.MEMMAP_V0, version: SCDLVersion | None = None
) -> SCDLHeader:
    """Make a header that names `array_files` (without directories); lengths are 0 and dtypes float32, to be filled in."""
    arrays = [ArrayInfo(Path(file).name, 0, ArrayDType.FLOAT32_ARRAY) for file in array_files]
    return SCDLHeader(version, backend, arrays)


def validate_header_compatibility(header1: SCDLHeader, header2: SCDLHeader) -> bool:
    """Say whether two headers can be merged: same major version, same backend, no name in common."""
    same = header1.version.major == header2.version.major and header1.backend == header2.backend
    return same and _names(header1).isdisjoint(_names(header2))


def merge_headers(header1: SCDLHeader, header2: SCDLHeader) -> SCDLHeader:
    """Join the entries of two headers under the higher minor version; bytes in `trailing`, not understood, are left out.

    Raises HeaderSerializationError where `validate_header_compatibility` says no.
    """
    if not validate_header_compatibility(header1, header2):
        raise HeaderSerializationError(
            f"Headers are not compatible: versions {header1.version} and {header2.version}, backends {header1.backend!r} and "
            f"{header2.backend!r}, names in common {sorted(_names(header1) & _names(header2))}; expected one, one and none"
        )
    newer = header1 if header1.version.minor >= header2.version.minor else header2
    return SCDLHeader(newer.version, header1.backend, header1.arrays + header2.arrays, header1.feature_indices + header2.feature_indices)


def _names(header: SCDLHeader) -> set[str]:
    return {array.name for array in header.arrays} | {index.name for index in header.feature_indices}


def _find(entries: list[_Entry], name: str) -> _Entry | None:
    return next((entry for entry in entries if entry.name == name), None)


def _remove(entries: list[_Entry], name: str) -> bool:
    entry = _find(entries, name)
    if entry is None:
        return False
    entries.remove(entry)
    return True


def _entry_as_dict(entry: ArrayInfo | FeatureIndexInfo, **more: list[str]) -> dict[str, Any]:
    shape = list(entry.shape) if entry.shape else None
    return {"name": entry.name, "length": entry.length, "dtype": entry.dtype.name, **more, "shape": shape}


def _read_version(data: bytes, *, refuse_newer: bool = True) -> SCDLVersion:
    if len(data) < SCDLHeader.CORE_HEADER_SIZE:
        raise HeaderSerializationError(
            f"Header data too short: {len(data)} bytes < {SCDLHeader.CORE_HEADER_SIZE} bytes minimum; {_DAMAGED}"
        )
    if not data.startswith(SCDL_MAGIC_NUMBER):
        raise HeaderSerializationError(f"Invalid magic number: {data[:4]!r} != {SCDL_MAGIC_NUMBER!r}; no header of an archive")
    version = SCDLVersion(*data[4:7])
    if refuse_newer:
        _refuse_newer_major(version)
    return version


def _refuse_newer_major(version: SCDLVersion) -> None:
    current = CurrentSCDLVersion()
    if version.major > current.major:
        raise HeaderSerializationError(
            f"Unsupported version: {version} > {current}, the newest schema that this scdl_gpu understands; upgrade scdl_gpu"
        )


def _read_backend(data: bytes) -> Backend:
    if data[7] != _NETWORK_CODE:
        raise HeaderSerializationError(f"Invalid endianness: {data[7]}, expected {_NETWORK_CODE} for NETWORK; {_DAMAGED}")
    return _backend_of(FieldReader(BinaryHeaderCodec(), data, 8).uint32())


def _backend_of(code: int) -> Backend:
    try:
        return Backend(code)
    except ValueError as error:
        known = ", ".join(f"{backend:d} ({backend.name})" for backend in Backend)
        raise HeaderSerializationError(
            f"Invalid backend value: {code!r}, expected {known}; a newer archive wants a newer scdl_gpu, a damaged one another copy"
        ) from error


def _read_entry(kind: type[_Entry], fields: FieldReader, what: str) -> _Entry:
    if fields.offset >= len(fields.data):
        raise HeaderSerializationError(f"Unexpected end of data while reading {what}, at byte {fields.offset}")
    try:
        entry, size_bytes = kind.deserialize(fields.codec, fields.data, fields.offset)
    except HeaderSerializationError as error:
        raise HeaderSerializationError(f"{what} at byte {fields.offset}: {error}") from error
    fields.offset += size_bytes
    return entry


def _checked_names(entries: list[_Entry], what: str) -> set[str]:
    names = set()
    for entry in entries:
        if not isinstance(entry.name, str) or not entry.name.strip():
            raise HeaderSerializationError(f"Empty {what} name found: {entry.name!r}")
        if len(entry.name.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES:
            raise HeaderSerializationError(f"{what.capitalize()} name too long, more than {MAX_NAME_BYTES} bytes: {entry.name}")
        if entry.name in names:
            raise HeaderSerializationError(f"Duplicate {what} names found: {entry.name!r}")
        names.add(entry.name)
    return names
