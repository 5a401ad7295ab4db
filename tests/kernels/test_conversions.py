"""Values are converted once, by both twins alike: integers exactly or not at all, floats to the nearest, ties to even."""

import numpy as np
import pytest
from emulator import cases, numbers
from emulator.launcher import Emulator
from emulator.memory import HostMemory
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from scdl_gpu.kernels import shards

EMULATOR = Emulator(0)


def check(stored: NDArray, made: str, twin: str) -> None:
    """Expect of both operations what the model says, and a report exactly where a value does not fit."""
    expected = numbers.model(stored, made)

    found = numbers.gathered(stored, made, None if twin == "cpu" else HostMemory(EMULATOR))

    for row, is_reported in found:
        assert row == expected
        assert is_reported == (None in expected)


@pytest.mark.parametrize("twin", ["cpu", "emulator"])
@pytest.mark.parametrize("made", shards.DENSE_KINDS)
@pytest.mark.parametrize("stored", shards.STORED)
def test_numbers_at_the_edges(stored: str, made: str, twin: str) -> None:
    """Largest, smallest, ties and their neighbours, infinities and NaN, of every stored dtype, into every dtype of a batch."""
    check(numbers.edges(stored), made, twin)


@pytest.mark.parametrize("twin", ["cpu", "emulator"])
@settings(max_examples=60)
@given(
    stored=st.sampled_from(shards.STORED),
    made=st.sampled_from(shards.DENSE_KINDS),
    content=st.binary(min_size=8, max_size=256).map(lambda b: b[: len(b) // 8 * 8]),
)
def test_any_bits(stored: str, made: str, content: bytes, twin: str) -> None:
    """Whatever bits are stored, both twins make of them what the model does."""
    check(np.frombuffer(content, stored).copy(), made, twin)


def test_every_float16_comes_back() -> None:
    """All 65,536 float16 become the float64 that NumPy makes of them, and bits that stay are not touched."""
    stored = np.arange(65_536, dtype=np.uint16).view(np.float16)
    shard = cases.Stored(np.array([0, stored.size]), np.arange(stored.size, dtype=np.uint16), stored)
    case = cases.Case("all float16", stored.size, (shard,), np.zeros((1, 2), np.int64))

    for gather in (cases.csr_by_cpu, lambda *a: cases.csr_by_gpu(a[0], HostMemory(EMULATOR), *a[1:])):
        _, wide, _ = gather(case, "int32", "float64")
        _, same, _ = gather(case, "int32", "float16")
        np.testing.assert_array_equal(wide, stored.astype(np.float64))
        np.testing.assert_array_equal(same.view(np.uint16), stored.view(np.uint16))
