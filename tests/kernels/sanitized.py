"""Runs the cases on the emulator built with ASan and UBSan; the first fault ends the process.

A script, for test_sanitized.py: python sanitized.py SEEDS CASE... (no case: all of them)
"""

import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
# The package without its front door, which loads torch: slow under ASan, and not needed.
package = types.ModuleType("scdl_gpu")
package.__path__ = [str(ROOT / "scdl_gpu")]
sys.modules["scdl_gpu"] = package

import numpy as np  # noqa: E402
from emulator import cases  # noqa: E402
from emulator.launcher import Emulator  # noqa: E402
from emulator.memory import HostMemory  # noqa: E402

CSR = (("int32", "float32"), ("int64", "int32"), ("int32", "float16"))
DENSE = (("float32", 0.0, False), ("uint8", 0.0, False), ("bfloat16", 1e4, True), ("float64", 1.0, False))


def run(case: cases.Case, seed: int) -> int:
    """Gather a case in every way; returns the number of wrong results, beside what the sanitizers see."""
    memory = HostMemory(Emulator(seed, flavour="sanitized"))
    wrong = 0
    for index, dtype in CSR:
        _, indices, data = cases.expected_csr(case, dtype)
        found, values, fault = cases.csr_by_gpu(case, memory, index, dtype)
        wrong += not (np.array_equal(found, indices) and np.array_equal(values, data) and np.array_equal(fault, cases.no_faults()))
    for dtype, target, log1p in DENSE:
        for genes in (None, np.arange(case.n_vars)[::-3]):
            found, fault = cases.dense_by_gpu(case, memory, dtype, genes, target, log1p)
            if dtype != "bfloat16":
                expected = cases.expected_dense(case, dtype, genes, target, log1p)
                wrong += not (np.allclose(found, expected, rtol=1e-6, atol=0) and np.array_equal(fault, cases.no_faults()))
    return wrong


def main(n_seeds: int, names: list[str]) -> None:
    """Run the named cases under seeds 0..n_seeds-1."""
    table = cases.table()
    chosen = [table[name] for name in names] if names else list(table.values())
    wrong = sum(run(case, seed) for case in chosen for seed in range(n_seeds))
    if wrong:
        sys.exit(f"{wrong} results are wrong")
    sys.stdout.write(f"{len(chosen)} cases under {n_seeds} orders: no fault\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
