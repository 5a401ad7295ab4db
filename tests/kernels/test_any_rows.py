"""Whatever rows are stored and asked for, in whatever order, the twins make what SciPy makes."""

import numpy as np
import pytest
from emulator import cases
from emulator.launcher import Emulator
from emulator.memory import HostMemory
from hypothesis import given, settings
from hypothesis import strategies as st

from scdl_gpu.kernels.shards import STORED


@st.composite
def any_case(draw: st.DrawFn) -> cases.Case:
    """Draw shards of any dtypes, sorted or not, and rows of them in any order of reading."""
    n_vars = draw(st.sampled_from([1, 2, 31, 256, 700, 5_000]))
    stored = []
    for _ in range(draw(st.integers(1, 3))):
        lengths = draw(st.lists(st.integers(0, n_vars), min_size=1, max_size=6))
        shard = cases.make_shard(lengths, n_vars, seed=draw(st.integers(0, 99)), is_sorted=draw(st.booleans()))
        wide = draw(st.sampled_from([d for d in ("uint8", "uint16", "uint32", "uint64") if n_vars - 1 <= np.iinfo(d).max]))
        values = draw(st.sampled_from(STORED))
        shift = draw(st.sampled_from([0, cases.FAR]))
        stored.append(cases.Stored(shard.indptr, shard.indices.astype(wide), shard.data.astype(values), shard.is_sorted, shift))
    numbers = st.integers(0, len(stored) - 1).flatmap(lambda s: st.tuples(st.just(s), st.integers(0, stored[s].indptr.size - 2)))
    picks = np.array(draw(st.lists(numbers, min_size=1, max_size=40)), np.int64)
    reading = np.array(draw(st.permutations(range(len(picks))))) if draw(st.booleans()) else None
    return cases.Case("any", n_vars, tuple(stored), picks, reading)


@pytest.mark.parametrize(
    "examples", [pytest.param(50, id="some"), pytest.param(2_000, id="many", marks=pytest.mark.exhaustive)]
)
def test_any_rows(examples: int) -> None:
    """CSR and dense, on the CPU and on the emulator under any seed."""

    @settings(max_examples=examples)
    @given(case=any_case(), seed=st.integers(0, 1_000), made=st.sampled_from(["float32", "int32"]), data=st.data())
    def check(case: cases.Case, seed: int, made: str, data: st.DataObject) -> None:
        genes = np.array(data.draw(st.lists(st.integers(0, case.n_vars - 1), unique=True, max_size=20)), np.int64)
        _, indices, values = cases.expected_csr(case, made)
        memory = HostMemory(Emulator(seed))

        for found in (cases.csr_by_cpu(case, "int32", made), cases.csr_by_gpu(case, memory, "int32", made)):
            np.testing.assert_array_equal(found[0], indices)
            np.testing.assert_array_equal(found[1], values)
        for subset in (None, genes if genes.size else None):
            expected = cases.expected_dense(case, made, subset)
            for found in (cases.dense_by_cpu(case, made, subset), cases.dense_by_gpu(case, memory, made, subset)):
                np.testing.assert_array_equal(found[0], expected)

    check()
