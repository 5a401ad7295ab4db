"""Operations run to their death, one call further each time.

Runs as a program under `killer.cpp`'s library: takes the operations of `operations/`, warms each once, then
forks one child per experiment and judges what the child left behind. Knows directories and processes, not
archives: what is old, new or torn, each `Operation` says itself. Forking costs 10 to 20 ms, a fresh
interpreter with torch several seconds.
"""

import ctypes
import gc
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import tqdm
from calls import appears, spread, undurable
from operation import Operation, TornError

COUNT, KILL, STOP, FAIL_ONCE, FULL, SHORT = range(6)
CHILD_SECONDS = 60


@dataclass
class Report:
    """What a series of experiments showed."""

    log: list[str] = field(default_factory=list)
    tried: list[str] = field(default_factory=list)
    states: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


class Killer:
    """The preloaded library."""

    def __init__(self) -> None:
        library = ctypes.CDLL(None)
        self._arm, self.disarm, self.count = library.killer_arm, library.killer_disarm, library.killer_count
        self._arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int]
        self._refuse, self._log = library.killer_refuse, library.killer_log
        self._refuse.argtypes = [ctypes.c_char_p, ctypes.c_int]
        self._log.argtypes, self._log.restype = [ctypes.c_long], ctypes.c_char_p
        self.count.restype = ctypes.c_long

    def arm(self, directory: Path, target: int, mode: int, error: int) -> None:
        """Count from here on; act by `mode` at call number `target`."""
        if self._arm(os.fsencode(directory), target, mode, error) != 0:
            raise OSError(f"cannot watch {directory}")

    def refuse(self, op: str, error: int) -> None:
        """Let every call of one kind fail, uncounted; none for an empty name."""
        self._refuse(op.encode(), error)

    def log(self) -> list[str]:
        """Return the counted calls."""
        return [self._log(i).decode(errors="replace") for i in range(self.count())]


def living_threads() -> list[str]:
    """Name this process's other threads; jemalloc's own (pyarrow's allocator) survives forks by its own means."""
    tasks = [task for task in Path("/proc/self/task").iterdir() if task.name != str(os.getpid())]
    return [name for task in tasks if (name := (task / "comm").read_text().strip()) != "jemalloc_bg_thd"]


def leftovers(directory: Path) -> list[str]:
    """Hidden names below `directory`: stagings and locks."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.name.startswith("."))


Experiment = Callable[[Path, Any, int, list[str], Report], None]


class Laboratory:
    """Runs experiments on operations, each in a scratch directory of its own."""

    def __init__(self, operations: dict[str, Operation], scratch: Path) -> None:
        self.killer = Killer()
        self.operations = operations
        self.scratch = scratch
        self.warm: set[str] = set()

    def template(self, name: str) -> Path:
        """Make what the operation begins with, once, and run the operation once on a copy of it."""
        template = self.scratch / name / "template"
        if name not in self.warm:
            template.mkdir(parents=True)
            self.operations[name].setup(template)
            directory = self.copy(name)
            self.operations[name].act(directory)
            state = self.operations[name].state(directory)
            if state != "new":
                raise TornError(f"{name}: undisturbed, the operation left the {state} state")
            shutil.rmtree(directory)
            self.warm.add(name)
        return template

    def copy(self, name: str) -> Path:
        """Return a fresh copy of what the operation begins with."""
        directory = Path(tempfile.mkdtemp(prefix="run-", dir=self.scratch / name)) / "d"
        shutil.copytree(self.scratch / name / "template", directory, symlinks=True)
        return directory

    def fork(self, name: str, directory: Path, target: int, mode: int, error: int = 0) -> tuple[int, Path]:
        """Start the operation in a child; returns its process id and the file that will hold its error."""
        if threads := living_threads():
            raise RuntimeError(f"{name}: the operation left threads behind: {threads}; a fork would lose them")
        story = directory.parent / "error.json"
        sys.stderr.flush()
        gc.freeze()  # a collection in the child would copy every page it looks at
        pid = os.fork()
        if pid == 0:
            self._child(name, directory, target, mode, error, story)
        return pid, story

    def _child(self, name: str, directory: Path, target: int, mode: int, error: int, story: Path) -> None:
        code = 1
        try:
            os.setpgid(0, 0)
            signal.alarm(CHILD_SECONDS)
            operation = self.operations[name]
            self.killer.arm(directory, target, mode, error)
            try:
                kept = operation.act(directory)
                del kept
            finally:
                self.killer.disarm()
            code = 0
        except BaseException as fault:  # noqa: BLE001 - told to the parent
            kinds = [kind.__name__ for kind in type(fault).__mro__]
            story.write_text(json.dumps({"kinds": kinds, "message": str(fault), "trace": traceback.format_exc()}))
        finally:
            os._exit(code)

    def wait(self, pid: int, story: Path) -> tuple[int, dict[str, Any]]:
        """Wait for a child; returns its exit code (negative: the signal) and its error."""
        _, status = os.waitpid(pid, 0)
        self.killer.disarm()
        error = json.loads(story.read_text()) if story.exists() else {}
        return os.waitstatus_to_exitcode(status), error

    def dry(self, name: str) -> list[str]:
        """Return the calls of one undisturbed run."""
        self.template(name)
        directory = self.copy(name)
        code, error = self.wait(*self.fork(name, directory, 0, COUNT))
        log = self.killer.log()
        if code != 0:
            raise RuntimeError(f"{name}: undisturbed, the operation ended with {code}:\n{error.get('trace', '')}")
        shutil.rmtree(directory.parent)
        return log

    def each(self, name: str, points: Iterable[int], experiment: Experiment, report: Report) -> None:
        """Run an experiment at each call number and gather what it finds."""
        operation = self.operations[name]
        for n in points:
            label = f"{name}, call {n} of {len(report.log)} ({report.log[n - 1] if n else 'any'})".replace("\t", " ")
            directory = self.copy(name)
            reader = operation.open(directory)
            found: list[str] = []
            try:
                experiment(directory, reader, n, found, report)
            except Exception as fault:  # noqa: BLE001 - whatever goes wrong is the finding
                found.append("".join(traceback.format_exception(fault)))
            report.tried.append(label)
            report.faults += [f"{label}: {fault}" for fault in found]
            del reader
            shutil.rmtree(directory.parent, ignore_errors=True)

    def kill(self, name: str, points: int) -> Report:
        """Kill the operation before chosen calls; see what readers and the next writer find."""
        operation = self.operations[name]
        report = Report(self.dry(name))
        report.faults += [f"{name}: {fault}" for fault in undurable(report.log)]

        def experiment(directory: Path, reader: Any, n: int, found: list[str], report: Report) -> None:
            pid, story = self.fork(name, directory, n, KILL)
            code, error = self.wait(pid, story)
            if code not in (-signal.SIGKILL, 0):
                found.append(f"ended with {code}, not by its death:\n{error.get('trace', '')}")
            self.judge(operation, directory, reader, report)

        self.each(name, spread(report.log, points), experiment, report)
        return report

    def kill_where_refused(self, name: str, points: int, op: str, error: int) -> Report:
        """`kill` on a file system that refuses one kind of call."""
        self.killer.refuse(op, error)
        try:
            return self.kill(name, points)
        finally:
            self.killer.refuse("", 0)

    def refuse(self, name: str, op: str, error: int) -> Report:
        """Run the operation where one kind of call is always refused."""
        report = Report(self.dry(name))

        def experiment(directory: Path, reader: Any, n: int, found: list[str], report: Report) -> None:
            self.killer.refuse(op, error)
            code, fault = self.wait(*self.fork(name, directory, n, COUNT))
            self.killer.refuse("", 0)
            report.errors.append(json.dumps({"code": code, "directory": str(directory), **fault}))
            if left := leftovers(directory):
                found.append(f"left over after the refusal: {left}")
            self.judge(self.operations[name], directory, reader, report)

        self.each(name, [0], experiment, report)
        return report

    def judge(self, operation: Operation, directory: Path, reader: Any, report: Report) -> None:
        """Look at what is left as a reader, as an earlier reader, and as the next writer."""
        state = operation.state(directory)
        report.states.append(state)
        operation.check_reader(reader)
        operation.again(directory, state)
        operation.check_reader(reader)
        if left := leftovers(directory):
            raise TornError(f"left over after the next run: {left}")

    def fail(self, name: str, points: int, mode: int, error: int, ops: list[str]) -> Report:
        """Let chosen calls fail with an error; see that the operation undoes itself, and succeeds when run again."""
        operation = self.operations[name]
        report = Report(self.dry(name))
        eligible = [i + 1 for i, entry in enumerate(report.log) if entry.split("\t")[0] in ops]
        chosen = [eligible[i - 1] for i in spread([report.log[i - 1] for i in eligible], points)]

        def experiment(directory: Path, reader: Any, n: int, found: list[str], report: Report) -> None:
            code, fault = self.wait(*self.fork(name, directory, n, mode, error))
            report.errors.append(json.dumps({"code": code, "at": report.log[n - 1], "directory": str(directory), **fault}))
            if left := leftovers(directory):
                found.append(f"left over after the failure: {left}")
            state = operation.state(directory)
            renamed = any(map(appears, report.log[: n - 1]))
            if state != ("new" if code == 0 else "old") and not (state == "new" and renamed):
                found.append(f"ended with {code}, but the {state} state is there:\n{fault.get('trace', '')}")
            self.judge(operation, directory, reader, report)

        self.each(name, chosen, experiment, report)
        return report

    def shorten(self, name: str) -> Report:
        """Let every write take only half of what it is given; see that the operation goes on with the rest."""
        operation = self.operations[name]
        report = Report(self.dry(name))

        def experiment(directory: Path, reader: Any, n: int, found: list[str], report: Report) -> None:
            code, error = self.wait(*self.fork(name, directory, n, SHORT))
            if code != 0:
                found.append(f"ended with {code}:\n{error.get('trace', '')}")
            if operation.state(directory) != "new":
                found.append("left the old state")
            self.judge(operation, directory, reader, report)

        self.each(name, [0], experiment, report)
        return report

    def contend(self, name: str, points: int) -> Report:
        """Stop the operation between the making and the renaming of its staging; see that another writer is turned away."""
        operation = self.operations[name]
        report = Report(self.dry(name))
        first = next(i for i, entry in enumerate(report.log) if entry.startswith("mkdir") and ".staging-" in entry)
        last = next(i for i, entry in enumerate(report.log) if appears(entry))
        chosen = [first + i for i in spread(report.log[first : last + 1], points)]

        def experiment(directory: Path, reader: Any, n: int, found: list[str], report: Report) -> None:
            pid, story = self.fork(name, directory, n, STOP)
            _, status = os.waitpid(pid, os.WUNTRACED)
            if not os.WIFSTOPPED(status):
                raise TornError(f"ended with status {status} where it was to be stopped")
            try:
                operation.act(directory)
            except Exception as fault:  # noqa: BLE001 - the test judges it
                report.errors.append(json.dumps({"kinds": [kind.__name__ for kind in type(fault).__mro__], "message": str(fault)}))
            else:
                found.append("a second writer was let in")
            if operation.state(directory) != "old":
                found.append("a second writer changed something")
            os.kill(pid, signal.SIGCONT)
            code, error = self.wait(pid, story)
            if code != 0:
                found.append(f"ended with {code} after the other writer came by:\n{error.get('trace', '')}")
            elif operation.state(directory) != "new":
                found.append("lost its work to the other writer")
            operation.check_reader(reader)
            if left := leftovers(directory):
                found.append(f"left over: {left}")

        self.each(name, chosen, experiment, report)
        return report


def load() -> dict[str, Operation]:
    """Gather the operations of the modules in `operations/`."""
    operations: dict[str, Operation] = {}
    for file in sorted(Path(__file__).with_name("operations").glob("*.py")):
        operations |= importlib.import_module(f"operations.{file.stem}").OPERATIONS
    return operations


def serve() -> None:
    """Answer requests, one line of JSON each, until the input ends."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        answer_all(answers)


def answer_all(answers: TextIO) -> None:
    """Load the operations, then run what is asked."""
    tqdm.tqdm.monitor_interval = 0  # no thread that outlives a progress bar: it would be lost in a fork
    tqdm.tqdm.monitor_interval = 0  # no thread that outlives a progress bar: it would be lost in a fork
    laboratory = Laboratory(load(), Path(sys.argv[1]))
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)  # jemalloc's thread
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = asdict(getattr(laboratory, request.pop("experiment"))(**request))
        except Exception:  # noqa: BLE001 - the test that asked raises it
            answer = {"trouble": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
