"""Single fields as bytes: expected bytes are spelt out, and compared with the reference's codec."""

import math
from typing import Any

import numpy as np
import pytest
from bionemo.scdl.schema.headerutil import BinaryHeaderCodec as ReferenceCodec
from hypothesis import given
from hypothesis import strategies as st

from scdl_gpu.archive.codec import BinaryHeaderCodec, Endianness, FieldReader, HeaderSerializationError
from scdl_gpu.errors import ArchiveError

CODEC = BinaryHeaderCodec()
UINT_BYTES = {"uint8": 1, "uint16": 2, "uint32": 4, "uint64": 8}


def call(method: str, *args: Any) -> Any:
    """Call a method of the codec by name."""
    return getattr(CODEC, method)(*args)


def test_byte_order_is_the_networks() -> None:
    """There is one byte order, spelt "!"; faults of the codec are faults of an archive."""
    assert BinaryHeaderCodec(Endianness.NETWORK).endianness == CODEC.endianness == "!"
    assert issubclass(HeaderSerializationError, ArchiveError)


@pytest.mark.parametrize(("kind", "size"), UINT_BYTES.items())
def test_integers_are_big_endian(kind: str, size: int) -> None:
    """Integers take their size in bytes, the highest first, and come back."""
    for value in (0, 1, 2 ** (8 * size - 1), 2 ** (8 * size) - 1):
        packed = call(f"pack_{kind}", value)

        assert packed == value.to_bytes(size, "big")
        assert call(f"unpack_{kind}", packed + b"more") == value


@pytest.mark.parametrize(("kind", "size"), UINT_BYTES.items())
def test_integers_out_of_range_are_refused(kind: str, size: int) -> None:
    """What does not fit is named with its type."""
    for value in (-1, 2 ** (8 * size)):
        with pytest.raises(HeaderSerializationError, match=f"{kind} value {value} out of range"):
            call(f"pack_{kind}", value)


@pytest.mark.parametrize("value", ["3", 3.0, None, np.int64(3)])
def test_only_pythons_integers_are_packed(value: object) -> None:
    """NumPy's integers are refused like any other type; True is an integer."""
    with pytest.raises(HeaderSerializationError, match="Expected integer for uint16"):
        call("pack_uint16", value)

    assert CODEC.pack_uint16(True) == b"\x00\x01"


@pytest.mark.parametrize(("kind", "size"), [*UINT_BYTES.items(), ("float16", 2), ("float32", 4)])
def test_short_data_is_refused(kind: str, size: int) -> None:
    """A field that is cut off, or is no bytes at all, is named with its type."""
    with pytest.raises(HeaderSerializationError, match=f"Insufficient data for {kind}: need {size} bytes, got {size - 1}"):
        call(f"unpack_{kind}", bytes(size - 1))
    with pytest.raises(HeaderSerializationError, match="Expected bytes"):
        call(f"unpack_{kind}", "text")


@given(st.floats(width=16))
def test_half_floats_return(value: float) -> None:
    """Whatever 16 bits hold comes back, infinities and NaN included, through float32 too."""
    half = CODEC.unpack_float16(CODEC.pack_float16(value))
    single = CODEC.unpack_float32(CODEC.pack_float32(value))

    assert half == single == value or (math.isnan(half) and math.isnan(single) and math.isnan(value))


def test_float_bytes_are_ieee() -> None:
    """1.5 in half and single precision, the highest byte first."""
    assert CODEC.pack_float16(1.5) == bytes.fromhex("3e00")
    assert CODEC.pack_float32(1.5) == bytes.fromhex("3fc00000")


@pytest.mark.parametrize(("kind", "value"), [("float32", 1e50), ("float32", 10**400), ("float32", "x"), ("float16", 1e6)])
def test_floats_out_of_range_are_refused(kind: str, value: object) -> None:
    """Finite values beyond the range, and what is no number, are refused."""
    with pytest.raises(HeaderSerializationError, match=f"Cannot pack {kind} value"):
        call(f"pack_{kind}", value)


@given(st.text())
def test_strings_return(value: str) -> None:
    """A string is its length in bytes and its UTF-8; what follows it is not touched."""
    encoded = value.encode()

    packed = CODEC.pack_string(value)

    assert packed == len(encoded).to_bytes(4, "big") + encoded
    assert CODEC.unpack_string(packed + b"more") == (value, len(packed))


@pytest.mark.parametrize(
    ("method", "args", "message"),
    [
        ("pack_string", (123,), "Expected string"),
        ("pack_string", ("hello world", 5), "String too long: 11 bytes > 5 bytes"),
        ("pack_string", ("\ud800",), "Cannot encode string to UTF-8"),
        ("unpack_string", (b"\x00\x00",), "Insufficient data for string length"),
        ("unpack_string", (b"\x00\x00\x00\x0ashort",), "Insufficient data for string: need 14 bytes, got 9"),
        ("unpack_string", (b"\xff\xff\xff\xffshort",), "Insufficient data for string"),
        ("unpack_string", (b"\x00\x00\x00\x05hello", 4), "String too long"),
        ("unpack_string", (b"\x00\x00\x00\x02\xff\xfe",), "Cannot decode UTF-8 string"),
        ("unpack_string", ("text",), "Expected bytes"),
        ("pack_fixed_string", (123, 5), "Expected string"),
        ("pack_fixed_string", ("test", 0), "Size must be positive"),
        ("pack_fixed_string", ("test", -1), "Size must be positive"),
        ("pack_fixed_string", ("test", 9, b"\x00\x00"), "Padding must be single byte"),
        ("pack_fixed_string", ("this is too long", 5), "String too long"),
        ("unpack_fixed_string", (b"test\x00\x00", 6, b""), "Padding must be single byte"),
        ("unpack_fixed_string", (b"short", 10), "Insufficient data"),
        ("unpack_fixed_string", (b"short", -1), "Size must be positive"),
        ("unpack_fixed_string", (b"\xff\xfe", 2), "Cannot decode UTF-8 string"),
        ("calculate_header_size", ([("int128", None)],), "Unknown field type"),
        ("calculate_header_size", ([("fixed_string", None)],), "fixed_string requires positive integer size"),
        ("calculate_header_size", ([("fixed_string", 0)],), "fixed_string requires positive integer size"),
        ("_validate_data_length", ("not bytes", 4, "test"), "Expected bytes"),
        ("_validate_uint_range", ("not int", 0, 255, "test"), "Expected integer"),
    ],
)
def test_faults_are_named(method: str, args: tuple[Any, ...], message: str) -> None:
    """Each fault raises the one error, with the fragment that others match."""
    with pytest.raises(HeaderSerializationError, match=message):
        call(method, *args)


@pytest.mark.parametrize(
    ("value", "size", "padding"), [("hello", 10, b"\x00"), ("world", 8, b" "), ("exact", 5, b"\x00"), ("界", 20, b"\x00")]
)
def test_fixed_strings_return(value: str, size: int, padding: bytes) -> None:
    """A fixed string takes its size exactly, and loses its padding when read."""
    packed = CODEC.pack_fixed_string(value, size, padding)

    assert packed == value.encode() + padding * (size - len(value.encode()))
    assert CODEC.unpack_fixed_string(packed + b"more", size, padding) == value


def test_header_size_is_the_sum() -> None:
    """Sizes of fields of all types add up."""
    numbers = [("uint8", None), ("uint16", None), ("uint32", None), ("uint64", 99), ("float16", None), ("float32", None)]

    assert CODEC.calculate_header_size([*numbers, ("fixed_string", 64)]) == 1 + 2 + 4 + 8 + 2 + 4 + 64


@given(st.text(), st.integers(0, 2**64 - 1), st.floats(width=32))
def test_bytes_are_the_references(text: str, number: int, value: float) -> None:
    """The reference's codec makes the same bytes."""
    theirs = ReferenceCodec()

    assert CODEC.pack_string(text) == theirs.pack_string(text)
    assert CODEC.pack_uint64(number) == theirs.pack_uint64(number)
    assert CODEC.pack_float32(value) == theirs.pack_float32(value)
    assert CODEC.pack_fixed_string(text, 4 * len(text) + 1, b"_") == theirs.pack_fixed_string(text, 4 * len(text) + 1, b"_")


def test_reader_walks_field_by_field() -> None:
    """Fields are read one behind the other, from the given offset."""
    data = b"??" + b"\x07" + b"\x00\x00\x00\x02" + b"\x00\x00\x00\x02hi" + bytes(7) + b"\x09"

    fields = FieldReader(CODEC, data, 2)

    assert (fields.uint8(), fields.uint32(), fields.string(), fields.uint64()) == (7, 2, "hi", 9)
    assert fields.offset == len(data)


def test_reader_refuses_counts_beyond_the_data() -> None:
    """A count of items that cannot all be there is refused before the first is read."""
    exact = FieldReader(CODEC, b"\x00\x00\x00\x02" + bytes(8))
    giant = FieldReader(CODEC, b"\xff\xff\xff\xff" + bytes(8))

    assert exact.count("shape", 4) == 2
    with pytest.raises(HeaderSerializationError, match=r"Insufficient data for shape: need 17179869180 bytes for 4294967295, got 8"):
        giant.count("shape", 4)
