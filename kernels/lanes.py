"""Eight numbers of a block at once, by address: bit fields unpacked, summed, packed. Vector instructions for Numba, as LLVM IR.

Knows addresses and widths, not rows. Addresses are int64: Numba's own indexing does not vectorise shifts by different
amounts. Plain LLVM vectors, so that any CPU runs it: AVX2 or AVX-512 where there is one.
"""

from llvmlite import ir
from numba import types  # type: ignore[attr-defined]
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


load8, load16, load32, load64 = (_load_as(bits, made) for bits, made in ((8, types.int64), (16, types.int64), (32, types.int64), (64, types.uint64)))
store8, store16, store32, store64 = (_store_as(bits) for bits in (8, 16, 32, 64))


def _narrow_fields(builder, address, width):
    """Unpack eight fields of width 0..8: one load of 64 bits."""
    window = builder.load(_at(builder, address, I64), align=1)
    return _shifted(builder, _splat(builder, window, WIDE), width, range(8))


def _middle_fields(builder, address, width):
    """Unpack eight fields of width 9..16: four each from two loads of 64 bits, the second at the byte where its first field begins."""
    bit = builder.shl(width, I64(2))
    halves = ir.Constant(WIDE, ir.Undefined)
    for k, start in enumerate((I64(0), bit)):
        window = builder.load(_at(builder, builder.add(address, builder.lshr(start, I64(3))), I64), align=1)
        halves = builder.insert_element(halves, builder.lshr(window, builder.and_(start, I64(7))), ir.Constant(I32, k))
    return _shifted(builder, _shuffled(builder, halves, ir.Constant(WIDE, ir.Undefined), [0] * 4 + [1] * 4), width, [0, 1, 2, 3] * 2)


def _shifted(builder, windows, width, places):
    shifts = builder.mul(_splat(builder, width, WIDE), _constant(WIDE, list(places)))
    mask = builder.sub(builder.shl(I64(1), width), I64(1))
    return builder.trunc(builder.and_(builder.lshr(windows, shifts), _splat(builder, mask, WIDE)), EIGHT)


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


@intrinsic
def copy_bytes(typing, target, source, size):
    """Copy `size` bytes between addresses: one memcpy."""

    def code(context, builder, signature, args):
        pointer = I8.as_pointer()
        copy = builder.module.declare_intrinsic("llvm.memcpy", [pointer, pointer, I64])
        builder.call(copy, [builder.inttoptr(args[0], pointer), builder.inttoptr(args[1], pointer), args[2], ir.Constant(ir.IntType(1), 0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), code
