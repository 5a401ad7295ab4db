"""The cases see it when a line of a kernel is wrong: each planted fault gives a wrong batch, an error of the emulator, or a crash."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "kernels"
SEEDS = 5

CSR, DENSE, COMMON = "gather_csr.cu", "gather_dense.cu", "common.cuh"
WARP = "        __syncwarp();\n"
MUTANTS = {  # file, text, how often it is there, which one is replaced, by what
    "the unchanged kernels": (CSR, "#include", 1, 0, "#include"),
    "the stage is read before it is filled": (CSR, WARP, 3, 1, ""),
    "copies are not waited for": (CSR, "        wait_for_copies();\n", 1, 0, ""),
    "a row begins one element late": (CSR, "starts[row] + (from - begin)", 1, 0, "starts[row] + (from - begin) + 1"),
    "parts of a row all go to its begin": (CSR, "indptr[part.position] + (from - begin)", 1, 0, "indptr[part.position]"),
    "one round of rows is all": (CSR, "bool more = true; more;", 1, 0, "bool more = true; more; more = false"),
    "bits are set before the bitmap is clear": (CSR, "bitmap[w] = 0;\n        __syncthreads();\n", 1, 0, "bitmap[w] = 0;\n"),
    "bits are counted before all are set": (CSR, "        __syncthreads();\n        const u32 found", 1, 0, "        const u32 found"),
    "ranks are used before they are counted": (CSR, "    __syncthreads();\n    return total;", 1, 0, "    return total;"),
    "sums of warps are read before they are there": (CSR, "= upto;\n    __syncthreads();\n", 1, 0, "= upto;\n"),
    "the bitmap is cleared before it was read": (CSR, "done += found;\n        __syncthreads();\n", 1, 0, "done += found;\n"),
    "a line is staged from its second word on": (COMMON, "if (at >= first) copy_async", 1, 0, "if (at > first) copy_async"),
    "a tile is written before it is whole": (DENSE, "__syncthreads_count(inside)", 1, 0, "__popc(__ballot_sync(ALL_LANES, inside))"),
    "elements arrive before the zeros": (DENSE, "first);\n        __syncthreads();\n", 1, 0, "first);\n"),
    "an unsorted tile is written before it is whole": (DENSE, "    __syncthreads();\n    return 0;", 1, 0, "    return 0;"),
    "words are cleared by others than wrote them": (DENSE, "base + threadIdx.x * 16;", 1, 0, "base + (255 - threadIdx.x) * 16;"),
    "sums are read before they are there": (DENSE, "= sum;\n    __syncthreads();\n", 1, 0, "= sum;\n"),
    "rows begin with a whole word": (DENSE, "at >= first && at + 16 <= last", 1, 0, "at + 16 <= last"),
}


def mutate(folder: Path, file: str, text: str, times: int, which: int, instead: str) -> None:
    """Copy the CUDA sources to `folder`, with one text replaced; fails if it is not there as often as it should be."""
    for source in [*KERNELS.glob("*.cu"), *KERNELS.glob("*.cuh")]:
        shutil.copy(source, folder)
    parts = (folder / file).read_text().split(text)
    assert len(parts) == times + 1, f"{file} has {text!r} {len(parts) - 1} times, not {times}: bring the table of mutants up to date"
    (folder / file).write_text(text.join(parts[: which + 1]) + instead + text.join(parts[which + 1 :]))


@pytest.mark.exhaustive
@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_found(mutant: str, tmp_path: Path) -> None:
    """Some case under some order of threads tells the mutant from the kernel, and none the kernel from itself."""
    mutate(tmp_path, *MUTANTS[mutant])
    command = [sys.executable, str(HERE / "check_folder.py"), str(tmp_path), str(SEEDS)]

    run = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"SCDL_EMULATOR_CACHE": str(tmp_path)})

    assert "does not compile" not in run.stderr, run.stderr
    assert (run.returncode == 0) == (mutant == "the unchanged kernels"), run.stderr


def test_mutants_fit_the_sources(tmp_path: Path) -> None:
    """The texts that mutants replace are in the sources, as often as the table says."""
    for mutant in MUTANTS.values():
        mutate(tmp_path, *mutant)

    assert (tmp_path / "common.cuh").exists()
