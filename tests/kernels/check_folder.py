"""Holds the CUDA sources of a folder to the cases, under several orders of threads; ends with 1 at the first wrong result.

A script, for test_mutants.py: python check_folder.py FOLDER SEEDS raw|packed. Mutants may crash the process, which is an answer too.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import numpy as np  # noqa: E402
from emulator import cases, packed_cases  # noqa: E402
from emulator.launcher import Emulator  # noqa: E402
from emulator.memory import HostMemory  # noqa: E402

WAYS = (("float32", 0.0, False), ("float64", 1e4, True))
"""How packed rows are made dense."""


def is_right(case: cases.Case, memory: HostMemory) -> bool:
    """Tell whether CSR, dense and normalised batches are what SciPy makes."""
    _, indices, data = cases.expected_csr(case, "float32")
    found, values, _ = cases.csr_by_gpu(case, memory, "int32", "float32")
    if not (np.array_equal(found, indices) and np.array_equal(values, data)):
        return False
    dense, _ = cases.dense_by_gpu(case, memory, "float32")
    scaled, _ = cases.dense_by_gpu(case, memory, "float64", None, 1e4, True)
    expected = cases.expected_dense(case, "float64", None, 1e4, True)
    return np.array_equal(dense, cases.expected_dense(case, "float32")) and np.allclose(scaled, expected, rtol=1e-9, atol=0)


if __name__ == "__main__":
    for seed in range(int(sys.argv[2])):
        memory = HostMemory(Emulator(seed, folder=Path(sys.argv[1])))
        if sys.argv[3] == "raw" and not all(is_right(case, memory) for case in cases.table().values()):
            sys.exit(1)
        if sys.argv[3] == "packed" and any(packed_cases.wrong_results(case, memory, WAYS) for case in packed_cases.table().values()):
            sys.exit(1)
