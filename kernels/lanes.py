"""Eight numbers of a block at once, by address: bit fields unpacked, summed, packed. Vector instructions for Numba, as LLVM IR.

Knows addresses and widths, not rows. Addresses are int64: Numba's own indexing does not vectorise shifts by different
amounts. Plain LLVM vectors, so that any CPU runs it: AVX2 or AVX-512 where there is one.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

I8, I32, I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
EIGHT, WIDE = ir.VectorType(I32, 8), ir.VectorType(I64, 8)


def _at(builder, address, kind):
    return builder.inttoptr(address, kind.as_pointer())


def _constant(kind, numbers):
    return ir.Constant(kind, numbers)


def _shuffled(builder, first, second, lanes):
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


def _splat(builder, scalar, kind):
    nothing = ir.Constant(kind, ir.Undefined)
    return _shuffled(builder, builder.insert_element(nothing, scalar, ir.Constant(I32, 0)), nothing, [0] * kind.count)


def _load_as(bits, made):
    """Make an intrinsic that loads a little-endian number of so many bits from any address."""

    def load(typing, address):
        def code(context, builder, signature, args):
            loaded = builder.load(_at(builder, args[0], ir.IntType(bits)), align=1)
            return loaded if bits == 64 else builder.zext(loaded, I64)

        return made(types.int64), code

    return intrinsic(load)


def _store_as(bits):
    """Make an intrinsic that stores the low bits of a number at any address."""

    def store(typing, address, number):
        def code(context, builder, signature, args):
            kept = args[1] if bits == 64 else builder.trunc(args[1], ir.IntType(bits))
            builder.store(kept, _at(builder, args[0], ir.IntType(bits)), align=1)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), code

    return intrinsic(store)


load8, load16, load32 = (_load_as(bits, types.int64) for bits in (8, 16, 32))
load64 = _load_as(64, types.uint64)
store8, store16, store32, store64 = (_store_as(bits) for bits in (8, 16, 32, 64))


def _narrow_fields(builder, address, width):
    """Unpack eight fields of width 0..8: one load of 64 bits, in two windows of 32 with four fields each."""
    bits = builder.load(_at(builder, address, I64), align=1)
    return _fields(builder, [bits, builder.lshr(bits, builder.shl(width, I64(2)))], width)


def _middle_fields(builder, address, width):
    """Unpack eight fields of width 9..16: four windows of two fields, from two loads; the second at the byte where field 4 begins."""
    windows = []
    for start in (I64(0), builder.shl(width, I64(2))):
        bits = builder.load(_at(builder, builder.add(address, builder.lshr(start, I64(3))), I64), align=1)
        bits = builder.lshr(bits, builder.and_(start, I64(7)))
        windows += [bits, builder.lshr(bits, builder.shl(width, I64(1)))]
    return _fields(builder, windows, width)


def _fields(builder, windows, width):
    """Take eight fields out of windows, each the low 32 bits of a number, which hold equally many."""
    each, nothing = 8 // len(windows), ir.Constant(EIGHT, ir.Undefined)
    lanes = nothing
    for k, window in enumerate(windows):
        lanes = builder.insert_element(lanes, builder.trunc(window, I32), ir.Constant(I32, k))
    lanes = _shuffled(builder, lanes, nothing, [k // each for k in range(8)])
    narrow = builder.trunc(width, I32)
    mask = builder.sub(builder.shl(I32(1), narrow), I32(1))
    shifts = builder.mul(_splat(builder, narrow, EIGHT), _constant(EIGHT, list(range(each)) * len(windows)))
    return builder.and_(builder.lshr(lanes, shifts), _splat(builder, mask, EIGHT))


def _ranks_by(fields):
    """Make an intrinsic that unpacks eight gaps at `address` and stores ranks at `out`, int32; returns base after them.

    base: one more than the rank before.
    """

    def ranks(typing, address, width, base, out):
        def code(context, builder, signature, args):
            address, width, base, out = args
            sums = builder.add(fields(builder, address, width), _constant(EIGHT, [1] * 8))
            zeros = _constant(EIGHT, [0] * 8)
            for by in (1, 2, 4):
                below = _shuffled(builder, sums, zeros, [8 if k < by else k - by for k in range(8)])
                sums = builder.add(sums, below)
            before = builder.trunc(builder.sub(base, I64(1)), I32)
            builder.store(builder.add(sums, _splat(builder, before, EIGHT)), _at(builder, out, EIGHT), align=1)
            return builder.add(base, builder.zext(builder.extract_element(sums, ir.Constant(I32, 7)), I64))

        return types.int64(types.int64, types.int64, types.int64, types.int64), code

    return intrinsic(ranks)


def _counts_by(fields):
    """Make an intrinsic that unpacks eight counts less one at `address` and stores the counts at `out`, uint32."""

    def counts(typing, address, width, out):
        def code(context, builder, signature, args):
            address, width, out = args
            found = builder.add(fields(builder, address, width), _constant(EIGHT, [1] * 8))
            builder.store(found, _at(builder, out, EIGHT), align=1)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), code

    return intrinsic(counts)


ranks8, ranks16 = _ranks_by(_narrow_fields), _ranks_by(_middle_fields)
counts8, counts16 = _counts_by(_narrow_fields), _counts_by(_middle_fields)


def _reduced(builder, lanes):
    """OR all lanes."""
    while lanes.type.count > 1:
        half = lanes.type.count // 2
        low, high = (_shuffled(builder, lanes, ir.Constant(lanes.type, ir.Undefined), list(range(k, k + half))) for k in (0, half))
        lanes = builder.or_(low, high)
    return builder.extract_element(lanes, ir.Constant(I32, 0))


def _less_by(amount):
    """Make an intrinsic that stores differences of eight numbers, uint32, at `out`, and returns them ORed.

    amount: gives what to take from the numbers, and from where they come.
    """

    def differences(typing, address, out):
        def code(context, builder, signature, args):
            less = builder.sub(builder.load(_at(builder, args[0], EIGHT), align=1), amount(builder, args[0]))
            builder.store(less, _at(builder, args[1], EIGHT), align=1)
            return builder.zext(_reduced(builder, less), I64)

        return types.uint64(types.int64, types.int64), code

    return intrinsic(differences)


def _one(builder, address):
    return _constant(EIGHT, [1] * 8)


def _before_and_one(builder, address):
    before = builder.load(_at(builder, builder.sub(address, I64(4)), EIGHT), align=1)
    return builder.add(before, _constant(EIGHT, [1] * 8))


gaps_of, counts_less_one = _less_by(_before_and_one), _less_by(_one)
"""Of eight ranks after another rank, the gaps between; of eight counts, what is stored."""


@intrinsic
def pack8(typing, address, width, out):
    """Pack eight numbers of uint32 at `address` into fields of width 0..8; stores 8 bytes at `out`."""

    def code(context, builder, signature, args):
        address, width, out = args
        builder.store(_reduced(builder, _spread(builder, address, width, range(8))), _at(builder, out, I64), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), code


@intrinsic
def pack16(typing, address, width, out):
    """Pack eight numbers of uint32 at `address` into fields of width 9..16; stores 16 bytes at `out`."""

    def code(context, builder, signature, args):
        address, width, out = args
        lanes, nothing = _spread(builder, address, width, [0, 1, 2, 3] * 2), ir.Constant(WIDE, ir.Undefined)
        low, high = (_reduced(builder, _shuffled(builder, lanes, nothing, list(range(k, k + 4)))) for k in (0, 4))
        bits = builder.shl(width, I64(2))
        spare = builder.sub(I64(64), bits)
        shifted = builder.select(builder.icmp_unsigned("==", spare, I64(0)), I64(0), builder.shl(high, builder.and_(bits, I64(63))))
        builder.store(builder.or_(low, shifted), _at(builder, out, I64), align=1)
        builder.store(builder.lshr(high, spare), _at(builder, builder.add(out, I64(8)), I64), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), code


def _spread(builder, address, width, places):
    """Load eight uint32 and shift each by its place times the width, in 64 bits."""
    numbers = builder.zext(builder.load(_at(builder, address, EIGHT), align=1), WIDE)
    shifts = builder.mul(_splat(builder, builder.trunc(width, I32), EIGHT), _constant(EIGHT, list(places)))
    return builder.shl(numbers, builder.zext(shifts, WIDE))


@intrinsic
def leading_zeros(typing, number):
    """Count the zeros above the highest one of a uint64; 64 of zero."""

    def code(context, builder, signature, args):
        return builder.ctlz(args[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.uint64), code


@intrinsic
def copy_bytes(typing, target, source, size):
    """Copy `size` bytes between addresses: one memcpy."""

    def code(context, builder, signature, args):
        pointer = I8.as_pointer()
        copy = builder.module.declare_intrinsic("llvm.memcpy", [pointer, pointer, I64])
        builder.call(copy, [builder.inttoptr(args[0], pointer), builder.inttoptr(args[1], pointer), args[2], ir.Constant(ir.IntType(1), 0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), code
