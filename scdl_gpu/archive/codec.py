"""Single fields of a header as bytes: numbers and strings, big-endian.

Knows one field at a time and its limits, not which fields a header has or where they lie. Every fault is a
`HeaderSerializationError`, so that a reader of untrusted bytes has one thing to catch; the price, a checked call
per field, is nothing beside opening the file.
"""

import struct
from collections.abc import Iterable
from enum import Enum

from scdl_gpu.errors import HeaderSerializationError

__all__ = ["BinaryHeaderCodec", "Endianness", "FieldReader", "HeaderSerializationError"]

_FORMATS = {"uint8": "B", "uint16": "H", "uint32": "I", "uint64": "Q", "float16": "e", "float32": "f"}


class Endianness(Enum):
    """Byte orders of a header: there is one."""

    NETWORK = "!"


class BinaryHeaderCodec:
    """Packs values into fields and back; all methods raise HeaderSerializationError and nothing else.

    Integers must be Python's own (NumPy's are refused). The `unpack_` methods read the beginning of `data` and
    ignore what follows.
    """

    def __init__(self, endianness: Endianness = Endianness.NETWORK) -> None:
        self.endianness: str = endianness.value

    def pack_uint8(self, value: int) -> bytes:
        """Pack 0..2**8 - 1 into 1 byte."""
        return self._pack_uint("uint8", value)

    def pack_uint16(self, value: int) -> bytes:
        """Pack 0..2**16 - 1 into 2 bytes."""
        return self._pack_uint("uint16", value)

    def pack_uint32(self, value: int) -> bytes:
        """Pack 0..2**32 - 1 into 4 bytes."""
        return self._pack_uint("uint32", value)

    def pack_uint64(self, value: int) -> bytes:
        """Pack 0..2**64 - 1 into 8 bytes."""
        return self._pack_uint("uint64", value)

    def pack_float16(self, value: float) -> bytes:
        """Pack into 2 bytes, rounded; infinities and NaN pass, finite values beyond the range do not."""
        return self._pack_float("float16", value)

    def pack_float32(self, value: float) -> bytes:
        """Pack into 4 bytes, rounded; infinities and NaN pass, finite values beyond the range do not."""
        return self._pack_float("float32", value)

    def unpack_uint8(self, data: bytes) -> int:
        """Read 1 byte."""
        return int(self._unpack("uint8", data))

    def unpack_uint16(self, data: bytes) -> int:
        """Read 2 bytes."""
        return int(self._unpack("uint16", data))

    def unpack_uint32(self, data: bytes) -> int:
        """Read 4 bytes."""
        return int(self._unpack("uint32", data))

    def unpack_uint64(self, data: bytes) -> int:
        """Read 8 bytes."""
        return int(self._unpack("uint64", data))

    def unpack_float16(self, data: bytes) -> float:
        """Read 2 bytes."""
        return self._unpack("float16", data)

    def unpack_float32(self, data: bytes) -> float:
        """Read 4 bytes."""
        return self._unpack("float32", data)

    def pack_string(self, value: str, max_length: int | None = None) -> bytes:
        """Pack as a uint32 length and that many bytes of UTF-8, at most `max_length` of them."""
        encoded = _encode(value)
        _check_length(len(encoded), max_length)
        return self.pack_uint32(len(encoded)) + encoded

    def unpack_string(self, data: bytes, max_length: int | None = None) -> tuple[str, int]:
        """Read what `pack_string` wrote: the string, and how many bytes it took with its length."""
        self._validate_data_length(data, 4, "string length")
        length = self.unpack_uint32(data)
        _check_length(length, max_length)
        self._validate_data_length(data, 4 + length, "string")
        return _decode(data[4 : 4 + length]), 4 + length

    def pack_fixed_string(self, value: str, size: int, padding: bytes = b"\x00") -> bytes:
        """Pack as exactly `size` bytes: UTF-8, filled up with the byte `padding`."""
        encoded = _encode(value)
        _check_field(size, padding)
        _check_length(len(encoded), size)
        return encoded.ljust(size, padding)

    def unpack_fixed_string(self, data: bytes, size: int, padding: bytes = b"\x00") -> str:
        """Read `size` bytes, less all `padding` at their end."""
        _check_field(size, padding)
        self._validate_data_length(data, size, "fixed string")
        return _decode(data[:size].rstrip(padding))

    def calculate_header_size(self, field_specs: Iterable[tuple[str, int | None]]) -> int:
        """Add up the bytes of fields of fixed size.

        field_specs: (type, size) with type uint8 to uint64, float16, float32, where size is ignored, or fixed_string.
        """
        return sum(_field_size(field_type, size) for field_type, size in field_specs)

    def _validate_uint_range(self, value: int, min_val: int, max_val: int, type_name: str) -> None:
        if not isinstance(value, int):
            raise HeaderSerializationError(f"Expected integer for {type_name}, got {value!r} of type {type(value).__name__}")
        if not min_val <= value <= max_val:
            raise HeaderSerializationError(f"{type_name} value {value} out of range [{min_val}, {max_val}]")

    def _validate_data_length(self, data: bytes, required_length: int, type_name: str) -> None:
        if not isinstance(data, bytes | bytearray):
            raise HeaderSerializationError(f"Expected bytes for {type_name}, got {type(data).__name__}")
        if len(data) < required_length:
            raise HeaderSerializationError(f"Insufficient data for {type_name}: need {required_length} bytes, got {len(data)}")

    def _pack_uint(self, type_name: str, value: int) -> bytes:
        self._validate_uint_range(value, 0, 2 ** (8 * _field_size(type_name)) - 1, type_name)
        return struct.pack(self.endianness + _FORMATS[type_name], value)

    def _pack_float(self, type_name: str, value: float) -> bytes:
        try:
            return struct.pack(self.endianness + _FORMATS[type_name], value)
        except (struct.error, OverflowError) as error:
            raise HeaderSerializationError(f"Cannot pack {type_name} value {value!r}: {error}") from error

    def _unpack(self, type_name: str, data: bytes) -> float:
        size = _field_size(type_name)
        self._validate_data_length(data, size, type_name)
        (value,) = struct.unpack(self.endianness + _FORMATS[type_name], data[:size])
        number: int | float = value
        return number


class FieldReader:
    """Reads one field after another: `offset` is where the next begins.

    Touches no bytes but the field's, so that a length or count from a damaged file allocates nothing.
    """

    def __init__(self, codec: BinaryHeaderCodec, data: bytes, offset: int = 0) -> None:
        self.codec = codec
        self.data = data
        self.offset = offset

    def uint8(self) -> int:
        """Read the next byte."""
        return self.codec.unpack_uint8(self._take(1))

    def uint32(self) -> int:
        """Read the next 4 bytes."""
        return self.codec.unpack_uint32(self._take(4))

    def uint64(self) -> int:
        """Read the next 8 bytes."""
        return self.codec.unpack_uint64(self._take(8))

    def string(self) -> str:
        """Read the next string."""
        start = self.offset
        length = self.uint32()
        self.offset = start
        value, _ = self.codec.unpack_string(self._take(4 + length))
        return value

    def count(self, what: str, item_bytes: int) -> int:
        """Read how many items follow, and refuse more than the rest of the data can hold at `item_bytes` or more each."""
        n = self.uint32()
        if n * item_bytes > len(self.data) - self.offset:
            raise HeaderSerializationError(
                f"Insufficient data for {what}: need {n * item_bytes} bytes for {n}, got {len(self.data) - self.offset}"
            )
        return n

    def _take(self, size_bytes: int) -> bytes:
        start = self.offset
        self.offset += size_bytes
        return self.data[start : self.offset]


def _encode(value: str) -> bytes:
    if not isinstance(value, str):
        raise HeaderSerializationError(f"Expected string, got {value!r} of type {type(value).__name__}")
    try:
        return value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise HeaderSerializationError(f"Cannot encode string to UTF-8: {error}") from error


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise HeaderSerializationError(f"Cannot decode UTF-8 string: {error}") from error


def _check_length(n_bytes: int, limit: int | None) -> None:
    if limit is not None and n_bytes > limit:
        raise HeaderSerializationError(f"String too long: {n_bytes} bytes > {limit} bytes")


def _check_field(size: int, padding: bytes) -> None:
    if size <= 0:
        raise HeaderSerializationError(f"Size must be positive, got {size}")
    if len(padding) != 1:
        raise HeaderSerializationError(f"Padding must be single byte, got {len(padding)} bytes")


def _field_size(field_type: str, size: int | None = None) -> int:
    if field_type == "fixed_string":
        if not isinstance(size, int) or size <= 0:
            raise HeaderSerializationError(f"fixed_string requires positive integer size, got {size!r}")
        return size
    if field_type not in _FORMATS:
        raise HeaderSerializationError(f"Unknown field type: {field_type!r}, expected fixed_string or one of {list(_FORMATS)}")
    return struct.calcsize("!" + _FORMATS[field_type])
