"""Numbers by address, and eight of a block at once: differences, bit fields packed. Vector instructions for Numba, as LLVM IR.

Knows addresses and widths, not rows. Addresses are int64: Numba's own indexing does not vectorise shifts by different
amounts. Plain LLVM vectors, so that any CPU runs it: AVX2 or AVX-512 where there is one.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

I8, I32, I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
EIGHT, WIDE = ir.VectorType(I32, 8), ir.VectorType(I64, 8)


def pointer_to(builder, address, kind):
    """Take an int64 as a pointer to `kind`."""
    return builder.inttoptr(address, kind.as_pointer())


def _constant(kind, numbers):
    return ir.Constant(kind, numbers)


def shuffled(builder, first, second, lanes):
    """Take lanes, by their numbers, out of two vectors, whose lanes are numbered through."""
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


def splat(builder, scalar, kind):
    """Put a number into all lanes of a vector."""
    nothing = ir.Constant(kind, ir.Undefined)
    return shuffled(builder, builder.insert_element(nothing, scalar, ir.Constant(I32, 0)), nothing, [0] * kind.count)


def _load_as(bits, made):
    """Make an intrinsic that loads a little-endian number of so many bits from any address."""

    def load(typing, address):
        def code(context, builder, signature, args):
            loaded = builder.load(pointer_to(builder, args[0], ir.IntType(bits)), align=1)
            return loaded if bits == 64 else builder.zext(loaded, I64)

        return made(types.int64), code

    return intrinsic(load)


def _store_as(bits):
    """Make an intrinsic that stores the low bits of a number at any address."""

    def store(typing, address, number):
        def code(context, builder, signature, args):
            kept = args[1] if bits == 64 else builder.trunc(args[1], ir.IntType(bits))
            builder.store(kept, pointer_to(builder, args[0], ir.IntType(bits)), align=1)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), code

    return intrinsic(store)


load8, load16, load32 = (_load_as(bits, types.int64) for bits in (8, 16, 32))
load64 = _load_as(64, types.uint64)
store8, store16, store32, store64 = (_store_as(bits) for bits in (8, 16, 32, 64))


def _reduced(builder, lanes):
    """OR all lanes."""
    while lanes.type.count > 1:
        half = lanes.type.count // 2
        low, high = (shuffled(builder, lanes, ir.Constant(lanes.type, ir.Undefined), list(range(k, k + half))) for k in (0, half))
        lanes = builder.or_(low, high)
    return builder.extract_element(lanes, ir.Constant(I32, 0))


def _less_by(amount):
    """Make an intrinsic that stores differences of eight numbers, uint32, at `out`, and returns them ORed.

    amount: gives what to take from the numbers, and from where they come.
    """

    def differences(typing, address, out):
        def code(context, builder, signature, args):
            less = builder.sub(builder.load(pointer_to(builder, args[0], EIGHT), align=1), amount(builder, args[0]))
            builder.store(less, pointer_to(builder, args[1], EIGHT), align=1)
            return builder.zext(_reduced(builder, less), I64)

        return types.uint64(types.int64, types.int64), code

    return intrinsic(differences)


def _one(builder, address):
    return _constant(EIGHT, [1] * 8)


def _before_and_one(builder, address):
    before = builder.load(pointer_to(builder, builder.sub(address, I64(4)), EIGHT), align=1)
    return builder.add(before, _constant(EIGHT, [1] * 8))


gaps_of, counts_less_one = _less_by(_before_and_one), _less_by(_one)
"""Of eight ranks after another rank, the gaps between; of eight counts, what is stored."""


@intrinsic
def pack8(typing, address, width, out):
    """Pack eight numbers of uint32 at `address` into fields of width 0..8; stores 8 bytes at `out`."""

    def code(context, builder, signature, args):
        address, width, out = args
        builder.store(_reduced(builder, _spread(builder, address, width, range(8))), pointer_to(builder, out, I64), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), code


@intrinsic
def pack16(typing, address, width, out):
    """Pack eight numbers of uint32 at `address` into fields of width 9..16; stores 16 bytes at `out`."""

    def code(context, builder, signature, args):
        address, width, out = args
        lanes, nothing = _spread(builder, address, width, [0, 1, 2, 3] * 2), ir.Constant(WIDE, ir.Undefined)
        low, high = (_reduced(builder, shuffled(builder, lanes, nothing, list(range(k, k + 4)))) for k in (0, 4))
        bits = builder.shl(width, I64(2))
        spare = builder.sub(I64(64), bits)
        shifted = builder.select(builder.icmp_unsigned("==", spare, I64(0)), I64(0), builder.shl(high, builder.and_(bits, I64(63))))
        builder.store(builder.or_(low, shifted), pointer_to(builder, out, I64), align=1)
        builder.store(builder.lshr(high, spare), pointer_to(builder, builder.add(out, I64(8)), I64), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), code


def _spread(builder, address, width, places):
    """Load eight uint32 and shift each by its place times the width, in 64 bits."""
    numbers = builder.zext(builder.load(pointer_to(builder, address, EIGHT), align=1), WIDE)
    shifts = builder.mul(splat(builder, builder.trunc(width, I32), EIGHT), _constant(EIGHT, list(places)))
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
