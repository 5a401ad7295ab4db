"""Entries of the header: arrays and feature indices."""

import pytest

from scdl_gpu.archive.codec import BinaryHeaderCodec
from scdl_gpu.archive.constants import ArrayDType
from scdl_gpu.archive.header_entries import ArrayInfo, FeatureIndexInfo
from scdl_gpu.errors import HeaderSerializationError

CODEC = BinaryHeaderCodec()
U8 = ArrayDType.UINT8_ARRAY
SHAPED = ArrayInfo("a", 200, U8, (100, 2))
INDEX = FeatureIndexInfo("g", 7, ArrayDType.STRING_ARRAY, ["x/1", "文/2"], (7,))

SHAPED_BYTES = bytes.fromhex("00000001 61  00000000000000c8 00000001 01 00000002 00000064 00000002")
INDEX_BYTES = bytes.fromhex(
    "00000001 67 0000000000000007 00000008 00000002 00000003 782f31 00000005 e696872f32 01 00000001 00000007"
)  # fmt: skip


@pytest.mark.parametrize(("info", "data"), [(SHAPED, SHAPED_BYTES), (INDEX, INDEX_BYTES)], ids=["array", "feature index"])
def test_bytes_are_laid_out_as_specified(info: ArrayInfo | FeatureIndexInfo, data: bytes) -> None:
    """Entries become the specified bytes, know how many, and come back from any offset."""
    found = type(info).deserialize(CODEC, b"???" + data + b"more", 3)

    assert info.serialize(CODEC) == data
    assert info.calculate_size() == len(data)
    assert found == (info, len(data))


def test_entries_print_as_the_references() -> None:
    """Text names what is there, the shape only where there is one."""
    assert repr(SHAPED) == str(SHAPED) == "ArrayInfo(name='a', length=200, dtype=UINT8_ARRAY, shape=(100, 2))"
    assert repr(ArrayInfo("a", 1, U8)) == "ArrayInfo(name='a', length=1, dtype=UINT8_ARRAY)"
    assert repr(INDEX) == str(INDEX) == "FeatureIndexInfo(name='g', length=7, dtype=STRING_ARRAY, files=2, shape=(7,))"


def test_index_without_files_has_an_empty_list() -> None:
    """No files, left out or None, is a list of its own that can be added to."""
    first, second = FeatureIndexInfo("g", 7, U8), FeatureIndexInfo("g", 7, U8, None)  # type: ignore[arg-type]

    first.index_files.append("x")

    assert second.index_files == []
    assert second.shape is None


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (ArrayInfo("", 1, U8), "Array name cannot be empty"),
        (ArrayInfo("  ", 1, U8), "Array name cannot be empty"),
        (ArrayInfo(7, 1, U8), "Expected string"),  # type: ignore[arg-type]
        (ArrayInfo("\ud800", 1, U8), "UTF-8"),
        (ArrayInfo("a", -1, U8), "Array length cannot be negative: -1"),
        (ArrayInfo("a", 2**64, U8), "out of range"),
        (ArrayInfo("a", "1", U8), "Expected integer"),  # type: ignore[arg-type]
        (ArrayInfo("a", 1, 99), "Invalid ArrayDType value: 99"),  # type: ignore[arg-type]
        (ArrayInfo("a", 1, U8, ()), "Shape cannot be empty when specified"),
        (ArrayInfo("a", 1, U8, (10, 0)), "Shape dimension 1 must be positive: 0"),
        (ArrayInfo("a", 1, U8, (2**32,)), "out of range"),
        (FeatureIndexInfo("", 1, U8), "FeatureIndex name cannot be empty"),
        (FeatureIndexInfo("a", -1, U8), "FeatureIndex length cannot be negative"),
        (FeatureIndexInfo("a", 1, U8, ["x", ""]), "FeatureIndex file path 1 cannot be empty"),
        (FeatureIndexInfo("a", 1, U8, [], ()), "FeatureIndex shape cannot be empty when specified"),
        (FeatureIndexInfo("a", 1, U8, [], (-1,)), "FeatureIndex shape dimension 0 must be positive"),
    ],
)
def test_what_cannot_be_stored_is_refused(info: ArrayInfo | FeatureIndexInfo, message: str) -> None:
    """Writing an entry names what is wrong with it."""
    with pytest.raises(HeaderSerializationError, match=message):
        info.serialize(CODEC)


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [
        (ArrayInfo, "00000001 61 0000000000000001 000003e7 00", "Invalid ArrayDType value: 999"),
        (FeatureIndexInfo, "00000001 61 0000000000000001 000003e7 00000000 00", "Invalid ArrayDType value in FeatureIndex: 999"),
        (ArrayInfo, "00000001 61 0000000000000001 00000001 02", "Invalid shape flag: 2"),
        (ArrayInfo, "00000001 61 0000000000000001 00000001 01 00000000", "Shape cannot be empty when specified"),
        (ArrayInfo, "00000001 61 0000000000000001 00000001 01 00000001 00000000", "Shape dimension 0 must be positive"),
        (ArrayInfo, "00000000 0000000000000001 00000001 00", "Array name cannot be empty"),
        (FeatureIndexInfo, "00000001 61 0000000000000001 00000001 00000001 00000000 00", "FeatureIndex file path 0 cannot be empty"),
    ],
)
def test_what_could_not_be_written_is_not_read(kind: type[ArrayInfo], data: str, message: str) -> None:
    """Reading refuses what writing refuses."""
    with pytest.raises(HeaderSerializationError, match=message):
        kind.deserialize(CODEC, bytes.fromhex(data))
