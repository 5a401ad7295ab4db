"""Cache lines, in Numba: asked for before they are needed, and written past the cache.

Knows addresses, not rows or dtypes. A row of an archive begins in pages that no cache and no TLB has seen, and the next row
is known long before: asking for it while this one is copied makes a gather 1.4 times as fast or more. An output that is
larger than the cache is written without being read first; one that fits is not, since then its reader finds it there
(benchmarks/LOG.md, 2026-11-24).
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from scdl_gpu.kernels.stored import jit

LINE = np.uint64(64)
AHEAD_BYTES = np.uint64(16 << 10)
"""Of an array of a row; beyond, the hardware has seen where it goes, and a longer row would push out the one being copied."""
WORDS = ir.VectorType(ir.IntType(32), 16)


def _asker(is_written):
    """Make an intrinsic that asks for the line at an address, to use it soon; an address that is nobody's does no harm."""

    def ask(typing, address):
        def generated(context, builder, signature, args):
            number, where = ir.IntType(32), cgutils.voidptr_t
            kind = ir.FunctionType(ir.VoidType(), [where, number, number, number])
            function = builder.module.declare_intrinsic("llvm.prefetch", [where], kind)
            written, keep, data = number(is_written), number(3), number(1)
            builder.call(function, [builder.inttoptr(args[0], where), written, keep, data])
            return context.get_dummy_value()

        return types.void(types.uint64), generated

    return intrinsic(ask)


_ask, _ask_to_write = _asker(0), _asker(1)


@intrinsic
def _move_line(typing, source, to):
    """Write a line to `to`, a multiple of 64, past the cache, and zeros to its source."""

    def generated(context, builder, signature, args):
        source, to = (builder.inttoptr(address, WORDS.as_pointer()) for address in args)
        line = builder.load(source, align=1)
        builder.store(ir.Constant(WORDS, [0] * 16), source, align=1)
        past = builder.store(line, to, align=64)
        past.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64), generated


@intrinsic
def settle(typing):
    """Let other threads see what was streamed before anything that is written after it."""

    def generated(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generated


@jit
def prefetch(address, size_bytes):
    """Ask for the first AHEAD_BYTES of so many bytes at an address."""
    start = np.uint64(address)
    for line in range(start & ~(LINE - np.uint64(1)), start + min(np.uint64(size_bytes), AHEAD_BYTES), LINE):
        _ask(line)


@jit
def prefetch_to_write(out):
    """Ask for the lines of `out`, (n,), up to AHEAD_BYTES, before it is written here and there."""
    start = np.uint64(out.ctypes.data)
    for line in range(start & ~(LINE - np.uint64(1)), start + min(np.uint64(out.nbytes), AHEAD_BYTES), LINE):
        _ask_to_write(line)


@jit
def stream(row, out):
    """Move `row` to `out`, (n,) each of one dtype, past the cache where they hold whole lines; leaves zeros in `row`.

    `settle` comes after the last one, before another thread is told.
    """
    size, n = np.uint64(out.itemsize), np.uint64(out.size)
    to = np.uint64(out.ctypes.data)
    head = min(n, (np.uint64(0) - to) % LINE // size)
    lines = (n - head) * size // LINE
    if (to + head * size) % LINE:  # no element begins where a line does
        lines = np.uint64(0)
    source, to = np.uint64(row.ctypes.data) + head * size, to + head * size
    for line in range(lines):
        _move_line(source + line * LINE, to + line * LINE)
    rest = head + lines * LINE // size
    for k in range(head):
        out[k] = row[k]
        row[k] = 0
    for k in range(rest, n):
        out[k] = row[k]
        row[k] = 0
