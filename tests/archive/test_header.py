"""header.sch: the specified bytes, and the reference's reader and writer on the other side."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from bionemo.scdl.schema import header as reference
from bionemo.scdl.util import scdl_constants as reference_constants
from hypothesis import given
from hypothesis import strategies as st

from scdl_gpu.archive import header as header_module
from scdl_gpu.archive.constants import ArrayDType, Backend
from scdl_gpu.archive.header import (
    ArrayInfo,
    FeatureIndexInfo,
    HeaderReader,
    SCDLHeader,
    create_header_from_arrays,
    merge_headers,
    validate_header_compatibility,
)
from scdl_gpu.archive.version import CurrentSCDLVersion, SCDLVersion
from scdl_gpu.errors import ArchiveError, HeaderSerializationError, MissingFileError

# The worked example of the format's description: what 0.1.3 writes for 6 cells, 5 genes and 9 values.
CORE = bytes.fromhex("5343444c 000100 01 00000001")
ARRAYS = (
    bytes.fromhex("00000003")
    + bytes.fromhex("00000004") + b"DATA" + bytes.fromhex("0000000000000009 00000006 00")
    + bytes.fromhex("00000006") + b"ROWPTR" + bytes.fromhex("0000000000000007 00000001 00")
    + bytes.fromhex("00000006") + b"COLPTR" + bytes.fromhex("0000000000000009 00000001 00")
)  # fmt: skip


def index_bytes(name: bytes) -> bytes:
    """Bytes of a feature index of six rows and its four files."""
    files = [name + b"/" + file for file in (b"cumulative_sum_index.npy", b"labels.npy", b"version.npy", b"dataframe_0.parquet")]
    head = len(name).to_bytes(4, "big") + name + bytes.fromhex("0000000000000006 00000008 00000004")
    return head + b"".join(len(file).to_bytes(4, "big") + file for file in files) + b"\x00"


GOLDEN = CORE + ARRAYS + b"\x00\x00\x00\x02" + index_bytes(b"var_features") + index_bytes(b"obs_features")
NO_ARRAYS = CORE + b"\x00\x00\x00\x00"


def golden_header() -> SCDLHeader:
    """Make the worked example's header."""
    files = ["cumulative_sum_index.npy", "labels.npy", "version.npy", "dataframe_0.parquet"]
    arrays = [
        ArrayInfo("DATA", 9, ArrayDType.FLOAT32_ARRAY),
        ArrayInfo("ROWPTR", 7, ArrayDType.UINT8_ARRAY),
        ArrayInfo("COLPTR", 9, ArrayDType.UINT8_ARRAY),
    ]
    names = ["var_features", "obs_features"]
    indices = [FeatureIndexInfo(name, 6, ArrayDType.STRING_ARRAY, [f"{name}/{file}" for file in files]) for name in names]
    return SCDLHeader(arrays=arrays, feature_indices=indices)


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(lambda name: name.strip())
shapes = st.none() | st.lists(st.integers(1, 2**32 - 1), min_size=1, max_size=4).map(tuple)
lengths = st.integers(0, 2**64 - 1)
dtypes = st.sampled_from(ArrayDType)


@st.composite
def headers(draw: st.DrawFn) -> SCDLHeader:
    """Draw any header that can be written."""
    array_names, index_names = draw(st.lists(names, max_size=3, unique=True)), draw(st.lists(names, max_size=3, unique=True))
    return SCDLHeader(
        SCDLVersion(0, draw(st.integers(0, 255)), draw(st.integers(0, 255))),
        Backend.MEMMAP_V0,
        [ArrayInfo(f"a{name}", draw(lengths), draw(dtypes), draw(shapes)) for name in array_names],
        [FeatureIndexInfo(f"i{n}", draw(lengths), draw(dtypes), draw(st.lists(names, max_size=3)), draw(shapes)) for n in index_names],
        trailing=draw(st.binary(max_size=20)),
    )


def test_bytes_are_the_worked_example() -> None:
    """The worked example is written as specified, 417 bytes, and read back."""
    header = SCDLHeader.deserialize(GOLDEN)

    assert golden_header().serialize() == GOLDEN
    assert golden_header().calculate_total_size() == len(GOLDEN) == 417
    assert header.arrays == golden_header().arrays
    assert header.feature_indices == golden_header().feature_indices
    assert (header.version, header.backend, header.trailing) == (CurrentSCDLVersion(), Backend.MEMMAP_V0, b"")


def test_empty_header_has_twenty_bytes() -> None:
    """Without arrays and indices the two counts remain."""
    assert SCDLHeader().serialize() == NO_ARRAYS + bytes(4)
    assert SCDLHeader().calculate_total_size() == 20
    assert SCDLHeader.CORE_HEADER_SIZE == len(NO_ARRAYS) == 16


@given(headers())
def test_headers_return(header: SCDLHeader) -> None:
    """Every header that can be written is read back the same."""
    data = header.serialize()

    found = SCDLHeader.deserialize(data)

    assert len(data) == header.calculate_total_size()
    assert (found.version, found.backend, found.arrays, found.feature_indices, found.trailing) == (
        header.version, header.backend, header.arrays, header.feature_indices, header.trailing,
    )  # fmt: skip


@given(headers())
def test_the_reference_reads_and_writes_the_same(header: SCDLHeader) -> None:
    """The reference reads what we write, writes the same bytes less the trailing ones, and describes it alike."""
    theirs = reference.SCDLHeader.deserialize(header.serialize())
    ours = SCDLHeader.deserialize(theirs.serialize())

    assert ours.serialize() + header.trailing == header.serialize()
    assert repr(ours.arrays + ours.feature_indices) == repr(theirs.arrays + theirs.feature_indices)
    assert repr(ours) == repr(theirs)
    assert ours.to_json() == theirs.to_json()
    assert ours.to_yaml() == theirs.to_yaml()


def test_the_reference_reads_our_file(tmp_path: Path) -> None:
    """Files pass in both directions, and the reference makes the worked example too."""
    golden_header().save(tmp_path / "ours.sch")

    theirs = reference.SCDLHeader.load(str(tmp_path / "ours.sch"))
    theirs.add_array(reference.ArrayInfo("NEIGHBOR_VALUES", 3, reference_constants.ArrayDType.FLOAT32_ARRAY))
    theirs.save(str(tmp_path / "theirs.sch"))
    found = SCDLHeader.load(str(tmp_path / "theirs.sch"))

    assert theirs.version == reference.CurrentSCDLVersion()
    assert [array.name for array in found.arrays] == ["DATA", "ROWPTR", "COLPTR", "NEIGHBOR_VALUES"]
    assert found.remove_array("NEIGHBOR_VALUES")
    assert found.serialize() == GOLDEN


def test_older_headers_end_behind_the_arrays() -> None:
    """A header without the count of feature indices has none; written again it has the count."""
    header = SCDLHeader.deserialize(CORE + ARRAYS)

    assert (len(header.arrays), header.feature_indices, header.trailing) == (3, [], b"")
    assert header.serialize() == CORE + ARRAYS + bytes(4)


def test_what_is_not_known_is_kept(tmp_path: Path) -> None:
    """Unknown names, and the bytes that a newer minor version has at the end, are there after reading and saving."""
    core = bytes.fromhex("5343444c 000907 01 00000001 00000001")
    newer = core + b"\x00\x00\x00\x05BLOOM" + bytes.fromhex("00000000000000ff 00000004 00 00000000")
    (tmp_path / "header.sch").write_bytes(newer + b"what 0.9 adds")

    header = SCDLHeader.load(tmp_path / "header.sch")
    header.save(tmp_path / "again.sch")

    assert header.version == SCDLVersion(0, 9, 7)
    assert header.arrays == [ArrayInfo("BLOOM", 255, ArrayDType.UINT64_ARRAY)]
    assert header.trailing == b"what 0.9 adds"
    assert (tmp_path / "again.sch").read_bytes() == newer + b"what 0.9 adds"


@pytest.mark.parametrize("data", ["SCDL", None, 7])
def test_only_bytes_are_read(data: object) -> None:
    """What is no bytes is refused like damaged bytes; other views of bytes are read."""
    with pytest.raises(HeaderSerializationError, match="Expected bytes"):
        SCDLHeader.deserialize(data)  # type: ignore[arg-type]

    assert SCDLHeader.deserialize(memoryview(GOLDEN)).serialize() == SCDLHeader.deserialize(bytearray(GOLDEN)).serialize() == GOLDEN


def test_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    """Files and directories that cannot be read or written raise the one error with their name."""
    missing = tmp_path / "none" / "header.sch"

    with pytest.raises(HeaderSerializationError, match=f"Header file not found: {missing}"):
        SCDLHeader.load(missing)
    with pytest.raises(HeaderSerializationError, match=f"Failed to load header from {tmp_path}"):
        SCDLHeader.load(tmp_path)
    with pytest.raises(HeaderSerializationError, match=f"Failed to save header to {missing}"):
        SCDLHeader().save(missing)


def test_invalid_header_leaves_the_file(tmp_path: Path) -> None:
    """A header that cannot be written does not touch the file it would replace."""
    (tmp_path / "header.sch").write_bytes(b"before")
    header = create_header_from_arrays(["a", "a"])

    with pytest.raises(HeaderSerializationError, match="Duplicate array names found"):
        header.save(tmp_path / "header.sch")

    assert (tmp_path / "header.sch").read_bytes() == b"before"


@pytest.mark.parametrize(
    ("arrays", "indices", "message"),
    [
        (["a", "a"], [], "Duplicate array names found"),
        ([], ["a", "a"], "Duplicate feature index names found"),
        (["a"], ["a"], "Name conflicts between arrays and feature indices"),
        ([" "], [], "Empty array name found"),
        ([], [""], "Empty feature index name found"),
        (["界" * 342], [], "Array name too long"),
        ([], ["a" * 1025], "Feature index name too long"),
    ],
)
def test_names_are_validated(arrays: list[str], indices: list[str], message: str) -> None:
    """Names are there, unique over both kinds, and at most 1024 bytes."""
    header = SCDLHeader(
        arrays=[ArrayInfo(name, 1, ArrayDType.UINT8_ARRAY) for name in arrays],
        feature_indices=[FeatureIndexInfo(name, 1, ArrayDType.UINT8_ARRAY) for name in indices],
    )

    with pytest.raises(HeaderSerializationError, match=message):
        header.validate()
    with pytest.raises(HeaderSerializationError):
        header.serialize()


def test_long_names_pass() -> None:
    """A name of 1024 bytes is the longest."""
    header = create_header_from_arrays(["a" * 1024])

    assert SCDLHeader.deserialize(header.serialize()).arrays[0].name == "a" * 1024


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (SCDLHeader(SCDLVersion(999)), r"Unsupported version: 999\.0\.0"),
        (SCDLHeader(SCDLVersion(0, 256)), "uint8 value 256 out of range"),
        (SCDLHeader(backend=7), "Invalid backend value: 7"),  # type: ignore[arg-type]
    ],
)
def test_foreign_versions_and_backends_are_not_written(header: SCDLHeader, message: str) -> None:
    """What could not be read is not written."""
    with pytest.raises(HeaderSerializationError, match=message):
        header.serialize()


def test_entries_are_added_found_and_removed() -> None:
    """Entries are found by name; removing says whether there was one."""
    header = SCDLHeader()
    array, index = ArrayInfo("a", 1, ArrayDType.UINT8_ARRAY), FeatureIndexInfo("i", 2, ArrayDType.STRING_ARRAY)

    header.add_array(array)
    header.add_feature_index(index)

    assert header.get_array("a") is array
    assert header.get_feature_index("i") is index
    assert header.get_array("i") is None
    assert header.get_feature_index("a") is None
    assert (header.remove_array("a"), header.remove_array("a")) == (True, False)
    assert (header.remove_feature_index("i"), header.remove_feature_index("i")) == (True, False)
    assert (header.arrays, header.feature_indices) == ([], [])


def test_header_prints_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text counts, JSON and YAML list; YAML needs its package and says so."""
    header = golden_header()
    header.arrays[0].shape = (3, 3)

    assert str(header) == repr(header) == "SCDLHeader(version=0.1.0, backend=MEMMAP_V0, arrays=3, feature_indices=2)"
    assert json.loads(header.to_json())["version"] == {"major": 0, "minor": 1, "point": 0}
    assert json.loads(header.to_json())["arrays"][0] == {"name": "DATA", "length": 9, "dtype": "FLOAT32_ARRAY", "shape": [3, 3]}
    assert yaml.safe_load(header.to_yaml())["version"] == "0.1.0"
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(RuntimeError, match="PyYAML is required"):
        header.to_yaml()


def test_reader_reads_once(tmp_path: Path) -> None:
    """The reader tells magic, version, backend, count and the whole header, and keeps them."""
    golden_header().save(tmp_path / "header.sch")
    reader = HeaderReader(tmp_path / "header.sch")

    found = (reader.validate_magic(), reader.get_version(), reader.get_backend(), reader.get_array_count())
    full = reader.get_full_header()
    (tmp_path / "header.sch").unlink()

    assert found == (True, CurrentSCDLVersion(), Backend.MEMMAP_V0, 3)
    assert full.serialize() == GOLDEN
    assert reader.get_full_header() is full
    assert reader.get_array_count() == 3


def test_reader_names_damage(tmp_path: Path) -> None:
    """The reader says no to foreign beginnings and raises the one error; a newer major version still has a number."""
    file = tmp_path / "header.sch"

    with pytest.raises(MissingFileError, match=str(file)):
        HeaderReader(file).validate_magic()
    file.write_bytes(b"FAKE" + GOLDEN[4:])
    assert not HeaderReader(file).validate_magic()
    with pytest.raises(ArchiveError, match="Invalid magic number"):
        HeaderReader(file).get_version()
    file.write_bytes(b"SCDL\x02" + GOLDEN[5:])
    assert HeaderReader(file).get_version() == SCDLVersion(2, 1, 0)
    with pytest.raises(HeaderSerializationError, match="Unsupported version"):
        HeaderReader(file).get_array_count()
    file.write_bytes(GOLDEN[:11] + b"\x09" + GOLDEN[12:])
    with pytest.raises(HeaderSerializationError, match="Invalid backend value: 9"):
        HeaderReader(file).get_backend()
    file.write_bytes(GOLDEN[:9])
    with pytest.raises(HeaderSerializationError, match="too short"):
        HeaderReader(file).get_version()


def test_placeholders_are_made_from_files() -> None:
    """Files become arrays of their names, of length 0 and float32."""
    header = create_header_from_arrays(["x/a.dat", "b.dat"], version=SCDLVersion(0, 0, 2))

    assert header.arrays == [ArrayInfo(name, 0, ArrayDType.FLOAT32_ARRAY) for name in ("a.dat", "b.dat")]
    assert header.version == SCDLVersion(0, 0, 2)


def test_headers_merge() -> None:
    """Headers without a name in common join, under the higher minor version."""
    first, second = golden_header(), create_header_from_arrays(["x"], version=SCDLVersion(0, 2, 0))

    merged = merge_headers(first, second)

    assert validate_header_compatibility(first, second)
    assert [array.name for array in merged.arrays] == ["DATA", "ROWPTR", "COLPTR", "x"]
    assert merged.feature_indices == first.feature_indices
    assert merged.version == merge_headers(second, first).version == SCDLVersion(0, 2, 0)
    assert len(first.arrays) == 3


@pytest.mark.parametrize(
    "other",
    [
        create_header_from_arrays(["DATA"]),
        create_header_from_arrays(["var_features"]),
        SCDLHeader(SCDLVersion(1, 0, 0)),
        SCDLHeader(backend=999),  # type: ignore[arg-type]
    ],
    ids=["array", "array and index", "major version", "backend"],
)
def test_incompatible_headers_do_not_merge(other: SCDLHeader) -> None:
    """A name in common, of whichever kind, another major version and another backend stand in the way."""
    assert not validate_header_compatibility(golden_header(), other)
    with pytest.raises(HeaderSerializationError, match="Headers are not compatible"):
        merge_headers(golden_header(), other)


def test_module_offers_the_references_names() -> None:
    """What the reference's module defines is here under the same names."""
    defined = {name for name, value in vars(reference).items() if getattr(value, "__module__", None) == reference.__name__}

    assert defined <= set(header_module.__all__)
