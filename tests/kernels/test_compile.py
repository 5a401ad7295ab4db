"""Every kernel compiles for every GPU since Turing, without spills, by nvcc or NVRTC.

`PYTHONPATH=tests python tests/kernels/test_compile.py` prints a table of registers and spills.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from emulator import nvrtc

from scdl_gpu.kernels import gpu, source

ARCHITECTURES = ("sm_75", "sm_80", "sm_90", "sm_100", "sm_120")
OLDEST, OURS = "sm_75", "sm_90"
CUPY_OPTIONS = (*gpu.OPTIONS, "-ftz=true")
NVRTC_OPTIONS = (*CUPY_OPTIONS, "--device-as-default-execution-space")
"""What CuPy adds to our options; NVRTC before 13.1 takes no lambda without the second."""
MOST_REGISTERS = 64
FLUSHED = re.compile(r"^\s*((?:cvt|add|sub|mul|fma|div)\S*\.ftz\S*)", re.MULTILINE)
"""Arithmetic of float32 that takes the smallest numbers for 0."""
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def compilers() -> list[str]:
    """Name what can compile CUDA here, first what CuPy compiles with."""
    return [name for name, is_there in (("nvrtc", nvrtc.library()), ("nvcc", shutil.which("nvcc"))) if is_there]


@cache
def compiled(compiler: str, stem: str, architecture: str) -> tuple[str, str]:
    """Compile one source for a GPU with the options that CuPy uses; returns the report of ptxas, and the PTX."""
    if compiler == "nvrtc":
        return nvrtc.compiled(source.text(stem), [*NVRTC_OPTIONS, f"--gpu-architecture={architecture}", "--ptxas-options=-v"])
    with tempfile.TemporaryDirectory() as folder:
        options = [*CUPY_OPTIONS, "-cubin", f"-arch={architecture}", "-Xptxas", "-v", "-keep", "-keep-dir", folder]
        command = ["nvcc", *options, "-o", f"{folder}/kernels.cubin", str(source.FOLDER / f"{stem}.cu")]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            raise RuntimeError(run.stderr)
        return run.stderr, (Path(folder) / f"{stem}.ptx").read_text()


def report(log: str) -> dict[str, dict[str, int]]:
    """Read registers, stack and spills of each kernel from the report of ptxas."""
    return {found["name"]: {key: int(value) for key, value in found.groupdict().items() if key != "name"} for found in KERNEL.finditer(log)}


def sources_and_architectures() -> list[Any]:
    """List what is compiled: in every run all for an H200, and what is soon compiled for the oldest architecture."""
    found = []
    for stem in source.stems():
        often = (OURS,) if stem.startswith("decode") else (OURS, OLDEST)
        marks = {architecture: [] if architecture in often else [pytest.mark.exhaustive] for architecture in ARCHITECTURES}
        found += [pytest.param(stem, architecture, marks=marks[architecture]) for architecture in ARCHITECTURES]
    return found


@pytest.mark.parametrize(("stem", "architecture"), sources_and_architectures())
def test_kernels_compile_without_spills(stem: str, architecture: str) -> None:
    """No kernel needs a stack or spills registers, none takes more registers than 1,024 threads of a multiprocessor have."""
    if not compilers():
        pytest.skip("no CUDA compiler: neither nvcc in PATH nor NVRTC (pip install nvidia-cuda-nvrtc)")

    log, _ = compiled(compilers()[0], stem, architecture)

    kernels = report(log)
    exported = re.findall(r"__global__ void", source.text(stem))
    assert "warning" not in log
    assert len(kernels) >= len(exported) > 0
    assert {name: use for name, use in kernels.items() if use["stack"] or use["stores"] or use["loads"]} == {}
    assert max(use["registers"] for use in kernels.values()) <= MOST_REGISTERS


@pytest.mark.parametrize("stem", source.stems())
def test_small_numbers_survive(stem: str) -> None:
    """CuPy compiles with -ftz=true; no conversion of a value is done by an instruction that flushes subnormals."""
    if not compilers():
        pytest.skip("no CUDA compiler: neither nvcc in PATH nor NVRTC (pip install nvidia-cuda-nvrtc)")

    _, text = compiled(compilers()[0], stem, OURS)

    assert ".visible .entry" in text
    assert FLUSHED.findall(text) == []
    assert FLUSHED.findall("\tcvt.ftz.f64.f32 \t%fd208, %f32;") == ["cvt.ftz.f64.f32"]


def test_a_spill_is_seen() -> None:
    """A report with a spill is read as one."""
    log = (
        "ptxas info    : Compiling entry function 'f' for 'sm_90'\nptxas info    : Function properties for f\n"
        "    16 bytes stack frame, 20 bytes spill stores, 36 bytes spill loads\nptxas info    : Used 48 registers, used 1 barriers\n"
    )

    assert report(log) == {"f": {"stack": 16, "stores": 20, "loads": 36, "registers": 48}}


@pytest.mark.exhaustive
def test_both_compilers_take_every_source() -> None:
    """Where nvcc and NVRTC are both there, both compile every source: NVRTC without any header or include path."""
    for compiler in compilers():
        for stem in source.stems():
            assert report(compiled(compiler, stem, OURS)[0]), (compiler, stem)


def table(found: dict[str, dict[str, dict[str, int]]]) -> str:
    """Write the most registers of each family of kernels, for each architecture."""
    families = sorted({re.sub(r"_(u?int|b?float)\d+", "", name) for kernels in found.values() for name in kernels})
    lines = ["| | " + " | ".join(families) + " |", "| --- |" + " --- |" * len(families)]
    for architecture, kernels in found.items():
        cells = []
        for family in families:
            used = [use for name, use in kernels.items() if re.sub(r"_(u?int|b?float)\d+", "", name) == family]
            registers = [use["registers"] for use in used]
            cells.append(f"{min(registers)}-{max(registers)}, spills {sum(use['stores'] for use in used)}")
        lines.append(f"| {architecture} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    logs = {a: "".join(compiled(compilers()[0], stem, a)[0] for stem in source.stems()) for a in ARCHITECTURES}
    sys.stdout.write(table({architecture: report(log) for architecture, log in logs.items()}) + "\n")
