"""The operations of kernels/README.md in Numba, for the CPU: rows of raw or packed shards, in any order, into one batch.

Knows addresses and arrays, not files, threads or torch; every function releases the GIL and writes only into
`out...`. A range of a batch's rows is a call with slices of their arrays, so that ranges may run in different
threads. Loops run over unsigned positions, element by element: signed ones carry a test for negative values that
keeps LLVM from vectorising, and an assignment of slices that converts dtypes is half as fast again
(batch 64, 1,500 uint16 columns a row: 726,000 against 318,000 cells/s; benchmarks/LOG.md, 2026-11-23).
"""

import numpy as np

from scdl_gpu.kernels.decode import BROKEN, NOWHERE, convert_values, decode_row, find_row, map_columns, place_row
from scdl_gpu.kernels.lines import prefetch, settle, stream
from scdl_gpu.kernels.packed import NO_SUM
from scdl_gpu.kernels.pointers import OK, row_pointers
from scdl_gpu.kernels.row import fill_zero, is_distinct, scale_values, scatter, select, sort_row, sum_of
from scdl_gpu.kernels.shards import DAMAGED, DUPLICATE, OUT_OF_RANGE, STORED, UNFITTING
from scdl_gpu.kernels.stored import ONE, convert, copy_columns, copy_values, jit, largest_column, note, value_bytes

__all__ = ["OK", "check_rows", "decode_csr", "decode_dense", "gather_csr", "gather_dense", "row_pointers"]

FLOAT64 = STORED.index("float64")
SPARE = 16
"""Elements of temporary memory beyond a packed row's: it is decoded in whole blocks."""
STREAM_BYTES = np.int64(8 << 20)
"""Dense batches of so many bytes are written past the cache: the six or so that a loader has in use do not fit in one."""


@jit
def _ask_ahead(shards, shard, starts, read_indptr, i):
    """Ask for the columns and values of row i, if there is one."""
    if i < starts.size:
        source = shards[shard[i] if shard.size else 0]
        n, start = np.uint64(read_indptr[i + 1] - read_indptr[i]), np.uint64(starts[i])
        prefetch(source.indices + start * np.uint64(source.index_bytes), n * np.uint64(source.index_bytes))
        prefetch(source.data + start * value_bytes(source.kind), n * value_bytes(source.kind))


@jit
def gather_csr(shards, shard, starts, slots, read_indptr, n_vars, indptr, kind, out_indices, out_data, out_fault):
    """Copy rows into a CSR batch, columns ascending; arguments as in kernels/README.md.

    Whether a row is sorted is seen in the row, whatever its shard says. A row with a column twice comes out sorted, with both.
    """
    bitmap = np.zeros(0, np.uint64)
    for i in range(starts.size):
        _ask_ahead(shards, shard, starts, read_indptr, i + 1)
        source = shards[shard[i] if shard.size else 0]
        position = np.int64(slots[i]) if slots.size else np.int64(i)
        n = np.uint64(read_indptr[i + 1] - read_indptr[i])
        begin = np.uint64(indptr[position])
        row_columns, row_values = out_indices[begin : begin + n], out_data[begin : begin + n]
        columns = source.indices + np.uint64(starts[i]) * np.uint64(source.index_bytes)
        ascends, last = copy_columns(columns, source.index_bytes, row_columns)
        if not copy_values(source.data + np.uint64(starts[i]) * value_bytes(source.kind), source.kind, kind, row_values):
            note(UNFITTING, position, out_fault)
        if not ascends:
            last = largest_column(columns, source.index_bytes, n)
        if n and last >= np.uint64(n_vars):
            note(OUT_OF_RANGE, position, out_fault)
            for k in range(n):
                if row_columns[k] < 0 or row_columns[k] >= n_vars:
                    row_columns[k] = n_vars - 1
        elif not ascends:
            if bitmap.size == 0:
                bitmap = np.zeros(np.uint64(n_vars) // np.uint64(64) + ONE, np.uint64)
            if not sort_row(row_columns, row_values, bitmap):
                note(DUPLICATE, position, out_fault)


@jit
def gather_dense(shards, shard, starts, slots, read_indptr, n_vars, lut, target, log1p, kind, out, out_fault):
    """Write rows of a dense batch, each once, whole; arguments as in kernels/README.md.

    As in gather_csr, whether a row is sorted is seen in the row. Of a column twice a dense row has room for one only.
    """
    bitmap = np.zeros(0, np.uint64)
    columns, values, numbers = np.empty(0, np.int32), np.empty(0, out.dtype), np.empty(0, np.float64)
    streams = out.nbytes >= STREAM_BYTES
    apart = np.zeros(out.shape[1] if streams else 0, out.dtype)
    for i in range(starts.size):
        _ask_ahead(shards, shard, starts, read_indptr, i + 1)
        source = shards[shard[i] if shard.size else 0]
        position = np.int64(slots[i]) if slots.size else np.int64(i)
        n = np.int64(read_indptr[i + 1] - read_indptr[i])
        if n > columns.size:
            columns, values, numbers = np.empty(2 * n, np.int32), np.empty(2 * n, out.dtype), np.empty(2 * n, np.float64)
        at_columns = source.indices + np.uint64(starts[i]) * np.uint64(source.index_bytes)
        at_values = source.data + np.uint64(starts[i]) * value_bytes(source.kind)
        ascends, last = copy_columns(at_columns, source.index_bytes, columns[:n])
        if not ascends:
            last = largest_column(at_columns, source.index_bytes, n)
        if n and last >= np.uint64(n_vars):
            note(OUT_OF_RANGE, position, out_fault)
            fill_zero(out[position])
            continue
        if not ascends:
            if bitmap.size == 0:
                bitmap = np.zeros(np.uint64(n_vars) // np.uint64(64) + ONE, np.uint64)
            if not is_distinct(columns[:n], bitmap):
                note(DUPLICATE, position, out_fault)
        if target > 0 or log1p:
            copy_values(at_values, source.kind, FLOAT64, numbers[:n])
            scale = 1.0
            if target > 0:
                total = sum_of(numbers[:n])
                scale = target / total if total != 0 else 1.0
            n = select(lut, columns[:n], numbers)
            scale_values(numbers[:n], scale, log1p)
            convert(numbers[:n], kind, values[:n])
        else:
            if not copy_values(at_values, source.kind, kind, values[:n]):
                note(UNFITTING, position, out_fault)
            n = select(lut, columns[:n], values)
        if streams:
            scatter(columns[:n], values, apart)
            stream(apart, out[position])
        else:
            fill_zero(out[position])
            scatter(columns[:n], values, out[position])
    if streams:
        settle()


@jit
def _ask_for(shards, shard, rows, i):
    """Ask for the bytes of packed row i, if there is one."""
    if i < rows.size:
        payload = shards[shard[i] if shard.size else 0].payload
        prefetch(payload + np.uint64(4) * np.uint64(rows[i].start), np.uint64(4) * np.uint64(rows[i].words))


@jit
def decode_csr(shards, orders, shard, rows, slots, read_indptr, n_vars, indptr, kind, out_indices, out_data, out_fault):
    """Decode packed rows into a CSR batch, columns ascending; arguments as in kernels/README.md."""
    ranks, values, made = np.empty(0, np.int32), np.empty(0, np.uint64), np.empty(0, out_data.dtype)
    bitmap, below = np.zeros(0, np.uint64), np.empty(0, np.uint32)
    for i in range(rows.size):
        _ask_for(shards, shard, rows, i + 1)
        source, row = shards[shard[i] if shard.size else 0], rows[i]
        order = orders[row.order & np.uint32(0xFFFF)]
        position = np.int64(slots[i]) if slots.size else np.int64(i)
        n = np.int64(read_indptr[i + 1] - read_indptr[i])
        if n + SPARE > ranks.size:
            ranks, values = np.empty(2 * n + SPARE, np.int32), np.empty(2 * n + SPARE, np.uint64)
        begin = np.uint64(indptr[position])
        row_columns, row_values = out_indices[begin : begin + np.uint64(n)], out_data[begin : begin + np.uint64(n)]
        found = decode_row(source, row, n, n_vars, ranks, values)
        if found == BROKEN:
            note(DAMAGED, position, out_fault)
            for k in range(np.uint64(n)):
                row_columns[k], row_values[k] = min(k, np.uint64(n_vars - 1)), 0
        elif order.table == 0:
            if not convert_values(found, source.source, values, kind, row_values):
                note(UNFITTING, position, out_fault)
            map_columns(order, ranks[:n], row_columns)
        else:
            if made.size < n or bitmap.size == 0:
                n_words = np.uint64(n_vars) // np.uint64(64) + ONE
                made, bitmap, below = np.empty(2 * n, out_data.dtype), np.zeros(n_words, np.uint64), np.empty(n_words, np.uint32)
            if not convert_values(found, source.source, values, kind, made[:n]):
                note(UNFITTING, position, out_fault)
            place_row(order, ranks[:n], made[:n], bitmap, below, row_columns, row_values)


@jit
def decode_dense(shards, orders, shard, rows, slots, read_indptr, n_vars, lut, target, log1p, kind, out, out_fault):
    """Decode packed rows into rows of a dense batch, each once, whole; arguments as in kernels/README.md."""
    ranks, values, numbers, made = np.empty(0, np.int32), np.empty(0, np.uint64), np.empty((2, 0), np.float64), np.empty(0, out.dtype)
    columns, bitmap, below = np.empty(0, np.int32), np.zeros(0, np.uint64), np.empty(0, np.uint32)
    streams = out.nbytes >= STREAM_BYTES
    apart = np.zeros(out.shape[1] if streams else 0, out.dtype)
    for i in range(rows.size):
        _ask_for(shards, shard, rows, i + 1)
        source, row = shards[shard[i] if shard.size else 0], rows[i]
        order = orders[row.order & np.uint32(0xFFFF)]
        position = np.int64(slots[i]) if slots.size else np.int64(i)
        n = np.int64(read_indptr[i + 1] - read_indptr[i])
        if n + SPARE > ranks.size:
            ranks, values = np.empty(2 * n + SPARE, np.int32), np.empty(2 * n + SPARE, np.uint64)
            numbers, made, columns = np.empty((2, 2 * n), np.float64), np.empty(2 * n, out.dtype), np.empty(2 * n, np.int32)
        found = decode_row(source, row, n, n_vars, ranks, values)
        if found == BROKEN:
            note(DAMAGED, position, out_fault)
            fill_zero(out[position])
            continue
        if target > 0 or log1p:
            convert_values(found, source.source, values, FLOAT64, numbers[0, :n])
            at, scale = 0, 1.0
            if target > 0 and row.sum == np.uint32(NO_SUM):
                if bitmap.size == 0:
                    n_words = np.uint64(n_vars) // np.uint64(64) + ONE
                    bitmap, below = np.zeros(n_words, np.uint64), np.empty(n_words, np.uint32)
                place_row(order, ranks[:n], numbers[0, :n], bitmap, below, columns[:n], numbers[1, :n])
                at, total = 1, sum_of(numbers[1, :n])
            else:
                map_columns(order, ranks[:n], columns[:n])
                total = np.float64(row.sum)
            if target > 0:
                scale = target / total if total != 0 else 1.0
            n = select(lut, columns[:n], numbers[at])
            scale_values(numbers[at, :n], scale, log1p)
            convert(numbers[at, :n], kind, made[:n])
        else:
            if not convert_values(found, source.source, values, kind, made[:n]):
                note(UNFITTING, position, out_fault)
            map_columns(order, ranks[:n], columns[:n])
            n = select(lut, columns[:n], made)
        if streams:
            scatter(columns[:n], made, apart)
            stream(apart, out[position])
        else:
            fill_zero(out[position])
            scatter(columns[:n], made, out[position])
    if streams:
        settle()


@jit
def check_rows(shards, shard, rows, read_indptr, out_fault):
    """Verify the checks of packed rows, and nothing else; arguments as in kernels/README.md, places in `out_fault` count from 0."""
    for i in range(rows.size):
        if find_row(shards[shard[i] if shard.size else 0], rows[i], np.int64(read_indptr[i + 1] - read_indptr[i])) == NOWHERE:
            note(DAMAGED, np.int64(i), out_fault)
