"""header.sch damaged in every way: a header, or a HeaderSerializationError."""

import os
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scdl_gpu.archive.header import SCDLHeader
from scdl_gpu.errors import HeaderSerializationError

CORE = bytes.fromhex("5343444c 000100 01 00000001")
NO_ARRAYS = CORE + b"\x00\x00\x00\x00"
NUMBERS = bytes.fromhex("0000000000000009 00000006 00")
ARRAYS = CORE + b"\x00\x00\x00\x02" + b"\x00\x00\x00\x04DATA" + NUMBERS + b"\x00\x00\x00\x06COLPTR" + NUMBERS[:12]
ARRAYS += bytes.fromhex("01 00000002 00000003 00000003")  # a shape
INDEX = (
    bytes.fromhex("00000005") + b"index" + NUMBERS[:12] + bytes.fromhex("00000002 00000003") + b"a/0" + bytes.fromhex("00000003") + b"a/1"
)
GOOD = ARRAYS + b"\x00\x00\x00\x02" + INDEX + b"\x00" + INDEX.replace(b"index", b"other") + b"\x00"


def survives(data: bytes) -> None:
    """Read `data`: a header that can be written and read again, or the one error."""
    try:
        header = SCDLHeader.deserialize(data)
    except HeaderSerializationError:
        return
    written = header.serialize()
    assert len(written) == header.calculate_total_size()
    assert SCDLHeader.deserialize(written).serialize() == written


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "Header data too short: 0 bytes < 16"),
        (GOOD[:15], "Header data too short: 15 bytes"),
        (b"FAKE" + GOOD[4:], "Invalid magic number: b'FAKE'"),
        (b"SCDL\x01" + GOOD[5:], r"Unsupported version: 1\.1\.0 > 0\.1\.0.*upgrade scdl_gpu"),
        (b"SCDL\x01\x00\x00" + bytes([0xFF] * 99), r"Unsupported version: 1\.0\.0"),
        (GOOD[:7] + b"\x63" + GOOD[8:], "Invalid endianness: 99"),
        (GOOD[:8] + b"\x00\x00\x03\xe7" + GOOD[12:], r"Invalid backend value: 999, expected 1 \(MEMMAP_V0\)"),
        (GOOD[:16], "Unexpected end of data while reading array 0, at byte 16"),
        (GOOD[:37], "Unexpected end of data while reading array 1"),
        (GOOD[:30], "array 0 at byte 16: Insufficient data for uint64: need 8 bytes, got 6.*copy the archive again"),
        (GOOD[:74], "Insufficient data for uint32: need 4 bytes, got 2"),
        (GOOD[:76], "Unexpected end of data while reading feature index 0"),
        (GOOD[:-1], "feature index 1 at byte 116: Insufficient data for uint8"),
        (GOOD[:32] + b"\x00\x00\x00\x0a" + GOOD[36:], "Invalid ArrayDType value: 10"),
        (GOOD.replace(b"\x06COLPTR", b"\x04DATA"), "Duplicate array names found: 'DATA'"),
        (GOOD.replace(b"other", b"index"), "Duplicate feature index names found"),
        (GOOD.replace(b"index", b"DATA\xe7"), "Cannot decode UTF-8 string"),
        (GOOD.replace(b"\x05index", b"\x04DATA"), "Name conflicts between arrays and feature indices"),
        (GOOD.replace(b"DATA", b"    "), "Array name cannot be empty"),
        (
            b"SCDL\x00\x02" + GOOD[6:32] + b"\x00\x00\x00\x0a" + GOOD[36:],
            r"Invalid ArrayDType value: 10, expected 1 to 9; schema 0\.2\.0 is newer.*upgrade scdl_gpu",
        ),
    ],
)
def test_damage_is_named(data: bytes, message: str, tmp_path: Path) -> None:
    """Damaged bytes raise the one error, with the fragment that others match; from a file, with the file's name."""
    (tmp_path / "header.sch").write_bytes(data)

    with pytest.raises(HeaderSerializationError, match=message):
        SCDLHeader.deserialize(data)
    with pytest.raises(HeaderSerializationError, match=f"{tmp_path}/header.sch: .*{message}"):
        SCDLHeader.load(tmp_path / "header.sch")


def test_every_truncation_is_noticed() -> None:
    """Cut anywhere, a header is refused; only the end of the arrays may be an older header's end."""
    for n in range(len(GOOD)):
        if n == len(ARRAYS):
            continue
        with pytest.raises(HeaderSerializationError):
            SCDLHeader.deserialize(GOOD[:n])


def test_every_bit_may_flip() -> None:
    """With any one bit flipped the header is refused or still one that can be written."""
    for bit in range(8 * len(GOOD)):
        data = bytearray(GOOD)
        data[bit // 8] ^= 1 << bit % 8

        survives(bytes(data))


@given(st.binary(max_size=200))
def test_any_bytes_may_come(data: bytes) -> None:
    """Bytes of no sense, bare and behind a valid beginning, are refused or a header."""
    survives(data)
    survives(CORE + data)
    survives(CORE + b"\x00\x00\x00\x01\x00\x00\x00\x01a" + data)
    survives(NO_ARRAYS + data)


@given(st.integers(0, len(GOOD)), st.binary(max_size=9) | st.sampled_from([b"\xff" * 4, b"\xff" * 8, bytes(4)]), st.integers(0, len(GOOD)))
def test_overwritten_bytes_may_come(start: int, patch: bytes, stop: int) -> None:
    """A header with any stretch overwritten, and then cut anywhere, is refused or a header."""
    patched = GOOD[:start] + patch + GOOD[start + len(patch) :]

    survives(patched)
    survives(patched[:stop])


@pytest.mark.parametrize(
    "data",
    [
        CORE + b"\xff" * 4,
        CORE + b"\xff" * 4 + GOOD[16:],
        CORE + b"\x00\x00\x00\x01" + b"\xff" * 40,
        NO_ARRAYS + b"\xff" * 4,
        CORE + b"\x00\x00\x00\x01" + b"\x00\x00\x00\x01a" + bytes(8) + b"\x00\x00\x00\x01\x01" + b"\xff" * 4,
        NO_ARRAYS + b"\x00\x00\x00\x01\x00\x00\x00\x01a" + bytes(8) + b"\x00\x00\x00\x01" + b"\xff" * 4,
    ],
    ids=["arrays", "arrays before good ones", "name", "feature indices", "shape", "files"],
)
def test_giant_counts_allocate_nothing(data: bytes) -> None:
    """Counts and lengths of four thousand million are refused within a small memory."""
    tracemalloc.start()
    try:
        with pytest.raises(HeaderSerializationError):
            SCDLHeader.deserialize(data)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak_bytes < 100_000


def test_giant_files_are_not_read(tmp_path: Path) -> None:
    """A file larger than any header is refused by its size, a file that is no header by its beginning."""
    with (tmp_path / "header.sch").open("wb") as file:
        os.truncate(file.fileno(), 1 << 40)

    with pytest.raises(HeaderSerializationError, match=r"header.sch: 1,099,511,627,776 bytes, a header has at most"):
        SCDLHeader.load(tmp_path / "header.sch")
