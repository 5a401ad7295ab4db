"""Loaders in processes of their own: ours, and those of others in environments that are made on request.

Knows interpreters, pipes and pip, not what is measured. The scripts of peers lie in `benchmarks/peers/` of a checkout; each says at its
head what it needs and can: REQUIRES, MODULE, PYTHON, VARIANTS, READS_ARCHIVES, ONLY_X, SAMPLINGS.
"""

import contextlib
import importlib.util
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from scdl_gpu.bench import PeakMemory, private_bytes, pss_bytes, tree
from scdl_gpu.errors import ScdlError

SERVE, OURS = Path(__file__).with_name("serve.py"), Path(__file__).with_name("ours.py")
SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks" / "peers"
START_S, BUILD_S = 600.0, 3_600.0
"""An interpreter that imports for longer than START_S hangs; pip may try all versions of everything for ever."""
MEMORY_S = 0.2
"""Between two looks at the memory of a process: pages of files are counted, which holds it up."""
Facts = dict[str, Any]


class PeerError(ScdlError):
    """A peer's environment could not be made, or its process ended or failed."""


class LateError(PeerError):
    """A peer's process did not answer in time, and was killed."""


def names() -> list[str]:
    """List the peers that there are scripts for: none where the package is not a checkout's."""
    return sorted(path.stem for path in SCRIPTS.glob("*.py"))


def script_of(name: str) -> Path:
    """Return the script of a peer. Raises PeerError where there is none."""
    if name not in names():
        known = ", ".join(names()) or f"none: {SCRIPTS} is not there, peers are measured from a checkout"
        raise PeerError(f"no peer is called {name!r}; there are {known}")
    return SCRIPTS / f"{name}.py"


def head_of(script: Path) -> ModuleType:
    """Import a script for what it says at its head; what it works with it imports later."""
    spec = importlib.util.spec_from_file_location(f"peer_{script.stem}", script)
    if spec is None or spec.loader is None:
        raise PeerError(f"{script} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def python_of(name: str, home: Path) -> Path | None:
    """Return the interpreter that has a peer: its environment below `home`, else this one, None where neither does."""
    built = home / name / "bin" / "python"
    if (home / name / ".whole").exists():
        return built
    return Path(sys.executable) if _is_here(head_of(script_of(name)).MODULE) else None


def _is_here(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package that it would be in
        return False


def build(name: str, home: Path) -> Path:
    """Make the environment of a peer below `home` with pip, unless it is there; returns its interpreter.

    Raises PeerError where no interpreter is new enough, or pip fails.
    """
    place, head = home / name, head_of(script_of(name))
    if not (place / ".whole").exists():
        base = _interpreter(head.PYTHON)
        if base is None:
            wanted = ".".join(map(str, head.PYTHON))
            raise PeerError(f"{name} needs Python {wanted} or newer, and none is on PATH or below ~/.pyenv; install one, as python{wanted}")
        shutil.rmtree(place, ignore_errors=True)
        _run([str(base), "-m", "venv", str(place)], name)
        _run([str(place / "bin" / "python"), "-m", "pip", "install", "-q", *head.REQUIRES], name)
        (place / ".whole").touch()
    return place / "bin" / "python"


def _run(command: Sequence[str], name: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment(), timeout=BUILD_S)
    except subprocess.TimeoutExpired as error:
        raise PeerError(f"the environment of {name} could not be made: {' '.join(command)} took more than {BUILD_S:,.0f} s") from error
    if done.returncode != 0:
        raise PeerError(
            f"the environment of {name} could not be made: {' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}"
        )


def _interpreter(version: tuple[int, int]) -> Path | None:
    """Find an interpreter of at least this version: this one, one on PATH, one of pyenv's."""
    if sys.version_info[:2] >= version:
        return Path(sys.executable)
    found = [shutil.which(f"python3.{minor}") for minor in range(version[1], version[1] + 4)]
    found += [str(path) for path in sorted(Path.home().glob(".pyenv/versions/*/bin/python"))]
    for path in filter(None, found):
        asked = subprocess.run([path, "-c", "import sys; print(*sys.version_info[:2])"], capture_output=True, text=True, check=False)
        if asked.returncode == 0 and tuple(map(int, asked.stdout.split())) >= version:  # a shim of pyenv's may refuse
            return Path(path)
    return None


def _environment() -> dict[str, str]:
    """Give the environment for other interpreters: without what leads this one to its packages."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}


def kill(pid: int) -> None:
    """Kill a process and all below it: ranks that torchrun began have sessions of their own, and would live on."""
    for one in tree(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)


class Process:
    """A loader that answers. log: a file for what it says beside its answers.

    Raises PeerError where it fails, which names the log; it has ended then.
    """

    def __init__(self, python: Path, script: Path, log: Path, *, world_size: int = 1) -> None:
        is_here = python == Path(sys.executable)
        command = [str(python), str(SERVE), str(script)]
        if world_size > 1:
            ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
            command = [str(python), *ranks, str(SERVE), str(script)]
        environment = dict(os.environ) if is_here else _environment()
        if script == OURS:  # this very package, wherever it was imported from
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SERVE.parents[2]), environment.get("PYTHONPATH", "")]))
        self._log_path, self._log = log, log.open("a")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment
        )
        if self._process.stdin is None or self._process.stdout is None:
            raise PeerError("its process has no pipes")
        self._pipe, self._answers = self._process.stdin, self._process.stdout
        self.facts: Facts = self._answer(START_S)["facts"]

    def ask(self, do: str, *, patience_s: float | None = None, **asked: Any) -> Facts:
        """Ask for something, and wait for the answer, for ever or `patience_s` seconds; then the process is killed."""
        try:
            self._pipe.write(json.dumps({"do": do, **asked}) + "\n")
            self._pipe.flush()
        except BrokenPipeError as error:
            raise self._fault("its process has ended") from error
        return self._answer(patience_s)

    def ask_watched(self, do: str, **asked: Any) -> Facts:
        """Ask, and sample the memory of the process and its children meanwhile."""
        pid = self._process.pid
        with PeakMemory(partial(pss_bytes, pid), partial(private_bytes, pid), every_s=MEMORY_S) as memory:
            found = self.ask(do, **asked)
        pss, private = memory.peak_bytes
        return found | {"peak_pss_bytes": pss, "peak_private_bytes": private}

    def _answer(self, patience_s: float | None = None) -> Facts:
        if patience_s is not None and not select.select([self._answers], [], [], patience_s)[0]:
            kill(self._process.pid)
            self.close()
            raise LateError(f"no answer in {patience_s:,.0f} s; see {self._log_path}")
        line = self._answers.readline()
        if not line:
            raise self._fault(f"its process ended with {self._process.wait()}")
        found: Facts = json.loads(line)
        if "fault" in found:
            raise self._fault(found["fault"])
        return found

    def _fault(self, what: str) -> PeerError:
        self.close()
        return PeerError(f"{what}; see {self._log_path}")

    def close(self) -> None:
        """End it; harmless when repeated."""
        with contextlib.suppress(BrokenPipeError):
            self._pipe.close()
        killer = threading.Timer(20, kill, [self._process.pid])  # workers that hang
        killer.start()
        self._process.wait()
        killer.cancel()
        self._answers.close()
        self._log.close()
