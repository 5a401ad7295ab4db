"""benchmarks/gpu_check.py runs from end to end without a GPU, on the emulator; what only CUDA has is a stand-in here."""

import json
import os
import subprocess
import sys
import textwrap
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
LOADER_STEPS = ["loader device", "loader pinned", "loader host"]
SANITIZERS = [f"compute-sanitizer {tool}" for tool in ("memcheck", "racecheck", "synccheck", "initcheck")]


def check(out: Path, *arguments: str, path: str | None = None) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """Run the script; returns what came of it, and the record."""
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), "--rehearse", "--out", str(out), *arguments]
    environment = os.environ | ({} if path is None else {"PATH": path})
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    return run, json.loads((out / "gpu-check.json").read_text())


def statuses(record: dict[str, Any]) -> dict[str, str]:
    """Give the status of each step."""
    return {name: step["status"] for name, step in record["steps"].items()}


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Import the benchmark's modules."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "path", sys.path[:])
    import gpu_check
    import gpu_machine
    import kernels_gpu
    import loader_gpu

    return SimpleNamespace(check=gpu_check, machine=gpu_machine, kernels=kernels_gpu, loader=loader_gpu)


def sanitizer(folder: Path, script: str) -> str:
    """Put a stand-in for compute-sanitizer into `folder`; returns a PATH with it."""
    program = folder / "compute-sanitizer"
    program.write_text("#!/bin/sh\n" + textwrap.dedent(script))
    program.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


SANITIZER = """
echo "========= $*"
case "$2" in racecheck|synccheck) echo "========= Error: Device not supported"; exit 1;; esac
while [ "$1" != "9" ]; do shift; done; shift
"$@" && echo "========= ERROR SUMMARY: 0 errors"
"""
"""Runs what it is given for two of the four tools, and refuses the others: each run is a process that imports torch."""


def test_everything_is_rehearsed(tmp_path: Path) -> None:
    """Every step is done, with figures for whatever was measured, and a sanitizer that runs is recorded with its summary."""
    path = sanitizer(tmp_path, SANITIZER)

    run, record = check(tmp_path / "out", path=path)

    assert run.returncode == 0, run.stdout + run.stderr
    found = statuses(record)
    missing = {"gpu tests", "compute-sanitizer racecheck", "compute-sanitizer synccheck"}
    assert {name: status for name, status in found.items() if status != "done"} == dict.fromkeys(missing, "not available")
    steps = {"named cases", "every dtype", "edges", "faults", "limits", "csr", "dense", "pinned", "rivals", "small loader", *LOADER_STEPS}
    assert {*steps, "loader rivals", *SANITIZERS} <= set(found)
    assert record["steps"]["compute-sanitizer memcheck"]["summary"] == "========= ERROR SUMMARY: 0 errors"
    for tool in SANITIZERS:
        assert ("small loader" in record["steps"][tool]["lines"][0]) == ("initcheck" not in tool), tool
    assert record["machine"]["gpu"] == "none: rehearsed on the emulator"
    for step in ("csr", "csr variants", "dense", "pinned", "pinned dense", "packed csr", "packed dense", "packed pinned"):
        for result in record["steps"][step]["results"]:
            assert result["cells_per_second"] > 0
            assert result["graph_percent_of_limit"] > 0
    for step in LOADER_STEPS:
        results = record["steps"][step]["results"]
        assert {result["batch_size"] for result in results} == {64, 1_024, 8_192}
        assert len(results) == (7 if step == "loader host" else 9)
        for result in results:
            assert min(value for key, value in result.items() if key.endswith(("_per_second", "microseconds", "_of_limit"))) > 0
    assert sum("cells_per_second" in result for result in record["steps"]["loader rivals"]["results"]) == 6
    assert (tmp_path / "out" / "gpu-check.log").read_text().count("== csr\n") == 1


def test_a_step_that_dies_does_not_end_the_others(tmp_path: Path) -> None:
    """A step whose process dies is recorded with its last words, and those after it run."""
    run, record = check(tmp_path, "--only", "faults", "no such step", "limits")

    assert run.returncode == 1
    assert statuses(record) == {"faults": "done", "no such step": "failed", "limits": "done"}
    assert "KeyError" in record["steps"]["no such step"]["why"]


def test_steps_are_not_begun_when_time_is_up(tmp_path: Path) -> None:
    """What there is no time for is recorded as not run, and is no failure."""
    run, record = check(tmp_path, "--minutes", "0", "--only", "faults", "limits")

    assert run.returncode == 0
    assert statuses(record) == {"faults": "not run", "limits": "not run"}


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ('echo "========= Error: Device not supported"; exit 1', "not available"),
        ('echo "========= Invalid __global__ write"; echo "========= ERROR SUMMARY: 3 errors"; exit 9', "failed"),
    ],
    ids=["refused", "found"],
)
def test_what_a_sanitizer_says(script: str, status: str, tmp_path: Path, modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sanitizer that refuses the machine is not available; one that finds something fails."""
    monkeypatch.setenv("PATH", sanitizer(tmp_path, script))
    run = modules.check.Check(tmp_path / "out", 1.0, rehearse=True)

    run.sanitize("memcheck")

    assert statuses(run.record.read()) == {"compute-sanitizer memcheck": status}


def test_without_a_sanitizer(tmp_path: Path, modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sanitizer that is not installed is not available."""
    monkeypatch.setenv("PATH", str(tmp_path))
    run = modules.check.Check(tmp_path / "out", 1.0, rehearse=True)

    run.sanitize("racecheck")

    assert run.record.read()["steps"]["compute-sanitizer racecheck"]["why"] == "compute sanitizer is not there"


WITHOUT = """
import sys
for name in ("anndata", "isal", "h5py", "kvikio", "dask"):
    sys.modules[name] = None
import pytest
collected = pytest.main(["-q", "--collect-only", "-m", "gpu", *sys.argv[2:]])
sys.exit(collected or pytest.main(["-q", "-m", "not gpu", "-k", "several_archives or close_gives", sys.argv[1]]))
"""
"""A machine that lacks what machines with a GPU often lack: collect the tests for a GPU, and run some of the emulated ones."""


def test_the_tests_of_the_loader_are_among_those_for_a_gpu(modules: SimpleNamespace) -> None:
    """The step "gpu tests" runs the loader's tests, each on a real device too, in every placement; they need no anndata, nor h5py."""
    files = modules.check.gpu_test_files()
    own = next(file for file in files if file.endswith("test_loader_cuda.py"))

    run = subprocess.run([sys.executable, "-c", WITHOUT, own, *files], capture_output=True, text=True, check=False, cwd=BENCHMARKS.parent)

    names = {line.rpartition("::")[2] for line in run.stdout.splitlines() if "test_loader_cuda.py::" in line}
    assert run.returncode == 0, run.stdout + run.stderr
    assert "12 passed" in run.stdout
    for placement in ("device", "pinned", "host"):
        assert f"test_several_archives_of_several_dtypes[gpu-{{}}-{placement}]" in names
    assert len(names) > 120
    assert "test_a_gpu_copies_both_ways" in run.stdout


def test_wrong_batches_are_not_measured(modules: SimpleNamespace) -> None:
    """A gather whose result is not SciPy's, or that reports a fault, raises instead of giving figures."""
    bench = modules.kernels.Bench(modules.machine.Rehearsal())
    run = modules.kernels.Csr(modules.kernels.Batch(bench.resident, np.arange(5)), bench.resident.table())
    run()
    run.check()

    run.data[3] += 1
    with pytest.raises(ValueError, match="CSR: the batch is not what SciPy makes"):
        run.check()
    run.fault[0] = 2
    with pytest.raises(ValueError, match="reports faults"):
        run.check()


def test_wrong_batches_of_a_loader_are_not_measured(modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loader whose first batch is not SciPy's raises instead of giving figures; what the machine has no room for is recorded."""
    from scdl_gpu import DeviceError

    bench = modules.kernels.Bench(modules.machine.Rehearsal())
    source = modules.loader.cells(bench)
    monkeypatch.setattr(source, "base", source.base * 2)

    for output in ("csr", "dense float32", "dense bfloat16"):
        with pytest.raises(ValueError, match="the batch is not what SciPy makes"):
            modules.loader.measured(bench, "device", output, 64)
    monkeypatch.setattr(modules.loader, "opened", lambda *_: (_ for _ in ()).throw(DeviceError("no room")))
    result = modules.loader.placed("pinned", bench)[0]

    assert result["not_available"] == "no room"
    assert "percent_of_limit" not in result


class FakeEvent:
    """A CUDA event by a clock that goes on 10 ms with every run."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        """Note the time."""
        self.at = FakeEvent.now

    def elapsed_time(self, end: "FakeEvent") -> float:
        """Give milliseconds."""
        return end.at - self.at


class FakeGraph:
    """A CUDA graph whose replay takes 6 ms."""

    def replay(self) -> None:
        """Let time pass."""
        FakeEvent.now += 6


def test_a_gpu_is_timed_by_events_and_graphs(modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events around all runs give the time of one; a graph of them is replayed and divided alike; facts come from torch."""
    from scdl_gpu import device

    properties = SimpleNamespace(name="fake", major=9, minor=0, multi_processor_count=132, total_memory=1)
    fakes = {"Event": FakeEvent, "CUDAGraph": FakeGraph, "graph": lambda _: nullcontext(), "synchronize": lambda: None}
    for name, fake in {**fakes, "get_device_properties": lambda _: properties}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(device, "CudaDevice", lambda: SimpleNamespace(launch=None, torch_device=torch.device("cpu")))
    machine = modules.machine.CudaMachine()

    def run() -> None:
        FakeEvent.now += 10

    assert machine.seconds([run, run]) == pytest.approx(0.010)
    assert machine.graph_seconds([run, run]) == pytest.approx(0.003)
    assert machine.host_seconds(run, n=2) < 1
    assert machine.facts()["compute_capability"] == "9.0"


def test_what_a_graph_cannot_hold_is_measured_without(modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a run cannot be captured the other figures stay, and the reason is recorded."""
    bench = modules.kernels.Bench(modules.machine.Rehearsal())

    def refuse(runs: Any) -> float:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(bench.machine, "graph_seconds", refuse)

    found = modules.kernels.csr(bench)

    assert {result["graph"] for result in found} == {"not available: operation not permitted when stream is capturing"}
    assert all(result["percent_of_limit"] > 0 for result in found)


def test_cupy_is_a_rival(modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """CuPy is given the same matrix and rows without a copy; SciPy stands in for it."""
    import scipy.sparse as sp

    chosen: list[Any] = []

    class Matrix:
        def __init__(self, arrays: Any, shape: tuple[int, int]) -> None:
            self._matrix = sp.csr_matrix(tuple(array.numpy() for array in arrays), shape=shape)

        def __getitem__(self, rows: torch.Tensor) -> Any:
            chosen.append(rows)
            return self._matrix[rows.numpy()]

    cupy, cupyx, scipy_, sparse = (ModuleType(name) for name in ("cupy", "cupyx", "cupyx.scipy", "cupyx.scipy.sparse"))
    cupyx.__spec__ = sparse.__spec__ = SimpleNamespace()
    vars(cupy).update(from_dlpack=lambda array: array, cuda=SimpleNamespace(ExternalStream=lambda _: nullcontext()))
    vars(sparse).update(csr_matrix=Matrix)
    for module in (cupy, cupyx, scipy_, sparse):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    bench = modules.kernels.Bench(modules.machine.Rehearsal())

    found, served = modules.kernels.rivals(bench), modules.loader.rivals(bench)

    assert len(chosen) >= 4
    assert all(result["cells_per_second"] > 0 for result in found if result["what"].startswith(("CuPy", "gather_csr")))
    assert all(result["cells_per_second"] > 0 for result in served if "CuPy" in result["what"])
    assert sum("CuPy" in result["what"] for result in served) == 2
