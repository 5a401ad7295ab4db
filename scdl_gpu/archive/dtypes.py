"""Which dtype each array of a raw archive has, and which dtype values of several have in common.

Knows the header, file sizes and the first values; the header decides, except where the files show that it is
wrong. bionemo-scdl leaves such archives: it casts and widens the arrays of a reopened archive and keeps the old
header, and it recorded signed integers as float32. Two dtypes of one width are told apart by SAMPLE values, which
can err; archives of this package record a hash of their first HEAD_BYTES, 0.1 ms to check, and are never guessed at.
"""

import logging
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from scdl_gpu import callers
from scdl_gpu.archive import remarks
from scdl_gpu.archive.constants import FLOAT_ORDER, INT_ORDER, FileNames
from scdl_gpu.archive.header import ArrayInfo, SCDLHeader
from scdl_gpu.archive.maps import map_array
from scdl_gpu.errors import ArchiveError

logger = logging.getLogger(__name__)

DATA, ROWPTR, COLPTR = FileNames.DATA.value, FileNames.ROWPTR.value, FileNames.COLPTR.value
STORABLE = INT_ORDER + FLOAT_ORDER
SAMPLE = 1024
EVIDENCE = 16
"""Stored values, not zero, from which on a guess about their dtype is worth an error."""
HEAD_BYTES = 1 << 16
"""Bytes at the begin of the values that tell whether they were written anew: a cast changes some of them, if not all are zero."""

DEFAULT_DTYPES: dict[str, str] = {
    DATA: "float32",
    COLPTR: "uint32",
    ROWPTR: "uint64",
    FileNames.NEIGHBOR_INDICES.value: "uint32",
    FileNames.NEIGHBOR_INDICES_PTR.value: "uint64",
    FileNames.NEIGHBOR_VALUES.value: "float32",
}
"""dtype of each array file where nothing says otherwise."""


def exact_dtype(dtypes: Iterable[np.dtype[Any]]) -> np.dtype[Any] | None:
    """Return the dtype that NumPy gives values of all these, None where it would round some of them.

    No float holds all integers of 64 bits, and no integer those of int64 and uint64; narrower ones meet in a float wide enough.
    """
    kinds = set(dtypes)
    made = np.result_type(*kinds)
    digits = np.finfo(made).nmant + 1 if made.kind == "f" else 64
    widest = max((8 * dtype.itemsize - (dtype.kind == "i") for dtype in kinds if dtype.kind in "iu"), default=0)
    return made if widest <= digits else None


def value_record(directory: Path, dtype: str, nnz: int) -> dict[str, str]:
    """Return what metadata.json records of the values in `directory`: their dtype, and a hash of the first of the `nnz`."""
    with (directory / DATA).open("rb") as stream:
        head = stream.read(min(HEAD_BYTES, nnz * _item_bytes(dtype)))
    return {"data_dtype": dtype, "data_head": xxhash.xxh3_64_hexdigest(head) if any(head) else ""}


def is_vouched(path: Path, header: SCDLHeader | None, metadata: dict[str, Any]) -> bool:
    """Tell whether the values are still those that this package wrote, in the dtype that the header says.

    Reads HEAD_BYTES; values appended since do not count. False where the first values are all zero: they look alike in every dtype.
    """
    info = header.get_array(FileNames.DATA.name) if header is not None else None
    dtype, nnz = metadata.get("data_dtype"), metadata.get("nnz")
    if info is None or dtype != info.dtype.numpy_dtype_string or dtype not in STORABLE or type(nnz) is not int or nnz < 0:
        return False
    head = value_record(path, dtype, nnz)["data_head"]
    return bool(head) and metadata.get("data_head") == head


def array_dtypes(
    path: Path,
    header: SCDLHeader | None,
    sizes: dict[str, int],
    *,
    n_rows: int | None,
    data_dtype: str | None,
    vouched: bool = False,
) -> dict[str, str]:
    """Return the dtype of each array file of the archive at `path`, by file name. Costs O(1).

    sizes: bytes of the three array files; n_rows: rows that the features describe, None where they do not tell.
    data_dtype: of the values, for an archive without header or whose header is wrong about them.
    vouched: as `is_vouched` tells; the header is right about values of its width then. Where nothing vouches for it,
    a `data_dtype` of that width is followed, with a warning unless the values show it.
    Raises ArchiveError where the files leave it open, asking for `data_dtype`; ValueError for one that is not storable.
    """
    if data_dtype is not None and data_dtype not in STORABLE:
        raise ValueError(f"data_dtype {data_dtype!r} is not storable; expected one of {STORABLE}")
    if header is None:
        dtypes = DEFAULT_DTYPES | _headerless(path, sizes, n_rows, data_dtype)
    else:
        dtypes = DEFAULT_DTYPES | {
            FileNames[array.name].value: _storable(path, array)
            for array in header.arrays
            if array.name in FileNames.__members__ and FileNames[array.name].value in DEFAULT_DTYPES
        }
        if n_rows is not None:
            dtypes |= _widened(path, dtypes, sizes, n_rows)
        nnz = sizes[COLPTR] // _item_bytes(dtypes[COLPTR])
        if data_dtype is not None and sizes[DATA] != nnz * _item_bytes(dtypes[DATA]):
            dtypes[DATA] = data_dtype
    if not vouched:
        dtypes[DATA] = _plausible(path, dtypes[DATA], sizes[DATA], data_dtype)
    if header is None and data_dtype is None:
        text = f"SCDL header missing at {path / FileNames.HEADER.value}; the values are taken for float32"
        remarks.say(partial(callers.warn, text))
    return dtypes


def _item_bytes(dtype: str) -> int:
    return np.dtype(dtype).itemsize


def _storable(path: Path, array: ArrayInfo) -> str:
    allowed = INT_ORDER if array.name in (FileNames.ROWPTR.name, FileNames.COLPTR.name) else STORABLE
    dtype = array.dtype.numpy_dtype_string
    if dtype not in allowed:
        raise ArchiveError(
            f"{path / FileNames.HEADER.value}: array {array.name} is recorded as {dtype}, expected one of {allowed}; "
            f"copy the archive again, or convert the source anew"
        )
    return dtype


def _widened(path: Path, dtypes: dict[str, str], sizes: dict[str, int], n_rows: int) -> dict[str, str]:
    """Find row pointers and columns that are wider than the header says, and their dtypes; the number of rows tells."""
    found: dict[str, str] = {}
    for name in (ROWPTR, COLPTR):
        n = n_rows + 1 if name == ROWPTR else _last_pointer(path, found.get(ROWPTR, dtypes[ROWPTR]), sizes)
        recorded = _item_bytes(dtypes[name])
        wider = [8 * k for k in (2, 4, 8) if k > recorded and sizes[name] == n * k > 0]
        if wider:
            found[name] = f"uint{wider[0]}"
            text = "%s holds %s, its header says %s: another program widened it"
            remarks.say(partial(logger.warning, text, path / name, found[name], dtypes[name]))
    return found


def _last_pointer(path: Path, dtype: str, sizes: dict[str, int]) -> int:
    """Return the last row pointer, 0 where there is none to be read."""
    if sizes[ROWPTR] == 0 or sizes[ROWPTR] % _item_bytes(dtype):
        return 0
    return int(map_array(path, ROWPTR, dtype)[-1])


def _headerless(path: Path, sizes: dict[str, int], n_rows: int | None, data_dtype: str | None) -> dict[str, str]:
    """Item sizes of an archive without header.sch, from file sizes and the number of rows."""
    item = sizes[ROWPTR] // (n_rows + 1) if n_rows is not None else 8
    if item not in (1, 2, 4, 8) or sizes[ROWPTR] % item:
        item = 8
    if sizes[ROWPTR] < item:
        raise ArchiveError(f"{path / ROWPTR}: {sizes[ROWPTR]} bytes, expected at least {item}; copy the archive again")
    nnz = int(map_array(path, ROWPTR, f"uint{8 * item}")[-1])
    column_bytes, data_bytes = ((sizes[name] / nnz if nnz else 4) for name in (COLPTR, DATA))
    if column_bytes not in (1, 2, 4, 8):
        raise ArchiveError(
            f"{path / COLPTR}: {sizes[COLPTR]:,} bytes do not divide into {nnz:,} columns, which {ROWPTR} promises; "
            f"the archive has no header.sch and its files do not agree: copy it again, or convert the source anew"
        )
    if data_dtype is None and data_bytes != 4:
        raise ArchiveError(
            f"{path / DATA}: {sizes[DATA]:,} bytes for {nnz:,} values, and no header.sch says of which dtype; "
            f"open the archive with data_dtype= (--stored-dtype), one of {STORABLE}"
        )
    if data_dtype is not None and data_bytes != _item_bytes(data_dtype) and nnz:
        raise ArchiveError(
            f"{path / DATA}: {data_bytes:g} bytes a value, which data_dtype {data_dtype!r} cannot be; try another (--stored-dtype)"
        )
    return {DATA: data_dtype or "float32", ROWPTR: f"uint{8 * item}", COLPTR: f"uint{8 * int(column_bytes)}"}


def _plausible(path: Path, dtype: str, data_bytes: int, data_dtype: str | None) -> str:
    """Return the dtype of the values: `dtype`, or `data_dtype` where that is of the same width."""
    if data_dtype == dtype or data_bytes % _item_bytes(dtype) or data_bytes == 0:
        return dtype
    guess = _guess(np.array(map_array(path, DATA, dtype)[:SAMPLE]))
    if data_dtype is not None and _item_bytes(data_dtype) == _item_bytes(dtype):
        if guess is None:
            text = (
                f"{path / DATA}: the archive's header says {dtype}; its values are read as data_dtype={data_dtype!r} (--stored-dtype), "
                f"as asked. Leave that out if the header is right"
            )
            remarks.say(partial(callers.warn, text))
        return data_dtype
    if guess is None:
        return dtype
    raise ArchiveError(
        f"{path / DATA}: its values are recorded as {dtype}, or taken for it, but look like {guess}: bionemo-scdl leaves such archives "
        f"where it casts one that was opened from disk, and for signed integers. Open it with data_dtype={guess!r} (--stored-dtype), "
        f"or with data_dtype={dtype!r} if that is what they are; save() then records it"
    )


def _guess(values: NDArray[Any]) -> str | None:
    """Name the dtype of the other family, of the same width, that the first values of an archive must have; None for none.

    Counts read as floats are all subnormal; floats that hold counts, read as integers, are all patterns of whole
    floats, 1.0 among them.
    """
    width = 8 * values.dtype.itemsize
    if width == 8:
        return None
    bits = values.view(f"u{values.dtype.itemsize}")
    bits = bits[bits != 0]
    if bits.size < EVIDENCE:
        return None
    floats = bits.view(f"f{values.dtype.itemsize}")
    if values.dtype.kind == "f":
        return f"uint{width}" if bool((bits < np.finfo(values.dtype).smallest_normal.view(bits.dtype)).all()) else None
    with np.errstate(invalid="ignore"):
        whole = np.isfinite(floats) & (floats >= 1) & (np.floor(floats) == floats)
    return f"float{width}" if bool(whole.all()) and bool((floats == 1).any()) else None
