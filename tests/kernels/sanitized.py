"""Runs the cases on the emulator built with ASan and UBSan; the first fault ends the process.

A script, for test_sanitized.py: python sanitized.py SEEDS CASE... (no case: all of them, of raw and packed rows), or
python sanitized.py --flips STEP SHARD: every STEP-th byte of a packed shard changed, alone.
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
from emulator import cases, packed_cases, packed_flips  # noqa: E402
from emulator.launcher import Emulator  # noqa: E402
from emulator.memory import HostMemory  # noqa: E402
from emulator.packed_batches import Batch  # noqa: E402
from emulator.packed_rows import Shard  # noqa: E402

CSR = (("int32", "float32"), ("int64", "int32"), ("int32", "float16"))
PACKED = (("float32", 1e4, True), ("float64", 0.0, False))
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


def run_packed(case: packed_cases.Case, seed: int) -> int:
    """Decode a case in every way; returns the number of wrong results."""
    return len(packed_cases.wrong_results(case, HostMemory(Emulator(seed, flavour="sanitized")), PACKED))


def run_any_bytes(seed: int) -> None:
    """Decode rows of any bytes, short and long, which mean nothing; the payload ends with the last of them."""
    random = np.random.default_rng(seed)
    for is_ranked in (False, True):
        shard = Shard("float64", 3_000, [random.permutation(3_000).astype(np.uint16) if is_ranked else None])
        for n_bytes in (1, 4, 60, 400, 2_000, 6_000):
            kinds = random.integers(0, 256, 4, dtype=np.uint8)
            text = random.integers(0, 256, n_bytes, dtype=np.uint8)
            text[: n_bytes // 3] = random.choice(kinds, n_bytes // 3)
            shard.add_bytes(text.tobytes(), int(random.integers(1, min(3_000, 8 * n_bytes))))
        batch = Batch([shard], [(0, row) for row in range(len(shard.entries))])
        device = packed_cases.DeviceBatch(batch, HostMemory(Emulator(seed, flavour="sanitized")))
        for found, _, _ in (device.csr(), device.csr("uint8", "int64")):
            if not ((found >= 0) & (found < 3_000)).all():
                sys.exit("a column is out of range")
        device.dense("float32", None, 1e4, True)
        device.dense("int16", range(0, 3_000, 7))
        device.check()


def main(n_seeds: int, names: list[str]) -> None:
    """Run the named cases under seeds 0..n_seeds-1."""
    raw, packed = cases.table(), packed_cases.table()
    chosen = names or [*raw, *packed]
    wrong = 0
    for seed in range(n_seeds):
        for name in chosen:
            wrong += run(raw[name], seed) if name in raw else run_packed(packed[name], seed)
        run_any_bytes(seed)
    if wrong:
        sys.exit(f"{wrong} results are wrong")
    sys.stdout.write(f"{len(chosen)} cases under {n_seeds} orders: no fault\n")


def flips(step: int, file: Path) -> None:
    """Read the shard with every `step`-th of its bytes changed."""
    wrong = list(packed_flips.wrong_places(file, step, HostMemory(Emulator(1, flavour="sanitized"))))
    if wrong:
        sys.exit("\n".join(wrong))
    sys.stdout.write("no fault\n")


if __name__ == "__main__":
    if sys.argv[1] == "--flips":
        flips(int(sys.argv[2]), Path(sys.argv[3]))
    else:
        main(int(sys.argv[1]), sys.argv[2:])
