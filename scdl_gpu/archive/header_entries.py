"""Entries of a header: one array, or one feature index.

Knows the fields of an entry, not the entries around it, nor whether the files exist. Checks the same things when
reading as when writing, where the reference checks when writing only: whatever was read can be written again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from scdl_gpu.archive.codec import BinaryHeaderCodec, FieldReader
from scdl_gpu.archive.constants import ArrayDType
from scdl_gpu.errors import HeaderSerializationError


@dataclass(repr=False)
class ArrayInfo:
    """One array: its name, length in elements, dtype and, rarely, shape."""

    name: str
    length: int
    dtype: ArrayDType
    shape: tuple[int, ...] | None = None

    def serialize(self, codec: BinaryHeaderCodec) -> bytes:
        """Write as bytes.

        Raises HeaderSerializationError for a value that cannot be stored.
        """
        self._validate()
        return _pack_beginning(codec, self) + _pack_shape(codec, self.shape)

    @classmethod
    def deserialize(cls, codec: BinaryHeaderCodec, data: bytes, offset: int = 0) -> tuple["ArrayInfo", int]:
        """Read from `data` at `offset`: the entry, and how many bytes it took.

        Raises HeaderSerializationError for bytes that are no entry.
        """
        fields = FieldReader(codec, data, offset)
        info = cls(fields.string(), fields.uint64(), _read_dtype(fields, ""), _read_shape(fields))
        info._validate()
        return info, fields.offset - offset

    def calculate_size(self) -> int:
        """Count the bytes that `serialize` returns."""
        return 4 + len(self.name.encode()) + 8 + 4 + _shape_size(self.shape)

    def __str__(self) -> str:
        shape = f", shape={self.shape}" if self.shape else ""
        return f"ArrayInfo(name='{self.name}', length={self.length}, dtype={self.dtype.name}{shape})"

    __repr__ = __str__

    def _validate(self) -> None:
        _check(self, "Array", "Shape")


@dataclass(repr=False)
class FeatureIndexInfo:
    """One feature index: its name, length in rows, dtype, files (relative paths, for information) and, rarely, shape."""

    name: str
    length: int
    dtype: ArrayDType
    index_files: list[str] = field(default_factory=list)
    shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        self.index_files = self.index_files or []  # None is allowed, as in the reference

    def serialize(self, codec: BinaryHeaderCodec) -> bytes:
        """Write as bytes.

        Raises HeaderSerializationError for a value that cannot be stored.
        """
        self._validate()
        files = b"".join(codec.pack_string(file) for file in self.index_files)
        return _pack_beginning(codec, self) + codec.pack_uint32(len(self.index_files)) + files + _pack_shape(codec, self.shape)

    @classmethod
    def deserialize(cls, codec: BinaryHeaderCodec, data: bytes, offset: int = 0) -> tuple["FeatureIndexInfo", int]:
        """Read from `data` at `offset`: the entry, and how many bytes it took.

        Raises HeaderSerializationError for bytes that are no entry.
        """
        fields = FieldReader(codec, data, offset)
        name, length, dtype = fields.string(), fields.uint64(), _read_dtype(fields, " in FeatureIndex")
        files = [fields.string() for _ in range(fields.count("index files", 4))]
        info = cls(name, length, dtype, files, _read_shape(fields))
        info._validate()
        return info, fields.offset - offset

    def calculate_size(self) -> int:
        """Count the bytes that `serialize` returns."""
        files = sum(4 + len(file.encode()) for file in self.index_files)
        return 4 + len(self.name.encode()) + 8 + 4 + 4 + files + _shape_size(self.shape)

    def __str__(self) -> str:
        shape = f", shape={self.shape}" if self.shape else ""
        files = f"files={len(self.index_files)}"
        return f"FeatureIndexInfo(name='{self.name}', length={self.length}, dtype={self.dtype.name}, {files}{shape})"

    __repr__ = __str__

    def _validate(self) -> None:
        _check(self, "FeatureIndex", "FeatureIndex shape")
        for i, file in enumerate(self.index_files):
            _check_text(file, f"FeatureIndex file path {i}")


def _check(info: ArrayInfo | FeatureIndexInfo, kind: str, shape_kind: str) -> None:
    """Refuse what cannot be stored; numbers of a foreign type are left for the codec to refuse."""
    _check_text(info.name, f"{kind} name")
    if isinstance(info.length, int) and info.length < 0:
        raise HeaderSerializationError(f"{kind} length cannot be negative: {info.length}")
    if info.dtype not in list(ArrayDType):
        raise HeaderSerializationError(f"Invalid ArrayDType value: {info.dtype!r}")
    if info.shape is None:
        return
    if len(info.shape) == 0:
        raise HeaderSerializationError(f"{shape_kind} cannot be empty when specified")
    for i, n in enumerate(info.shape):
        if isinstance(n, int) and n <= 0:
            raise HeaderSerializationError(f"{shape_kind} dimension {i} must be positive: {n}")


def _check_text(text: str, what: str) -> None:
    if not text or (isinstance(text, str) and not text.strip()):
        raise HeaderSerializationError(f"{what} cannot be empty, got {text!r}")


def _pack_beginning(codec: BinaryHeaderCodec, info: ArrayInfo | FeatureIndexInfo) -> bytes:
    return codec.pack_string(info.name) + codec.pack_uint64(info.length) + codec.pack_uint32(int(info.dtype))


def _pack_shape(codec: BinaryHeaderCodec, shape: Sequence[int] | None) -> bytes:
    if shape is None:
        return codec.pack_uint8(0)
    return codec.pack_uint8(1) + codec.pack_uint32(len(shape)) + b"".join(codec.pack_uint32(n) for n in shape)


def _shape_size(shape: Sequence[int] | None) -> int:
    return 1 if shape is None else 1 + 4 + 4 * len(shape)


def _read_dtype(fields: FieldReader, where: str) -> ArrayDType:
    code = fields.uint32()
    try:
        return ArrayDType(code)
    except ValueError as error:
        raise HeaderSerializationError(f"Invalid ArrayDType value{where}: {code}, expected 1 to {max(ArrayDType):d}") from error


def _read_shape(fields: FieldReader) -> tuple[int, ...] | None:
    flag = fields.uint8()
    if flag > 1:
        raise HeaderSerializationError(f"Invalid shape flag: {flag}, expected 0 or 1")
    return tuple([fields.uint32() for _ in range(fields.count("shape", 4))]) if flag else None
