"""Blocks of eight fields of packed rows, unpacked one after the other: the innermost loop of decoding, for Numba, as LLVM IR.

Knows control bytes and fields of up to 16 bits, not rows, checks or dtypes. Whatever their widths, a block takes the same 50
instructions of AVX2 or so: shifts and masks come from a table, no branch hangs on a width, and the rank before a block stays in the
lanes of a register. The price is a table of 4 KB, of which the codes that are in use lie in the cache. Plain LLVM vectors,
no gather, nothing that moves single lanes: any CPU runs it (benchmarks/LOG.md, 2026-11-27).
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from scdl_gpu.kernels.lanes import EIGHT, I8, I32, I64, pointer_to, shuffled, splat
from scdl_gpu.kernels.packed import BLOCK, GAP_BITS, VALUE_BITS

TWO, FOUR = ir.VectorType(I64, 2), ir.VectorType(I64, 4)
ONES, ZEROS = ir.Constant(EIGHT, [1] * BLOCK), ir.Constant(EIGHT, [0] * BLOCK)
WIDEST = 16
"""Bits of the fields that are unpacked here."""
FAR = 1 << 40
"""Bytes of a block whose fields are wider: more than any row has left."""
ENTRY_BYTES = 128
WINDOWS, SHIFTS, MASKS, BYTES, HALF = 0, 32, 64, 96, 104
"""An entry of the table: shifts of four windows, shifts and masks of eight fields, bytes of a block, the byte of field 4."""


def _entry(width):
    """Say in 16 numbers of 64 bits how fields of `width` bits come out of two loads of 64, the second at the byte where field 4 begins.

    Each load has two windows of 32 bits, and each window two fields.
    """
    if width is None or width > WIDEST:
        return [0] * 12 + [FAR, 0, 0, 0]
    rest, mask = 4 * width & 7, (1 << width) - 1
    return [0, 2 * width, rest, rest + 2 * width, *[width << 32] * 4, *[mask << 32 | mask] * 4, width, width // 2, 0, 0]


def _table(builder):
    """Put the entries of all codes into the module, those of gaps before those of counts; returns the address.

    To LLVM it is what an empty piece of assembly gives, so that it stays in a register: else each use spells out ten bytes.
    """
    numbers = [number for width in (*GAP_BITS, *VALUE_BITS, None) for number in _entry(width)]
    table = cgutils.global_constant(builder, "widths", ir.Constant(ir.ArrayType(I64, len(numbers)), numbers))
    table.align = ENTRY_BYTES
    return builder.asm(ir.FunctionType(I64, [I64]), "", "=r,0", [builder.ptrtoint(table, I64)], False)


def _entry_of(builder, table, code, before=0):
    """Give the address of the entry of a code; before: entries before the first."""
    return builder.add(builder.add(table, builder.mul(code, I64(ENTRY_BYTES))), I64(before * ENTRY_BYTES))


def _part(builder, entry, place, kind=I64):
    return builder.load(pointer_to(builder, builder.add(entry, I64(place)), kind), align=8 if kind == I64 else 32)


def _store(builder, lanes, address):
    builder.store(lanes, pointer_to(builder, address, EIGHT), align=1)


def _fields(builder, address, entry):
    """Unpack the eight fields at `address`; reads up to 24 bytes. Loads are of 16, of which LLVM then doubles the low lanes at once."""
    high = builder.add(address, _part(builder, entry, HALF))
    loads = [builder.load(pointer_to(builder, at, TWO), align=1) for at in (address, high)]
    windows = builder.lshr(shuffled(builder, *loads, [0, 0, 2, 2]), _part(builder, entry, WINDOWS, FOUR))
    windows = builder.bitcast(windows, EIGHT)
    pairs = shuffled(builder, windows, windows, [0, 0, 2, 2, 4, 4, 6, 6])
    return builder.and_(builder.lshr(pairs, _part(builder, entry, SHIFTS, EIGHT)), _part(builder, entry, MASKS, EIGHT))


def _counts(builder, address, entry, out):
    """Unpack eight counts less one, and store the counts."""
    _store(builder, builder.add(_fields(builder, address, entry), ONES), out)


def _ranks(builder, address, entry, before, out):
    """Unpack eight gaps, and store ranks; returns the last in all lanes. before: the rank before, in all lanes.

    Sums are of the block alone, so that blocks wait for each other for one addition only; lanes cross the middle once.
    """
    sums = builder.add(_fields(builder, address, entry), ONES)
    for below in ([8, 0, 1, 2, 8, 4, 5, 6], [8, 8, 0, 1, 8, 8, 4, 5], [8, 8, 8, 8, 3, 3, 3, 3]):
        sums = builder.add(sums, shuffled(builder, sums, ZEROS, below))
    _store(builder, builder.add(sums, before), out)
    return builder.add(before, shuffled(builder, sums, sums, [7] * BLOCK))


def _before(builder, base):
    return splat(builder, builder.trunc(builder.sub(base, I64(1)), I32), EIGHT)


def _base(builder, before):
    return builder.zext(builder.add(builder.extract_element(before, I32(0)), I32(1)), I64)


@intrinsic
def unpack_ranks(typing, code, address, base, out):
    """Unpack eight gaps of a code, of up to 16 bits, at `address`, and store ranks at `out`, int32; returns base for the next block.

    base: one more than the rank before.
    """

    def generated(context, builder, signature, args):
        code, address, base, out = args
        return _base(builder, _ranks(builder, address, _entry_of(builder, _table(builder), code), _before(builder, base), out))

    return types.int64(types.int64, types.int64, types.int64, types.int64), generated


@intrinsic
def unpack_counts(typing, code, address, out):
    """Unpack eight counts of a code, of up to 16 bits, at `address`, and store them at `out`, uint32."""

    def generated(context, builder, signature, args):
        code, address, out = args
        _counts(builder, address, _entry_of(builder, _table(builder), code, len(GAP_BITS)), out)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generated


@intrinsic
def unpack_blocks(typing, control, stop, at, end, base, ranks, values):
    """Unpack whole blocks: up to the control byte at `stop`, the first with a field over 16 bits, or the first that passes `end`.

    control, at: where control bytes and the bytes of blocks begin; ranks, values: where ranks, int32, and counts, uint32, go.
    All are addresses but base, which must not pass 2^31 on the way. Returns how many blocks were unpacked, where the bytes of
    the next begin, and base for it. Reads up to 24 bytes behind `end`.
    """

    def generated(context, builder, signature, args):
        first, stop, at, end, base, ranks, values = args
        table, before, entering = _table(builder), _before(builder, base), builder.block
        head, look, body, done = (builder.append_basic_block(name) for name in ("head", "look", "body", "done"))
        builder.branch(head)

        builder.position_at_end(head)
        control, here, last = (builder.phi(part.type) for part in (first, at, before))
        builder.cbranch(builder.icmp_unsigned("<", control, stop), look, done)

        builder.position_at_end(look)
        byte = builder.zext(builder.load(pointer_to(builder, control, I8)), I64)
        gaps = _entry_of(builder, table, builder.and_(byte, I64(15)))
        counts = _entry_of(builder, table, builder.lshr(byte, I64(4)), len(GAP_BITS))
        middle = builder.add(here, _part(builder, gaps, BYTES))
        following = builder.add(middle, _part(builder, counts, BYTES))
        builder.cbranch(builder.icmp_signed("<=", following, end), body, done)

        builder.position_at_end(body)
        offset = builder.mul(builder.sub(control, first), I64(4 * BLOCK))
        after = _ranks(builder, here, gaps, last, builder.add(ranks, offset))
        _counts(builder, middle, counts, builder.add(values, offset))
        for phi, begin, go in ((control, first, builder.add(control, I64(1))), (here, at, following), (last, before, after)):
            phi.add_incoming(begin, entering)
            phi.add_incoming(go, body)
        builder.branch(head)

        builder.position_at_end(done)
        return context.make_tuple(builder, signature.return_type, [builder.sub(control, first), here, _base(builder, last)])

    return types.UniTuple(types.int64, 3)(*[types.int64] * 7), generated
