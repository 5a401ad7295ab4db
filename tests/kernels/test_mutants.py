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

CSR, DENSE, COMMON, BITMAP, TILE = "gather_csr.cu", "gather_dense.cu", "common.cuh", "bitmap.cuh", "tile.cuh"
PACKED, DECODE_CSR, DECODE_DENSE, CHECK = "packed.cuh", "decode_csr.cu", "decode_dense.cu", "check_rows.cu"
WARP = "        __syncwarp();\n"
MUTANTS = {  # file, text, how often it is there, which one is replaced, by what
    "the unchanged kernels": (CSR, "#include", 2, 0, "#include"),
    "the stage is read before it is filled": (CSR, WARP, 3, 1, ""),
    "copies are not waited for": (CSR, "        wait_for_copies();\n", 1, 0, ""),
    "a row begins one element late": (CSR, "starts[row] + (from - begin)", 1, 0, "starts[row] + (from - begin) + 1"),
    "parts of a row all go to its begin": (CSR, "indptr[part.position] + (from - begin)", 1, 0, "indptr[part.position]"),
    "one round of rows is all": (CSR, "bool more = true; more;", 1, 0, "bool more = true; more; more = false"),
    "bits are set before the bitmap is clear": (CSR, "bitmap[w] = 0;\n        __syncthreads();\n", 1, 0, "bitmap[w] = 0;\n"),
    "bits are counted before all are set": (CSR, "        __syncthreads();\n        const u32 found", 1, 0, "        const u32 found"),
    "ranks are used before they are counted": (BITMAP, "    __syncthreads();\n    return total;", 1, 0, "    return total;"),
    "sums of warps are read before they are there": (BITMAP, "= upto;\n    __syncthreads();\n", 1, 0, "= upto;\n"),
    "the bitmap is cleared before it was read": (CSR, "done += found;\n        __syncthreads();\n", 1, 0, "done += found;\n"),
    "a line is staged from its second word on": (COMMON, "if (at >= first) copy_async", 1, 0, "if (at > first) copy_async"),
    "a tile is written before it is whole": (DENSE, "__syncthreads_count(inside)", 1, 0, "__popc(__ballot_sync(ALL_LANES, inside))"),
    "elements arrive before the zeros": (DENSE, "first);\n        __syncthreads();\n", 1, 0, "first);\n"),
    "an unsorted tile is written before it is whole": (DENSE, "    __syncthreads();\n    return 0;", 1, 0, "    return 0;"),
    "words are cleared by others than wrote them": (TILE, "base + threadIdx.x * 16;", 1, 0, "base + (255 - threadIdx.x) * 16;"),
    "sums are read before they are there": (DENSE, "= sum;\n    __syncthreads();\n", 1, 0, "= sum;\n"),
    "rows begin with a whole word": (TILE, "at >= first && at + 16 <= last", 1, 0, "at + 16 <= last"),
}


def without(file: str, line: str, after: str, times: int = 1) -> tuple[str, str, int, int, str]:
    """Leave out a line that comes after some text, the first time."""
    return file, f"{after}\n{line}\n", times, 0, f"{after}\n"


BARRIER, INNER = "    __syncthreads();", "            __syncthreads();"
OUTER, LANES = "        __syncthreads();", "            __syncwarp();"
PACKED_MUTANTS = {
    "copies are not waited for": (PACKED, "        wait_for_copies();\n        team.wait();\n", 1, 0, "        team.wait();\n"),
    "copies are not shown to others": without(PACKED, "        team.wait();", "        wait_for_copies();"),
    "a segment is read before it is staged": without(PACKED, BARRIER, "    at += size;"),
    "sizes of steps are read before they are there": without(PACKED, BARRIER, "sums[step] = upto;\n    }"),
    "sums of gaps are read before they are there": without(PACKED, BARRIER, "min(upto, MOST_RANK);"),
    "sums of gaps have one place for every turn": (PACKED, " + (k & team.n_warps);", 1, 0, ";"),
    "ranks are read before they are turned": (PACKED, f"{LANES}\n", 2, 0, ""),
    "the second half of middle fields begins late": (PACKED, "half * 4 * width", 1, 0, "half * (4 * width + 1)"),
    "gaps of 14 bits have 16": (PACKED, "gap_code == 13 ? 14", 1, 0, "gap_code == 13 ? 16"),
    "the last block is a whole one": (PACKED, "b.n = min(8u, n_left);", 1, 0, "b.n = 8;"),
    "wide counts come from the wrong block": (PACKED, "4 * i + (lane >> 3)", 1, 0, "4 * i + (lane >> 2)"),
    "long rows are left out": (DECODE_CSR, "!__syncthreads_count(is_left)", 1, 0, "__syncthreads_count(is_left) < 999"),
    "a long row is staged before the last one was read": (DECODE_CSR, "if (turn) __syncthreads();", 1, 0, ""),
    "bits are counted before all are set": without(DECODE_CSR, INNER, "            });"),
    "columns overwrite values": without(DECODE_CSR, INNER, "= values[k];"),
    "columns are read before they are there": without(DECODE_CSR, INNER, "= column; });"),
    "the bitmap is cleared before it was read": without(DECODE_CSR, OUTER, "at += found;"),
    "a list is put before it is whole": (DECODE_DENSE, f"{OUTER}\n        t++;", 1, 0, "        t++;"),
    "elements arrive before the zeros": without(DECODE_DENSE, OUTER, "sums.is_there[threadIdx.x] = 0;"),
    "numbers come before the last were added": without(DECODE_DENSE, INNER, "sums.add(lane);"),
    "numbers are added before they wait": (DECODE_DENSE, f"{LANES}\n", 3, 0, ""),
    "a row check leaves out words": (CHECK, "k + 3 >= 0 && k + 3 < end", 1, 0, "k + 3 >= 0 && k + 4 < end"),
}
"""The same for decoders of packed rows."""



def mutate(folder: Path, file: str, text: str, times: int, which: int, instead: str) -> None:
    """Copy the CUDA sources to `folder`, with one text replaced; fails if it is not there as often as it should be."""
    for source in [*KERNELS.glob("*.cu"), *KERNELS.glob("*.cuh")]:
        shutil.copy(source, folder)
    parts = (folder / file).read_text().split(text)
    assert len(parts) == times + 1, f"{file} has {text!r} {len(parts) - 1} times, not {times}: bring the table of mutants up to date"
    (folder / file).write_text(text.join(parts[: which + 1]) + instead + text.join(parts[which + 1 :]))


def is_found(mutant: tuple[str, str, int, int, str], table: str, folder: Path) -> bool:
    """Tell whether some case of a table, under some order of threads, tells the mutant from the kernel."""
    mutate(folder, *mutant)
    command = [sys.executable, str(HERE / "check_folder.py"), str(folder), str(SEEDS), table]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"SCDL_EMULATOR_CACHE": str(folder)})
    assert "does not compile" not in run.stderr, run.stderr
    return run.returncode != 0


@pytest.mark.exhaustive
@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_found(mutant: str, tmp_path: Path) -> None:
    """The cases of raw rows tell every mutant from the kernel, and not the kernel from itself."""
    assert is_found(MUTANTS[mutant], "raw", tmp_path) == (mutant != "the unchanged kernels")


@pytest.mark.exhaustive
@pytest.mark.parametrize("mutant", PACKED_MUTANTS)
def test_mutants_of_decoders_are_found(mutant: str, tmp_path: Path) -> None:
    """So do those of packed rows."""
    assert is_found(PACKED_MUTANTS[mutant], "packed", tmp_path)


@pytest.mark.exhaustive
def test_decoders_are_no_mutants(tmp_path: Path) -> None:
    """The cases of packed rows do not tell the kernels from themselves."""
    assert not is_found(MUTANTS["the unchanged kernels"], "packed", tmp_path)


def test_mutants_fit_the_sources(tmp_path: Path) -> None:
    """The texts that mutants replace are in the sources, as often as the table says."""
    for mutant in (*MUTANTS.values(), *PACKED_MUTANTS.values()):
        mutate(tmp_path, *mutant)

    assert (tmp_path / "common.cuh").exists()
