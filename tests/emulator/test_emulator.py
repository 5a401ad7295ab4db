"""The emulator computes what a GPU would, and answers what a GPU would answer with a hang or rubbish by an error."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from emulator import build, memory
from emulator.launcher import Emulator, EmulatorError
from numpy.typing import NDArray

HERE = Path(__file__).parent
SEEDS = range(6)
N, BLOCK = 256, 128
REVERSED = list(range(31, -1, -1))

CALL = """
import sys
sys.path.insert(0, sys.argv[1])
from emulator.test_emulator import planted, sums
sums(planted(3, flavour="sanitized"), sys.argv[2])
print("no fault found")
"""


def planted(seed: int = 0, *, flavour: str = "plain") -> Emulator:
    """Give the emulator over planted.cu."""
    return Emulator(seed, flavour=flavour, folder=HERE)


def sums(emulator: Emulator, fault: str = "NONE") -> NDArray[np.int64]:
    """Run the kernel `sums` over N numbers, in buffers of exactly their size."""
    x, out = memory.copy(np.arange(N, dtype=np.int64) ** 2), memory.empty(N, np.int64)
    emulator.launch(f"planted_sums_{fault}", (N // BLOCK,), (BLOCK,), (x.ctypes.data, out.ctypes.data, N), shared_bytes=8 * BLOCK)
    return out


def one_warp(emulator: Emulator, name: str, n: int) -> list[int]:
    """Run a kernel of one warp over the numbers 0..n-1."""
    x, out = memory.copy(np.arange(n, dtype=np.int64)), memory.empty(n, np.int64)
    emulator.launch(f"planted_{name}", (1,), (32,), (x.ctypes.data, out.ctypes.data), shared_bytes=8 * n)
    return out.tolist()


@pytest.fixture
def expected() -> list[int]:
    """Give what `sums` computes, by NumPy."""
    x = (np.arange(N, dtype=np.int64) ** 2).reshape(-1, BLOCK)
    return (np.roll(x, -1, axis=1) + x.sum(axis=1, keepdims=True)).ravel().tolist()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_right_kernel_is_right_in_every_order(seed: int, expected: list[int]) -> None:
    """Barriers, shuffles, shared memory and asynchronous copies work, whatever order the seed makes."""
    emulator = planted(seed)

    found = sums(emulator)

    assert found.tolist() == expected
    assert one_warp(emulator, "reverse_NONE", 32) == REVERSED
    assert one_warp(emulator, "copy_NONE", 64) == list(range(64))
    assert emulator.launches == 3


def test_a_deleted_barrier_is_found(expected: list[int]) -> None:
    """Without its __syncthreads the result is wrong in some order of warps."""
    wrong = [sums(planted(seed), "NO_BARRIER").tolist() != expected for seed in SEEDS]

    assert any(wrong)


def test_a_deleted_syncwarp_is_found() -> None:
    """Without its __syncwarp the result is wrong in some order of lanes."""
    wrong = [one_warp(planted(seed), "reverse_NO_SYNCWARP", 32) != REVERSED for seed in SEEDS]

    assert any(wrong)


def test_a_result_taken_before_the_copy_is_there_is_found() -> None:
    """What is read before the wait for an asynchronous copy is not what was copied."""
    found = one_warp(planted(), "copy_EARLY", 64)

    assert found[0::2] != list(range(0, 64, 2))
    assert found[1::2] == list(range(1, 64, 2))


@pytest.mark.parametrize(
    ("fault", "message"),
    [("SHUFFLE_OF_HALF", r"deadlock: .* \(block 0,0\)"), ("BARRIER_OF_HALF", r"part of the block only \(block 0,0\)")],
)
def test_threads_that_miss_each_other_are_found(fault: str, message: str) -> None:
    """A shuffle or a barrier that some threads skip raises, instead of hanging."""
    with pytest.raises(EmulatorError, match=message):
        sums(planted(), fault)


def test_copies_that_nobody_waits_for_are_found() -> None:
    """A thread that ends with asynchronous copies under way raises."""
    with pytest.raises(EmulatorError, match="without waiting for its copies"):
        one_warp(planted(), "copy_NO_WAIT", 64)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("NONE", "no fault found"),
        ("STORE_BEHIND", "heap-buffer-overflow.*WRITE of size 8"),
        ("READ_BEHIND", "heap-buffer-overflow.*READ of size 8"),
        ("SHARED_BEHIND", "heap-buffer-overflow.*WRITE of size 8"),
        ("BAD_SHIFT", "shift exponent 64 is too large"),
    ],
)
def test_sanitizers_see_one_element_too_far(fault: str, message: str) -> None:
    """The sanitized build names a store, a read or shared memory beyond the end, and undefined arithmetic."""
    build.library(HERE / "planted.cu", "sanitized")
    environment = os.environ | build.sanitizer_environment()

    run = subprocess.run(
        [sys.executable, "-c", CALL, str(HERE.parent), fault], capture_output=True, text=True, check=False, env=environment
    )

    said = (run.stdout + run.stderr).replace("\n", " ")
    assert (run.returncode == 0) == (fault == "NONE"), said
    assert re.search(message, said), said


def test_what_is_called_wrongly_raises() -> None:
    """A wrong number of arguments, an unknown kernel and an unknown source are named."""
    emulator = planted()

    with pytest.raises(EmulatorError, match="takes 3 arguments, not 2"):
        emulator.launch("planted_sums_NONE", (1,), (32,), (0, 0))
    with pytest.raises(LookupError, match="exports no kernel named planted_products"):
        emulator.launch("planted_products", (1,), (32,), ())
    with pytest.raises(LookupError, match=r"no CUDA source .* products"):
        emulator.launch("products", (1,), (32,), ())


def test_a_source_that_does_not_compile_raises(tmp_path: Path) -> None:
    """The compiler's words are in the error; a warning is enough for it."""
    (tmp_path / "bad.cu").write_text("int f(int x) { int unused; return x; }\n")

    with pytest.raises(RuntimeError, match="unused variable"):
        build.library(tmp_path / "bad.cu")


def test_libraries_are_kept_by_their_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same source is compiled once, a changed header makes another library, and none lies in the tree."""
    monkeypatch.setenv("SCDL_EMULATOR_CACHE", str(tmp_path / "cache"))
    (tmp_path / "h.cuh").write_text("#define ONE 1\n")
    (tmp_path / "a.cu").write_text('#include "h.cuh"\nextern "C" int one() { return ONE; }\n')
    compile_anew = build.library.__wrapped__

    first = compile_anew(tmp_path / "a.cu")
    again = compile_anew(tmp_path / "a.cu")
    (tmp_path / "h.cuh").write_text("#define ONE 2\n")
    changed = compile_anew(tmp_path / "a.cu")

    assert first == again != changed
    assert {path.parent for path in (first, changed)} == {tmp_path / "cache"}
    assert len(list((tmp_path / "cache").iterdir())) == 2
