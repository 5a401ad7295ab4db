"""Stored columns and values, by address, into the dtypes of a batch: the conversions of common.cuh, in Numba.

Knows bytes and dtypes, not rows of a batch. Each loop is compiled for one stored and one made dtype, so that it
vectorises; which one runs is looked up once a row, at a cost of some nanoseconds. Numba computes in neither of the
16-bit floats: an output of uint16 is one of them, as bits.
"""

import numpy as np
from llvmlite import ir
from numba import carray, njit, types  # type: ignore[attr-defined]
from numba.core import cgutils
from numba.extending import intrinsic, overload

from scdl_gpu.kernels.shards import KINDS

jit = njit(nogil=True, cache=True, boundscheck=False, error_model="numpy")
ONE = np.uint64(1)
MANTISSA = np.uint64(52)
BFLOAT16, FLOAT16 = KINDS.index("bfloat16"), KINDS.index("float16")


@intrinsic
def pointer(typing, address):
    """Take a uint64 as an address."""
    return types.voidptr(types.uint64), lambda context, builder, signature, args: builder.inttoptr(args[0], cgutils.voidptr_t)


@intrinsic
def bits_of(typing, number):
    """Take a float64 as a uint64."""
    return types.uint64(types.float64), lambda context, builder, signature, args: builder.bitcast(args[0], ir.IntType(64))


@intrinsic
def number_of(typing, bits):
    """Take a uint64 as a float64."""
    return types.float64(types.uint64), lambda context, builder, signature, args: builder.bitcast(args[0], ir.DoubleType())


@intrinsic
def count_ones(typing, bits):
    """Count the ones of a uint64."""
    return types.uint64(types.uint64), lambda context, builder, signature, args: builder.ctpop(args[0])


@jit
def narrowed(number, kind):
    """Round a float64 to float16 or bfloat16, to nearest even; returns the bits. A NaN becomes the quiet one."""
    mantissa_bits, most = (7, 127) if kind == BFLOAT16 else (10, 15)
    bits = bits_of(number)
    sign = (bits >> np.uint64(63)) << np.uint64(15)
    exponent = np.int64((bits >> MANTISSA) & np.uint64(0x7FF)) - 1023
    fraction = bits & np.uint64(0xFFFFFFFFFFFFF)
    infinity = sign | np.uint64((2 * most + 1) << mantissa_bits)
    if exponent == 1024 and fraction:
        return np.uint16(infinity | np.uint64(1 << (mantissa_bits - 1)))
    if exponent > most:
        return np.uint16(infinity)
    least = 1 - most
    if exponent < least - mantissa_bits - 1:
        return np.uint16(sign)
    drop = np.uint64(52 - mantissa_bits + max(0, least - exponent))
    whole = fraction | (ONE << MANTISSA)
    kept, rest, tie = whole >> drop, whole & ((ONE << drop) - ONE), ONE << (drop - ONE)
    if rest > tie or (rest == tie and kept & ONE):
        kept += ONE
    if exponent > least:
        kept += np.uint64(exponent - least) << np.uint64(mantissa_bits)
    return np.uint16(sign | kept)


@jit
def widened(bits):
    """Give the float64 that the bits of a float16 are."""
    bits = np.uint64(bits)
    sign, exponent, fraction = bits >> np.uint64(15), (bits >> np.uint64(10)) & np.uint64(31), bits & np.uint64(1023)
    if exponent == 0:
        tiny = np.float64(fraction) / 16777216.0
        return -tiny if sign else tiny
    wide = np.uint64(2047) if exponent == 31 else exponent + np.uint64(1023 - 15)
    return number_of((sign << np.uint64(63)) | (wide << MANTISSA) | (fraction << np.uint64(42)))


@jit
def worth(integer):
    """Give the float64 of a uint64 that rounds further as the integer would; see common.cuh."""
    if integer >> np.uint64(53):
        return np.float64((integer >> np.uint64(11)) | np.uint64((integer & np.uint64(2047)) != 0)) * 2048.0
    return np.float64(integer)


def convert(stored, kind, out):
    """Convert `stored` to `out`, (n,) each, kind: of out; returns whether all fit. Within Numba only: a loop for each pair of dtypes."""
    raise NotImplementedError


def convert_halves(stored, kind, out):
    """Convert float16, given as bits, in the same way."""
    raise NotImplementedError


def _into_integers(out, number):
    """Make the loop that converts floats to integers: `number` gives the float64 of an element; only whole ones that fit pass."""
    info = np.iinfo(str(out.dtype))
    low, limit = float(info.min), 2.0 ** (info.bits - (info.kind == "i"))

    def loop(stored, kind, out):
        fits = True
        for k in range(np.uint64(out.size)):
            x = number(stored[k])
            if low <= x < limit and x == np.floor(x):
                out[k] = np.int64(x)
            else:
                out[k] = 0
                fits = False
        return fits

    return loop


def _into_narrow(number):
    def loop(stored, kind, out):
        for k in range(np.uint64(out.size)):
            out[k] = narrowed(number(stored[k]), kind)
        return True

    return loop


@jit
def _same(x):
    return np.float64(x)


@overload(convert)
def _convert(stored, kind, out):
    source, made = stored.dtype, out.dtype
    from_integers = isinstance(source, types.Integer)
    if made == types.uint16:
        return _into_narrow(worth if from_integers else _same)
    if isinstance(made, types.Integer) and not from_integers:
        return _into_integers(out, _same)
    if from_integers and isinstance(made, types.Integer) and source.maxval > made.maxval:
        most = np.uint64(made.maxval)

        def checked(stored, kind, out):
            largest = stored[np.uint64(0)] if out.size else stored.dtype.type(0)
            for k in range(np.uint64(out.size)):
                out[k] = stored[k]
                largest = max(largest, stored[k])
            return np.uint64(largest) <= most

        return checked

    def plain(stored, kind, out):
        for k in range(np.uint64(out.size)):
            out[k] = stored[k]
        return True

    return plain


@overload(convert_halves)
def _convert_halves(stored, kind, out):
    if out.dtype == types.uint16:

        def narrow(stored, kind, out):
            for k in range(np.uint64(out.size)):
                out[k] = stored[k] if kind == FLOAT16 else narrowed(widened(stored[k]), kind)
            return True

        return narrow
    if isinstance(out.dtype, types.Integer):
        return _into_integers(out, widened)

    def floats(stored, kind, out):
        for k in range(np.uint64(out.size)):
            out[k] = widened(stored[k])
        return True

    return floats


@jit
def copy_values(address, stored_kind, kind, out):
    """Convert out.size values from `address`; returns whether all fit. stored_kind, kind: codes of what lies there, and of `out`."""
    at, n = pointer(np.uint64(address)), out.size
    if stored_kind == 0:
        return convert(carray(at, (n,), np.uint8), kind, out)
    if stored_kind == 1:
        return convert(carray(at, (n,), np.uint16), kind, out)
    if stored_kind == 2:
        return convert(carray(at, (n,), np.uint32), kind, out)
    if stored_kind == 3:
        return convert(carray(at, (n,), np.uint64), kind, out)
    if stored_kind == 4:
        return convert_halves(carray(at, (n,), np.uint16), kind, out)
    if stored_kind == 5:
        return convert(carray(at, (n,), np.float32), kind, out)
    return convert(carray(at, (n,), np.float64), kind, out)


@jit
def _copy(stored, out):
    """Copy columns; returns whether they ascend strictly, and the last."""
    n = np.uint64(out.size)
    for k in range(n):
        out[k] = stored[k]
    descents = np.uint32(0)
    for k in range(ONE, n):
        descents |= np.uint32(stored[k] <= stored[k - ONE])
    return descents == 0, np.uint64(stored[n - ONE]) if n else np.uint64(0)


@jit
def copy_columns(address, index_bytes, out):
    """Copy out.size columns from `address` to signed ones; returns whether they ascend strictly, and the last as it is stored."""
    at, n = pointer(np.uint64(address)), out.size
    if index_bytes == 1:
        return _copy(carray(at, (n,), np.uint8), out)
    if index_bytes == 2:
        return _copy(carray(at, (n,), np.uint16), out)
    if index_bytes == 4:
        return _copy(carray(at, (n,), np.uint32), out)
    return _copy(carray(at, (n,), np.uint64), out)


@jit
def largest_column(address, index_bytes, n):
    """Find the largest of n columns at `address`, as stored; 0 for none."""
    largest = np.uint64(0)
    for k in range(np.uint64(n)):
        at = pointer(np.uint64(address) + k * np.uint64(index_bytes))
        if index_bytes == 1:
            column = np.uint64(carray(at, (1,), np.uint8)[0])
        elif index_bytes == 2:
            column = np.uint64(carray(at, (1,), np.uint16)[0])
        elif index_bytes == 4:
            column = np.uint64(carray(at, (1,), np.uint32)[0])
        else:
            column = carray(at, (1,), np.uint64)[0]
        largest = max(largest, column)
    return largest


@jit
def value_bytes(kind):
    """Give the bytes of a stored value of code `kind`."""
    return ONE << np.uint64(kind) if kind < 4 else ONE << np.uint64(kind - 3)


@jit
def note(fault, position, out_fault):
    """Keep the first position with a fault."""
    out_fault[fault] = min(np.int64(out_fault[fault]), position)
