"""The warmed process that crash tests ask for experiments, and the library that kills its children."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

HERE = Path(__file__).parent
ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")

# Memory in huge pages where the system has them: a fork then takes 5 ms, not 20.
HUGE_PAGES = {"PYTHONMALLOC": "malloc", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


class Laboratory:
    """Client of one `harness.py` process."""

    def __init__(self, library: Path, scratch: Path) -> None:
        path = os.pathsep.join([str(HERE.parent.parent), *sys.path])
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "harness.py"), str(scratch)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | ONE_THREAD | HUGE_PAGES | {"LD_PRELOAD": str(library), "PYTHONPATH": path},
        )

    def ask(self, experiment: str, operation: str, **arguments: Any) -> SimpleNamespace:
        """Run one experiment; returns its report, with `errors` as objects and `text` of the first faults. Fails where it cannot be run."""
        if self._process.poll() is not None:
            pytest.fail(f"the warmed process ended with {self._process.returncode} before this test")
        request = {"experiment": experiment, "name": operation, **arguments}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            pytest.fail(f"the warmed process died with {self._process.wait()} at {request}")
        answer = json.loads(line)
        if "trouble" in answer:
            pytest.fail(f"{request}:\n{answer['trouble']}")
        report = SimpleNamespace(**answer)
        report.errors = [SimpleNamespace(**json.loads(error)) for error in report.errors]
        report.text = "\n\n".join(report.faults[:5])
        return report

    def end(self) -> None:
        """Let the process end by closing what it reads from."""
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(timeout=60)


@pytest.fixture(scope="session")
def killer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the library that is preloaded."""
    compiler = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler (g++, c++ or clang++) to build tests/crash/killer.cpp with")
    library = tmp_path_factory.mktemp("killer") / "killer.so"
    subprocess.run([compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-o", str(library), str(HERE / "killer.cpp"), "-ldl"], check=True)
    return library


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give a directory in memory, where thousands of small files do not wait for a journal, or else on disk."""
    memory = Path("/dev/shm")
    if not (os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 256 * 2**20):
        yield tmp_path_factory.mktemp("crash")
        return
    with tempfile.TemporaryDirectory(prefix="scdl_gpu-crash-", dir=memory) as directory:
        yield Path(directory)


@pytest.fixture(scope="session")
def laboratory(killer: Path, scratch: Path) -> Iterator[Laboratory]:
    """Start the warmed process."""
    laboratory = Laboratory(killer, scratch)
    yield laboratory
    laboratory.end()


@pytest.fixture(params=[pytest.param(7, id="few"), pytest.param(0, id="all", marks=pytest.mark.exhaustive)])
def points(request: pytest.FixtureRequest) -> int:
    """How many calls to try per operation: a few (every rename among them), or 0 for all."""
    return request.param
