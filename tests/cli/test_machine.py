"""What `scdl-gpu doctor` finds: each piece present, missing and broken, the pieces being fakes."""

import ctypes
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from scdl_gpu import arena, reader
from scdl_gpu.cli import disk, machine
from scdl_gpu.cli.machine import Finding


class Libcuda:
    """The one function of libcuda that is asked, answering `number`."""

    def __init__(self, number: int) -> None:
        self.number = number

    def cuDriverGetVersion(self, out: Any) -> int:  # noqa: N802
        """Write the version."""
        out._obj.value = self.number
        return 0


@pytest.fixture
def libcuda(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Give the function that puts a driver's library in place, or takes it away."""

    def put(number: int | None) -> None:
        def load(name: str) -> Libcuda:
            if number is None:
                raise OSError(f"{name}: cannot open shared object file")
            return Libcuda(number)

        monkeypatch.setattr(ctypes, "CDLL", load)

    return put


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Give the function that lets torch find one GPU."""

    def put(capability: tuple[int, int] = (9, 0)) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (70 * 10**9, 80 * 10**9))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Fake 80")

    return put


def seen(finding: Finding) -> tuple[str, bool]:
    """Give the state of a finding and whether it says what to do."""
    return finding.state, bool(finding.cure)


def test_driver_is_asked_for_its_cuda(libcuda: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A driver is told by its version and the CUDA that its library names: 12080 is 12.8."""
    libcuda(12080)
    monkeypatch.setattr(machine, "DRIVER_FILE", tmp_path / "version")
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.10  Thu\n")

    found = machine.driver()

    assert seen(found) == ("ok", False)
    assert found.facts == {"version": "570.86.10", "cuda": "12.8"}


def test_missing_driver_is_no_fault(libcuda: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without kernel module and library there is no driver: lacking, with what to install."""
    libcuda(None)
    monkeypatch.setattr(machine, "DRIVER_FILE", tmp_path / "none")

    found = machine.driver()

    assert seen(found) == ("lacking", True)


def test_driver_without_library_is_a_container_without_gpus(libcuda: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A kernel module without its library is a fault, and the cure names the container's flag."""
    libcuda(None)
    monkeypatch.setattr(machine, "DRIVER_FILE", tmp_path / "version")
    (tmp_path / "version").write_text("Kernel Module  570.86.10\n")

    found = machine.driver()

    assert found.state == "fault"
    assert "--gpus all" in found.cure


@pytest.mark.parametrize(
    ("built", "supports", "state", "cure"),
    [
        (None, None, "ok", ""),
        (None, 12080, "fault", "build of torch for CUDA"),
        ("13.0", 12080, "fault", "CUDA 12.8: update it"),
        ("12.4", 12080, "fault", "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_torch_and_driver_must_go_together(
    libcuda: Callable, monkeypatch: pytest.MonkeyPatch, built: str | None, supports: int | None, state: str, cure: str
) -> None:
    """Where torch finds no GPU the cure follows from what it was built for and what the driver can."""
    libcuda(supports)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    found = machine.torch_build()

    assert found.state == state
    assert cure in found.cure


def test_torch_that_finds_a_gpu_is_right(libcuda: Callable, gpu: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch finds a GPU its build is right, whatever the versions are."""
    libcuda(12020)
    gpu()
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    found = machine.torch_build()

    assert seen(found) == ("ok", False)


@pytest.mark.parametrize(("capability", "state"), [((9, 0), "ok"), ((7, 0), "fault")])
def test_gpus_are_named(gpu: Callable, capability: tuple[int, int], state: str) -> None:
    """A GPU is told with its name, memory and generation; one older than the tested ones is marked."""
    gpu(capability)

    (found,) = machine.gpus()

    assert found.state == state
    assert (found.facts["name"], found.facts["free_bytes"], found.facts["capability"]) == ("Fake 80", 70 * 10**9, list(capability))


def test_no_gpu_is_no_fault(libcuda: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU and a driver one line says that batches are made on the CPU."""
    libcuda(None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    (found,) = machine.gpus()

    assert found.state == "lacking"
    assert "on the CPU" in found.cure


def test_cupy_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """CuPy is told by its version; where it cannot be imported the extra is named."""
    fake = ModuleType("cupy")
    fake.__version__ = "14.0.1"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", fake)
    present = machine.cupy()
    monkeypatch.setitem(sys.modules, "cupy", None)

    absent = machine.cupy()

    assert (present.state, present.words) == ("ok", "14.0.1")
    assert absent.state == "lacking"
    assert absent.cure.startswith('pip install ".[cuda1')


@pytest.mark.parametrize(
    ("path", "reaches", "module", "states"),
    [
        ("preadv: kvikio is not there", False, False, ("lacking", "lacking")),
        ("kvikio 26.10: compatibility mode, through host memory", True, False, ("ok", "lacking")),
        ("kvikio 26.10: compatibility mode, through host memory", True, True, ("ok", "lacking")),
        ("kvikio 26.10: GPUDirect Storage, where the file system has it", True, True, ("ok", "ok")),
    ],
)
def test_path_of_reading_and_gpudirect(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str, reaches: bool, module: bool, states: tuple[str, str]
) -> None:
    """How files are read is what the reader says; GPUDirect is in use where the reader says so, and else there is a cure."""
    monkeypatch.setattr(reader, "path_in_use", lambda: path)
    monkeypatch.setattr(reader, "reaches_device", lambda: reaches)
    monkeypatch.setattr(machine, "GPUDIRECT_FILE", tmp_path / "version")
    if module:
        (tmp_path / "version").touch()

    reading, direct = machine.kvikio(), machine.gpudirect()

    assert (reading.state, direct.state) == states
    assert reading.words == path
    assert bool(direct.cure) == (direct.state != "ok")
    assert direct.facts["module"] is module


def test_memory_counts_limits_of_containers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory told is what is available, limits of cgroups counted."""
    monkeypatch.setattr(arena, "available_bytes", lambda: 3 * 10**9)

    found = machine.memory()

    assert found.facts["available_bytes"] == 3 * 10**9
    assert found.words.startswith("3 GB available of ")


def test_limit_of_locked_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits are those of the process; unlimited is null in JSON."""
    monkeypatch.setattr(resource, "getrlimit", lambda which: (8 << 20, resource.RLIM_INFINITY))

    found = machine.locked()

    assert found.facts == {"soft_bytes": 8 << 20, "hard_bytes": None}


@pytest.mark.parametrize(("limit", "state"), [("150000 100000", "lacking"), ("max 100000", "ok"), (None, "ok")])
def test_quota_of_a_cgroup_limits_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str | None, state: str) -> None:
    """A quota below the cores of the process is told, with the way out."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    if limit is not None:
        folder = tmp_path / machine._own_cgroup()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cpu.max").write_text(f"{limit}\n")

    found = machine.cores()

    assert seen(found) == (state, state != "ok")
    assert found.facts["quota"] == (1.5 if state != "ok" else None)


def test_missing_package_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that everything needs is named with the command that installs it."""
    monkeypatch.setattr(machine, "_version", lambda name: None if name == "numba" else "1.0")

    found = machine.system()

    assert (found.state, found.cure) == ("fault", "pip install numba")


def test_disk_is_measured_and_nothing_is_left(tmp_path: Path) -> None:
    """The disk of a directory is written and read, whole extents of it, and no file stays."""
    speed = disk.measure(tmp_path, 2 * disk.EXTENT_BYTES, seconds=60)

    assert speed.size_bytes == 2 * disk.EXTENT_BYTES
    assert min(speed.read_bytes_per_second, speed.write_bytes_per_second) > 0
    assert list(tmp_path.iterdir()) == []


def test_disk_without_direct_reads_is_measured_all_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where O_DIRECT is refused the page cache is used, and that is said."""
    real = os.open

    def refuse(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(disk, "PROBE_BYTES", disk.EXTENT_BYTES)

    (found,) = machine.storage(tmp_path)

    assert found.facts["direct"] is False
    assert "O_DIRECT is refused" in found.words
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("rate", "state"), [(499e6, "lacking"), (501e6, "ok")])
def test_slow_disk_has_a_cure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rate: float, state: str) -> None:
    """A disk below 500 MB/s is marked, and packing is named."""
    monkeypatch.setattr(disk, "measure", lambda *_: disk.Speed(1e9, rate, 1 << 20, True))

    (found,) = machine.storage(tmp_path)

    assert found.state == state
    assert ("scdl-gpu pack" in found.cure) == (state != "ok")


def test_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    """Where nothing can be written the finding names the directory and the reason."""
    (found,) = machine.storage(tmp_path / "none")

    assert found.state == "lacking"
    assert f"{tmp_path / 'none'}: not measured (No such file or directory)" in found.words


def test_findings_are_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On this very machine every piece is found, whatever is there."""
    monkeypatch.setattr(disk, "PROBE_BYTES", disk.EXTENT_BYTES)

    names = [one.name for one in machine.findings(tmp_path)]

    assert names[:7] == ["system", "cores", "memory", "ulimit -l", "disk", "driver", "torch"]
    assert names[-3:] == ["CuPy", "reading", "GPUDirect"]
    assert set(machine.FOR_GPU) - {"GPU path"} <= set(names)
