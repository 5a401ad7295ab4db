"""`kernels/cpu.py` and `kernels/gpu.py` are twins."""

import ast
from pathlib import Path

import pytest

LAUNCH = "launch"
"""What starts kernels comes first in gpu.py, and has no counterpart on the CPU."""


def signatures(source: str) -> dict[str, list[str]]:
    """Give the argument names of each public function at the top of a module, without a leading `launch`."""
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    arguments = {f.name: [a.arg for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs)] for f in functions}
    return {name: found[found[:1] == [LAUNCH] :] for name, found in arguments.items()}


def is_output(argument: str) -> bool:
    """Tell whether an argument is one that is written to."""
    return argument == "out" or argument.startswith("out_")


def faults_between(cpu: dict[str, list[str]], gpu: dict[str, list[str]]) -> list[str]:
    """List where two modules of kernels differ, and arguments that follow an output."""
    faults = [f"{name}: cpu {cpu.get(name)}, gpu {gpu.get(name)}" for name in sorted({*cpu, *gpu}) if cpu.get(name) != gpu.get(name)]
    for name, arguments in {**gpu, **cpu}.items():
        outputs = [is_output(argument) for argument in arguments]
        if outputs != sorted(outputs):
            faults.append(f"{name}: an argument follows an output: {arguments}")
    return faults


def test_kernels_are_twins(root: Path) -> None:
    """Both have the same functions, arguments and order, outputs last; while there is no gpu.py there are no CUDA sources either."""
    kernels = root / "kernels"
    cpu = signatures((kernels / "cpu.py").read_text()) if (kernels / "cpu.py").exists() else {}
    gpu_is_there = (kernels / "gpu.py").exists()

    faults = faults_between(cpu, signatures((kernels / "gpu.py").read_text()) if gpu_is_there else cpu)

    assert not faults, "\n".join(faults)
    assert gpu_is_there or not [*kernels.glob("*.cu"), *kernels.glob("*.cuh")], "CUDA sources without kernels/gpu.py, their launchers"


@pytest.mark.parametrize(
    "gpu",
    ["def gather(rows, out): ...\ndef more(out): ...", "def gather(row, out): ...", "def gather(out, rows): ...", ""],
    ids=["missing", "renamed", "order", "absent"],
)
def test_differences_are_found(gpu: str) -> None:
    """A twin that lacks a function, renames an argument or orders them otherwise is named."""
    cpu = "def gather(rows, out): ...\ndef _hidden(x): ..."

    faults = faults_between(signatures(cpu), signatures(gpu))

    assert faults


def test_kernels_are_no_package(root: Path) -> None:
    """`kernels/` has no `__init__.py`, and `scdl_gpu/kernels` is a relative link to it."""
    link = root / "scdl_gpu" / "kernels"

    target = link.readlink()

    assert str(target) == "../kernels"
    assert not (root / "kernels" / "__init__.py").exists()
