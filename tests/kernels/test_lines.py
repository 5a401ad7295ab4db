"""Rows that are streamed arrive whole, wherever they begin and end; asking ahead reads nothing that can be missed."""

import mmap

import numpy as np
import pytest
from emulator import cases
from hypothesis import given
from hypothesis import strategies as st

from scdl_gpu.kernels import cpu
from scdl_gpu.kernels.lines import AHEAD_BYTES, prefetch, settle, stream

DTYPES = ["uint8", "uint16", "int32", "float32", "float64"]


def memory(size_bytes: int, begin: int) -> np.ndarray:
    """Give bytes that begin so many bytes after a line does."""
    room = np.zeros(size_bytes + 256, np.uint8)
    first = (-room.ctypes.data + begin) % 64
    return room[first : first + size_bytes]


@given(dtype=st.sampled_from(DTYPES), n=st.integers(0, 300), begin=st.integers(0, 63), source=st.integers(0, 63), end=st.integers(1, 80))
def test_a_streamed_row_arrives_and_its_neighbours_stay(dtype: str, n: int, begin: int, source: int, end: int) -> None:
    """Every element moves, zeros stay behind, and bytes before and after keep what they held, whatever lines they share."""
    size, kind = np.dtype(dtype).itemsize, np.dtype(dtype)
    around = memory(begin + n * size + end, 0)
    around[:] = 0xA5
    out = around[begin // size * size :][: n * size].view(kind)
    row = memory(n * size, source // size * size).view(kind)
    row.view(np.uint8)[:] = np.random.default_rng(n).integers(1, 256, n * size)
    expected = row.copy()

    stream(row, out)

    first = begin // size * size
    np.testing.assert_array_equal(out.view(np.uint8), expected.view(np.uint8))
    assert not row.view(np.uint8).any()
    assert (around[:first] == 0xA5).all()
    assert (around[first + n * size :] == 0xA5).all()


@pytest.mark.parametrize("begin", [1, 3, 62])
def test_elements_that_straddle_lines_are_moved_too(begin: int) -> None:
    """An output at an address that is no multiple of its elements' size is written without whole lines."""
    out, row = memory(400, begin).view(np.float32), np.arange(1, 101, dtype=np.float32)

    stream(row, out)

    np.testing.assert_array_equal(out, np.arange(1, 101))


@pytest.mark.parametrize("made", ["uint8", "int16", "float16", "float32", "float64"])
@pytest.mark.parametrize("width", [2_999, 4_096])
def test_large_dense_batches_are_what_scipy_makes(made: str, width: int) -> None:
    """A batch beyond `STREAM_BYTES`, whose rows begin anywhere, with unsorted ones between, is as a small one would be."""
    n = int(cpu.STREAM_BYTES) // width // np.dtype(made).itemsize + 3
    lengths = [k % 7 * width // 6 for k in range(40)]
    case = cases.one_shard("large", width, lengths, np.random.default_rng(5).integers(0, 40, n), is_sorted=width % 2 == 0)
    case = case.with_dtypes("uint16", "float32", top=120)

    found, fault = cases.dense_by_cpu(case, made)

    assert found.nbytes >= cpu.STREAM_BYTES
    np.testing.assert_array_equal(found, cases.expected_dense(case, made))
    assert fault.tolist() == cases.no_faults().tolist()


@pytest.mark.parametrize("genes", [None, np.arange(3_000)[::-1][::2]], ids=["all genes", "a subset"])
def test_large_normalised_batches_agree_with_small_ones(genes: np.ndarray | None) -> None:
    """What is scaled, or chosen, is the same whether the batch is streamed or not."""
    width = 3_000 if genes is None else genes.size
    n = int(cpu.STREAM_BYTES) // width // 4 + 1
    picks = np.random.default_rng(6).integers(0, 9, n)
    large = cases.one_shard("large", 3_000, [k * 300 for k in range(9)], picks)
    small = cases.one_shard("small", 3_000, [k * 300 for k in range(9)], picks[:9])

    found, _ = cases.dense_by_cpu(large, "float32", genes, 1e4, True)

    np.testing.assert_array_equal(found[:9], cases.dense_by_cpu(small, "float32", genes, 1e4, True)[0])


def test_a_faulty_row_of_a_large_batch_is_zeros() -> None:
    """A row with a column out of range leaves nothing of itself, nor of the row before, in a batch that is streamed."""
    n = int(cpu.STREAM_BYTES) // 4_000 + 1
    case = cases.one_shard("damaged", 1_000, [500, 500], [0, 1] * (n // 2))
    case.stored[0].indices[999] = 1_000

    found, fault = cases.dense_by_cpu(case, "float32")

    assert fault[0] == 1
    assert not found[1::2].any()
    assert (np.count_nonzero(found[::2], axis=1) == 500).all()


def test_a_column_twice_in_a_large_batch_is_told() -> None:
    """A row with a column twice is named in a batch that is streamed, too, and leaves nothing of itself in the row after it."""
    n = int(cpu.STREAM_BYTES) // 4_000 + 1
    case = cases.one_shard("twice", 1_000, [500, 500], [0, 1] * (n // 2))
    case.stored[0].indices[999] = case.stored[0].indices[500]

    found, fault = cases.dense_by_cpu(case, "float32")

    assert found.nbytes >= cpu.STREAM_BYTES
    assert fault[1] == 1
    np.testing.assert_array_equal(found[::2], cases.expected_dense(case, "float32")[::2])


@pytest.mark.parametrize("size_bytes", [0, 1, 4_096, int(AHEAD_BYTES) + 1, 1 << 40])
def test_asking_ahead_does_no_harm(size_bytes: int) -> None:
    """What is asked for may end, or lie, outside of all memory."""
    page = mmap.mmap(-1, mmap.PAGESIZE)
    array = np.frombuffer(page, np.uint8)

    prefetch(array.ctypes.data + mmap.PAGESIZE - 1, size_bytes)
    prefetch(0, size_bytes)
    settle_all()

    assert array.size == mmap.PAGESIZE


def settle_all() -> None:
    """Call what only compiled code may."""
    from scdl_gpu.kernels.stored import jit

    @jit
    def settled():
        settle()

    settled()
