"""Names, codes and the choice of dtypes."""

import numpy as np
import pytest
from bionemo.scdl.util import memmap_utils as reference_memmap
from bionemo.scdl.util import scdl_constants as reference

from scdl_gpu.archive import constants
from scdl_gpu.archive.constants import (
    FLOAT_ORDER,
    INT_ORDER,
    ArrayDType,
    FileNames,
    Mode,
    NeighborSamplingStrategy,
    determine_dtype,
    smallest_uint_dtype,
)


@pytest.mark.parametrize("name", ["FileNames", "ArrayDType", "Backend", "Mode", "NeighborSamplingStrategy"])
def test_members_are_the_references(name: str) -> None:
    """Every enumeration has the reference's members, values and order, and prints as it does; one backend is ours alone."""
    own = {constants.Backend.PACKED_V1} if name == "Backend" else set()
    ours, theirs = [member for member in getattr(constants, name) if member not in own], list(getattr(reference, name))

    assert [(member.name, member.value, str(member)) for member in ours] == [(m.name, m.value, str(m)) for m in theirs]


def test_members_equal_plain_strings() -> None:
    """Names, modes and strategies compare equal to the strings that they stand for."""
    assert FileNames.ROWPTR == "row_ptr.npy"
    assert Mode.CREATE_APPEND == "w+"
    assert NeighborSamplingStrategy("first") is NeighborSamplingStrategy.FIRST
    assert NeighborSamplingStrategy.RANDOM == "random"


def test_families_are_the_storable_dtypes() -> None:
    """Values may be four unsigned integers and three floats, narrowest first."""
    assert INT_ORDER == ["uint8", "uint16", "uint32", "uint64"]
    assert FLOAT_ORDER == ["float16", "float32", "float64"]


def test_dtype_names_are_numpys() -> None:
    """Each code names its NumPy dtype; the two of strings have names of their own."""
    names = [dtype.numpy_dtype_string for dtype in ArrayDType]

    assert names == ["uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64", "string", "fixed_string"]


NUMBERS = list(enumerate(["uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64"], start=1))


@pytest.mark.parametrize(("code", "name"), NUMBERS)
def test_numeric_dtypes_have_codes(code: int, name: str) -> None:
    """A number's dtype is understood as class, dtype of either byte order, array, name and type string."""
    dtype = np.dtype(name)
    spellings = [dtype.type, dtype, dtype.newbyteorder(">"), np.zeros(1, dtype), name, dtype.str, f"<{dtype.str[1:]}", f">{dtype.str[1:]}"]

    codes = [ArrayDType.from_numpy_dtype(spelling) for spelling in spellings]

    assert codes == [code] * len(spellings)


@pytest.mark.parametrize(
    ("dtype", "code"),
    [(object, 8), (np.dtype(object), 8), ("object", 8), (str, 8), ("str", 8), ("<U5", 9), (">U12", 9), ("f4", 6), ("f8", 7)],
)
def test_other_dtypes_have_codes(dtype: object, code: int) -> None:
    """Objects are strings, `<U` is a fixed string; as in the reference."""
    assert ArrayDType.from_numpy_dtype(dtype) == code == reference.ArrayDType.from_numpy_dtype(dtype)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.dtype("int64"), "int32", "<i4", ">i8", "<i2"])
def test_signed_dtypes_are_refused(dtype: object) -> None:
    """Signed integers have no code, and the error says what has."""
    with pytest.raises(ValueError, match=r"Signed integer dtypes are not supported: .*'uint8'"):
        ArrayDType.from_numpy_dtype(dtype)


@pytest.mark.parametrize(
    "dtype", [np.int8, np.int16, bool, np.complex128, "complex128", "invalid_dtype", np.dtype("U5"), "<u3", "<f16", None]
)
def test_foreign_dtypes_are_refused(dtype: object) -> None:
    """Whatever else has no code is named as it was given."""
    with pytest.raises(ValueError, match="Unsupported numpy dtype") as caught:
        ArrayDType.from_numpy_dtype(dtype)

    assert f"(original: {dtype})" in str(caught.value)


@pytest.mark.parametrize(("bits", "wider"), [(8, "uint16"), (16, "uint32"), (32, "uint64")])
def test_smallest_uint_changes_at_powers(bits: int, wider: str) -> None:
    """The largest value of a dtype still fits it, the next does not."""
    assert smallest_uint_dtype(2**bits - 1) == f"uint{bits}"
    assert smallest_uint_dtype(2**bits) == wider


def test_smallest_uint_has_limits() -> None:
    """From 0 to 2**64 - 1, and nothing beyond."""
    assert smallest_uint_dtype(0) == "uint8"
    assert smallest_uint_dtype(2**64 - 1) == "uint64"
    with pytest.raises(ValueError, match=r"Negative numbers can't be unsigned\."):
        smallest_uint_dtype(-1)
    with pytest.raises(ValueError, match=str(2**64)):
        smallest_uint_dtype(2**64)


@pytest.mark.parametrize(
    ("dtypes", "widest"),
    [
        ([np.uint64, np.uint16, np.uint32], "uint64"),
        (["uint8", np.dtype("uint16")], "uint16"),
        (["float32", "float16"], "float32"),
        ([">f8", "float32"], "float64"),
        (["uint8"], "uint8"),
    ],
)
def test_determine_takes_the_widest(dtypes: list[object], widest: str) -> None:
    """Within a family the widest holds them all."""
    assert determine_dtype(dtypes) == widest == reference_memmap.determine_dtype(dtypes)


def test_determine_takes_an_iterator() -> None:
    """Dtypes may come from anything that can be iterated once."""
    assert determine_dtype(name for name in ["uint8", "uint32"]) == "uint32"


def test_determine_refuses_mixtures() -> None:
    """Integers with floats, and dtypes outside both families, are named and the cure with them."""
    with pytest.raises(ValueError, match="No dtypes provided"):
        determine_dtype([])
    mixed = r"Mixed float and integer dtype families not allowed: \['float32', 'uint8'\]"
    with pytest.raises(ValueError, match=f"{mixed}.*cast_data_to_dtype.*--data-dtype"):
        determine_dtype(["uint8", np.float32, "uint8"])
    with pytest.raises(ValueError, match=r"families not allowed: \['int32'\]"):
        determine_dtype([np.int32])
