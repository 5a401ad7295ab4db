"""The fixed names and codes of an archive: files, dtypes, backends, modes.

Knows what may be stored and how it is spelt on disk, not how it is read or written. Values are the reference's,
strings and codes alike: they are in files and in the code of others, so none is ever renumbered.
"""

import re
from collections.abc import Iterable
from enum import Enum, IntEnum

import numpy as np
from numpy.typing import DTypeLike

# The dtypes that values may have, in two families, narrowest first.
INT_ORDER = ["uint8", "uint16", "uint32", "uint64"]
FLOAT_ORDER = ["float16", "float32", "float64"]


class FileNames(str, Enum):  # noqa: UP042 (a StrEnum prints as its value, which the reference's does not)
    """Files and directories of an archive; the member names of the arrays are their names in the header."""

    DATA = "data.npy"
    ROWPTR = "row_ptr.npy"
    COLPTR = "col_ptr.npy"
    NEIGHBOR_INDICES = "neighbor_indices.npy"
    NEIGHBOR_INDICES_PTR = "neighbor_indptr.npy"
    NEIGHBOR_VALUES = "neighbor_values.npy"
    METADATA = "metadata.json"
    FEATURES = "features"
    VAR_FEATURES = "var_features"
    OBS_FEATURES = "obs_features"
    VERSION = "version.json"
    HEADER = "header.sch"


class ArrayDType(IntEnum):
    """Codes of dtypes in the header."""

    UINT8_ARRAY = 1
    UINT16_ARRAY = 2
    UINT32_ARRAY = 3
    UINT64_ARRAY = 4
    FLOAT16_ARRAY = 5
    FLOAT32_ARRAY = 6
    FLOAT64_ARRAY = 7
    STRING_ARRAY = 8
    FIXED_STRING_ARRAY = 9

    @property
    def numpy_dtype_string(self) -> str:
        """Name the dtype as NumPy does: "uint8" to "float64"; "string" and "fixed_string" for the other two."""
        return self.name.removesuffix("_ARRAY").lower()

    @classmethod
    def from_numpy_dtype(cls, dtype: object) -> "ArrayDType":
        """Find the code of a dtype.

        dtype: a scalar class, a dtype, anything that has a dtype, or a string such as "uint8", "<f4", "<U5".
        Raises ValueError for signed integers and for whatever else has no code.
        """
        name = _dtype_name(dtype)
        if name.startswith(("<U", ">U")):
            return cls.FIXED_STRING_ARRAY
        if name in ("object", "str"):
            return cls.STRING_ARRAY
        if re.match(r"[<>|=]i|(i4|i8|int32|int64)$", name):
            raise ValueError(f"Signed integer dtypes are not supported: {name}; cast to one of {INT_ORDER + FLOAT_ORDER} first")
        if sized := re.fullmatch(r"[<>|=]?(u[1248]|f[248])", name):
            name = np.dtype(sized[1]).name
        if name in INT_ORDER + FLOAT_ORDER:
            return cls[f"{name.upper()}_ARRAY"]
        raise ValueError(f"Unsupported numpy dtype: {name} (original: {dtype}); the storable ones are {INT_ORDER + FLOAT_ORDER}")


class Backend(IntEnum):
    """Codes of the layouts of an archive's arrays."""

    MEMMAP_V0 = 1
    PACKED_V1 = 2  # ours alone: bionemo-scdl refuses what it cannot read


class Mode(str, Enum):  # noqa: UP042 (as above)
    """How files are opened, spelt as for `open`."""

    CREATE_APPEND = "w+"
    READ_APPEND = "r+"
    READ = "r"
    CREATE = "w"


class NeighborSamplingStrategy(str, Enum):  # noqa: UP042 (as above)
    """Which of a row's neighbours is taken."""

    RANDOM = "random"
    FIRST = "first"


def smallest_uint_dtype(x: int) -> str:
    """Name the narrowest unsigned dtype that holds `x`.

    Raises ValueError where x is negative or 2**64 and more.
    """
    if x < 0:
        raise ValueError(f"Negative numbers can't be unsigned. Got {x}")
    for name in INT_ORDER:
        if x <= np.iinfo(name).max:
            return name
    raise ValueError(f"No unsigned integer dtype can represent the given number: {x}, the largest is 2**64 - 1")


def determine_dtype(dtypes: Iterable[DTypeLike]) -> str:
    """Name the widest of `dtypes`, which must all be unsigned integers or all floats.

    Raises ValueError for no dtypes, for a mixture, and for any other dtype.
    """
    names = {np.dtype(dtype).name for dtype in dtypes}
    if not names:
        raise ValueError("No dtypes provided")
    for family in (INT_ORDER, FLOAT_ORDER):
        if names <= set(family):
            return max(names, key=family.index)
    raise ValueError(
        f"Mixed float and integer dtype families not allowed: {sorted(names)}; "
        f"bring them to one dtype first, with cast_data_to_dtype or --data-dtype"
    )


def _dtype_name(dtype: object) -> str:
    if isinstance(dtype, type):
        return dtype.__name__
    dtype = getattr(dtype, "dtype", dtype)  # before `name`: a pandas Series has both
    return str(getattr(dtype, "name", dtype))
