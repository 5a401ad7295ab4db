"""`scdl-gpu doctor`: rows go through each path, faults of one are found, and the exit code says whether the CPU's works."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from emulator.device import EmulatedDevice

from scdl_gpu.cli import disk, machine, trial
from scdl_gpu.cli.machine import Finding


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the disk be measured by one extent."""
    monkeypatch.setattr(disk, "PROBE_BYTES", disk.EXTENT_BYTES)


def refuse(error: Exception) -> Callable[..., None]:
    """Make a function that raises."""

    def function(*_: Any, **__: Any) -> None:
        raise error

    return function


def test_cpu_path_is_tried() -> None:
    """Rows are converted, packed and iterated, and compiled kernels are kept in a directory that is there."""
    found = trial.try_cpu()

    assert (found.state, found.facts["works"]) == ("ok", True)
    assert Path(found.facts["numba_cache"]).is_dir()


def test_wrong_batches_are_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that is not the rows it should be is found."""
    compare = trial._compare
    monkeypatch.setattr(trial, "_compare", lambda batch, counts: compare(batch, counts + 1))

    found = trial.try_cpu()

    assert (found.state, found.facts) == ("fault", {"works": False})
    assert "a batch differs from its rows" in found.words


def test_kernels_that_cannot_be_cached_name_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numba's refusal to cache, and a cache that is nowhere or cannot be written to, name NUMBA_CACHE_DIR."""
    monkeypatch.setattr(trial, "_iterate", lambda *_: None)
    monkeypatch.setattr(trial, "cache_directory", lambda: None)
    unkept = trial.try_cpu()
    monkeypatch.setattr(trial, "_iterate", refuse(RuntimeError("cannot cache function 'gather_csr': no locator available")))

    refused = trial.try_cpu()

    assert (unkept.state, unkept.facts["works"]) == ("lacking", True)
    assert (refused.state, refused.facts["works"]) == ("fault", False)
    assert "NUMBA_CACHE_DIR" in unkept.cure
    assert "NUMBA_CACHE_DIR" in refused.cure


def test_gpu_path_is_tried_in_each_placement() -> None:
    """On an emulated device rows go through all three placements."""
    found = trial.try_device(EmulatedDevice())

    assert found.state == "ok"
    assert found.facts["placements"] == {"device": True, "pinned": True, "host": True}


def test_placement_that_fails_is_named() -> None:
    """Where memory cannot be page-locked that placement is a fault, and the others are tried all the same."""
    device = EmulatedDevice()
    device.fail_pin = True

    found = trial.try_device(device)

    assert found.state == "fault"
    assert found.facts["placements"] == {"device": True, "pinned": False, "host": True}
    assert "emulated cannot page-lock more" in found.words


def test_document_has_all_findings(run: Callable, tmp_path: Path) -> None:
    """The JSON says what works, has every finding with its facts, and the exit code is 0 where the CPU path works."""
    result = run("doctor", tmp_path, "--json")

    told = json.loads(result.stdout)

    assert result.exit_code == 0
    assert (told["cpu_works"], told["gpu_works"]) == (True, torch.cuda.is_available())
    by_name = {one["name"]: one for one in told["findings"]}
    assert by_name["disk"]["directory"] == str(tmp_path)
    assert by_name["cores"]["usable"] == len(os.sched_getaffinity(0))
    assert {"system", "memory", "driver", "torch", "CuPy", "reading", "GPUDirect", "CPU path", "GPU path"} <= set(by_name)


def test_broken_cpu_path_ends_with_one(run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the CPU path does not work the exit code is 1, and the cure comes before those of what is merely lacking."""
    monkeypatch.setattr(trial, "_iterate", refuse(RuntimeError("LLVM is broken")))

    result = run("doctor", tmp_path)

    advice = result.stdout.split("To install or change:\n")[1]
    assert result.exit_code == 1
    assert "does not work: LLVM is broken" in result.stdout
    assert advice.startswith("!!  CPU path")


def test_pieces_for_a_gpu_come_last_without_one(run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a driver, what only a GPU needs stands under a title of its own; with one, it does not."""
    absent, present = Finding("driver", "lacking", "none", "install it"), Finding("driver", "ok", "570")
    cupy = Finding("CuPy", "lacking", "not there", "pip install it")
    monkeypatch.setattr(trial, "_iterate", lambda *_: None)
    texts = []
    for driver in (absent, present):
        monkeypatch.setattr(machine, "findings", lambda directory, driver=driver: [driver, cupy])
        texts.append(run("doctor", tmp_path).stdout)

    assert [("With a GPU, also:" in text) for text in texts] == [True, False]
    assert all(text.endswith("--  CuPy       pip install it\n") for text in texts)
