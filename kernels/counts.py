"""Decoded values, counts or values of a source dtype, into the dtype of a batch: conversions of packed rows, in Numba.

Knows arrays, not rows. What a value becomes is what kernels/stored.py makes of the same value from a raw shard; small
counts have loops of their own, since signed 32-bit integers turn into floats in one instruction and unsigned ones do not.
"""

import numpy as np
from llvmlite import ir
from numba import carray, types  # type: ignore[attr-defined]
from numba.extending import intrinsic, overload

from scdl_gpu.kernels.packed import SOURCES
from scdl_gpu.kernels.shards import KINDS, STORED
from scdl_gpu.kernels.stored import BFLOAT16, convert, copy_values, jit, narrowed, pointer, worth

UINT16 = KINDS.index("uint16")
STORED_AS = np.array([STORED.index("uint8" if name == "bool" else name) if name[0] != "i" else -1 for name in SOURCES], np.int64)
"""Code among the stored dtypes of each source that raw archives have too; -1 for signed ones."""
INT8, INT16, INT32 = (SOURCES.index(name) + 1 for name in ("int8", "int16", "int32"))


@intrinsic
def bits_of_single(typing, number):
    """Take a float32 as a uint32."""
    return types.uint32(types.float32), lambda context, builder, signature, args: builder.bitcast(args[0], ir.IntType(32))


def convert_counts(counts, is_small, kind, out):
    """Convert counts to `out`, (n,) each, counts uint32; is_small: none above 2^24. Returns whether all fit. Within Numba only."""
    raise NotImplementedError


def convert_signed(stored, kind, out):
    """Convert signed integers in the same way."""
    raise NotImplementedError


def _into_integers(stored, out):
    """Make the loop that converts integers to narrower ones, or signed ones to unsigned; only those that fit pass."""
    low, high = max(stored.minval, out.minval), min(stored.maxval, out.maxval)

    def loop(stored, kind, out):
        smallest = largest = stored.dtype.type(0)
        for k in range(np.uint64(out.size)):
            out[k] = stored[k]
            smallest, largest = min(smallest, stored[k]), max(largest, stored[k])
        return smallest >= low and largest <= high

    return loop


@jit
def _into_uint16(counts, out):
    largest = np.uint32(0)
    for k in range(np.uint64(out.size)):
        out[k] = counts[k]
        largest = max(largest, counts[k])
    return largest <= np.uint32(0xFFFF)


@jit
def _into_halves(counts, kind, out):
    """Round counts 1..2^24, which float32 holds, to float16 or bfloat16, by their bits."""
    if kind == BFLOAT16:
        for k in range(np.uint64(out.size)):
            bits = bits_of_single(np.float32(np.int32(counts[k])))
            out[k] = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    else:
        for k in range(np.uint64(out.size)):
            bits = bits_of_single(np.float32(np.int32(counts[k])))
            rounded = (bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))) >> np.uint32(13)
            out[k] = min(np.uint32(rounded - np.uint32(112 << 10)), np.uint32(0x7C00))


@overload(convert_counts)
def _convert_counts(counts, is_small, kind, out):
    if out.dtype == types.uint16:

        def halves(counts, is_small, kind, out):
            if kind == UINT16:
                return _into_uint16(counts, out)
            if is_small:
                _into_halves(counts, kind, out)
                return True
            return convert(counts, kind, out)

        return halves
    if isinstance(out.dtype, types.Integer):
        return lambda counts, is_small, kind, out: convert(counts, kind, out)

    def floats(counts, is_small, kind, out):
        if is_small:
            for k in range(np.uint64(out.size)):
                out[k] = np.int32(counts[k])
        else:
            for k in range(np.uint64(out.size)):
                out[k] = counts[k]
        return True

    return floats


@overload(convert_signed)
def _convert_signed(stored, kind, out):
    if out.dtype == types.uint16:
        integers = _jitted(_into_integers(stored.dtype, out.dtype))

        def halves(stored, kind, out):
            if kind == UINT16:
                return integers(stored, kind, out)
            for k in range(np.uint64(out.size)):
                value = np.int64(stored[k])
                size = worth(np.uint64(value if value >= 0 else -value))
                out[k] = narrowed(size if value >= 0 else -size, kind)
            return True

        return halves
    if isinstance(out.dtype, types.Integer):
        return _into_integers(stored.dtype, out.dtype)

    def floats(stored, kind, out):
        for k in range(np.uint64(out.size)):
            out[k] = stored[k]
        return True

    return floats


def _jitted(function):
    return jit(function)


@jit
def convert_stored(address, source, kind, out):
    """Convert out.size values of a source dtype, by its code, from `address`; returns whether all fit."""
    at, n = pointer(np.uint64(address)), out.size
    if source == INT8:
        return convert_signed(carray(at, (n,), np.int8), kind, out)
    if source == INT16:
        return convert_signed(carray(at, (n,), np.int16), kind, out)
    if source == INT32:
        return convert_signed(carray(at, (n,), np.int32), kind, out)
    if STORED_AS[np.uint64(source - 1)] < 0:
        return convert_signed(carray(at, (n,), np.int64), kind, out)
    if kind == UINT16:
        return False  # a row with raw bits holds something else than an integer 1..65,535
    return copy_values(np.uint64(address), STORED_AS[np.uint64(source - 1)], kind, out)
