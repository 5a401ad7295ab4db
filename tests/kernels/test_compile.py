"""Every kernel compiles for every GPU since Turing, without spills, by nvcc or NVRTC.

`PYTHONPATH=tests python tests/kernels/test_compile.py` prints a table of registers and spills.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from emulator import nvrtc

from scdl_gpu.kernels import gpu, source

ARCHITECTURES = ("sm_75", "sm_80", "sm_90", "sm_100", "sm_120")
EVERY_RUN = ("sm_90", "sm_120")
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
    """Name what can compile CUDA here."""
    return [name for name, is_there in (("nvcc", shutil.which("nvcc")), ("nvrtc", nvrtc.library())) if is_there]


def compile_log(compiler: str, stem: str, architecture: str, folder: Path) -> str:
    """Compile one source for a GPU with the options that CuPy uses; returns the report of ptxas."""
    if compiler == "nvrtc":
        return nvrtc.compiled(source.text(stem), [*NVRTC_OPTIONS, f"--gpu-architecture={architecture}", "--ptxas-options=-v"])[0]
    return nvcc(stem, ["-cubin", f"-arch={architecture}", "-Xptxas", "-v"], folder / "kernels.cubin")


def ptx(compiler: str, stem: str, folder: Path) -> str:
    """Compile one source to PTX."""
    if compiler == "nvrtc":
        return nvrtc.compiled(source.text(stem), [*NVRTC_OPTIONS, "--gpu-architecture=compute_90"])[1]
    nvcc(stem, ["-ptx", "-arch=compute_90"], folder / "kernels.ptx")
    return (folder / "kernels.ptx").read_text()


def nvcc(stem: str, options: list[str], target: Path) -> str:
    """Run nvcc; returns what it says, or raises RuntimeError with that."""
    command = ["nvcc", *CUPY_OPTIONS, *options, "-o", str(target), str(source.FOLDER / f"{stem}.cu")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(run.stderr)
    return run.stderr


def report(log: str) -> dict[str, dict[str, int]]:
    """Read registers, stack and spills of each kernel from the report of ptxas."""
    return {found["name"]: {key: int(value) for key, value in found.groupdict().items() if key != "name"} for found in KERNEL.finditer(log)}


def sources_and_architectures() -> list[Any]:
    """List what is compiled; the decoders, which take long, in every run for two architectures only: the tightest, and that of an H200."""
    return [
        pytest.param(stem, architecture, marks=[] if stem[:6] != "decode" or architecture in EVERY_RUN else pytest.mark.exhaustive)
        for stem in source.stems()
        for architecture in ARCHITECTURES
    ]


@pytest.mark.parametrize(("stem", "architecture"), sources_and_architectures())
def test_kernels_compile_without_spills(stem: str, architecture: str, tmp_path: Path) -> None:
    """No kernel needs a stack or spills registers, none takes more registers than 1,024 threads of a multiprocessor have."""
    if not compilers():
        pytest.skip("no CUDA compiler: neither nvcc in PATH nor NVRTC (pip install nvidia-cuda-nvrtc)")

    log = compile_log(compilers()[0], stem, architecture, tmp_path)

    kernels = report(log)
    exported = re.findall(r"__global__ void", source.text(stem))
    assert "warning" not in log
    assert len(kernels) >= len(exported) > 0
    assert {name: use for name, use in kernels.items() if use["stack"] or use["stores"] or use["loads"]} == {}
    assert max(use["registers"] for use in kernels.values()) <= MOST_REGISTERS


@pytest.mark.parametrize("stem", source.stems())
def test_small_numbers_survive(stem: str, tmp_path: Path) -> None:
    """CuPy compiles with -ftz=true; no conversion of a value is done by an instruction that flushes subnormals."""
    if not compilers():
        pytest.skip("no CUDA compiler: neither nvcc in PATH nor NVRTC (pip install nvidia-cuda-nvrtc)")

    text = ptx(compilers()[0], stem, tmp_path)

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
def test_both_compilers_take_every_source(tmp_path: Path) -> None:
    """Where nvcc and NVRTC are both there, both compile every source: NVRTC without any header or include path."""
    for compiler in compilers():
        for stem in source.stems():
            assert report(compile_log(compiler, stem, "sm_90", tmp_path)), (compiler, stem)


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
    with tempfile.TemporaryDirectory() as folder:
        logs = {a: "".join(compile_log(compilers()[0], stem, a, Path(folder)) for stem in source.stems()) for a in ARCHITECTURES}
    sys.stdout.write(table({architecture: report(log) for architecture, log in logs.items()}) + "\n")
