"""Everything that only a GPU can prove, in one command of less than eight minutes: correctness, then speed.

    make gpu-check        or: python benchmarks/gpu_check.py [--out FOLDER] [--minutes 8] [--only STEP ...] [--rehearse]

Needs torch with CUDA, CuPy, Numba and SciPy, its loader steps pandas, pyarrow, xxhash and tqdm; no anndata, no files: data
is made on the spot. FOLDER ($OUT, or ./gpu-check) gets gpu-check.json, whole after every step, and what steps printed.
Steps run in a process of their own: one that dies (an illegal address ends a CUDA context for good) is recorded, and the
next process takes up the steps after it. What a machine refuses, such as a sanitizer, is recorded as not available.
--rehearse runs all of it, tiny, on the emulator of tests/emulator.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gpu_machine import ROOT, CaseMemory, CudaMachine, Machine, Rehearsal

Results = list[dict[str, Any]]
Steps = dict[str, Callable[[Any], Results]]
SMALL_CASES = (
    "rows of every length up to 59, shuffled",
    "unsorted columns",
    "empty rows at either end and between",
    "shards of four dtypes, one unsorted",
    "shards of four dtypes, one unsorted read in address order",
)
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
SANITIZER_SECONDS = 100
SANITIZED = ["small cases", "small packed cases", "small loader", "small rows of any bytes"]
NOT_SANITIZED = {"initcheck": SANITIZED[2:], "racecheck": SANITIZED[3:]}
"""Steps that a tool leaves out: kernels load whole words of 16 bytes, and what pads the rows of a loader is never written; the
nonzeros of a damaged row meet at one place of the batch, and any of them may win."""
NO_TESTS = 5
"""What pytest ends with where it collects none."""


# ---- correctness


def _check_case(case: Any, memory: CaseMemory, csr: tuple[tuple[str, str], ...], dense: tuple[tuple[str, float, bool], ...]) -> int:
    """Hold a case to SciPy in several ways; returns how many. Raises ValueError."""
    from emulator import cases

    for index, dtype in csr:
        _, indices, data = cases.expected_csr(case, dtype)
        found, values, fault = cases.csr_by_gpu(case, memory, index, dtype)
        is_right = np.array_equal(found, indices) and np.array_equal(values, data) and np.array_equal(fault, cases.no_faults())
        _require(f"{case.name}: csr {index} {dtype}", is_right)
    subsets = (None, np.arange(case.n_vars)[::-2])
    for dtype, target, log1p in dense:
        for genes in subsets:
            expected = cases.expected_dense(case, dtype, genes, target, log1p)
            found, fault = cases.dense_by_gpu(case, memory, dtype, genes, target, log1p)
            # One unit of the last place of float32 is at most 1.2e-7 of a number.
            tolerance = {"float32": 2.4e-7, "float64": 1e-12, "float16": 1e-3}.get(dtype, 0.0) if target > 0 or log1p else 0.0
            is_right = np.allclose(found.astype(np.float64), expected.astype(np.float64), rtol=tolerance, atol=0)
            _require(f"{case.name}: dense {dtype} {target} {log1p}", is_right and np.array_equal(fault, cases.no_faults()))
    return len(csr) + len(dense) * len(subsets)


def _require(what: str, is_right: bool) -> None:
    if not is_right:
        raise ValueError(f"{what}: not what SciPy makes")


def named_cases(bench: Any) -> Results:
    """Gather every named case of the tests, into CSR and dense, plain and normalised."""
    from emulator import cases

    memory, table = CaseMemory(bench.machine), cases.table()
    ways = (("float32", 0.0, False), ("float32", 1e4, True), ("float64", 0.5, False), ("uint8", 0.0, False))
    chosen = [table[name] for name in SMALL_CASES] if bench.machine.rehearsed else list(table.values())
    counts = [_check_case(case, memory, (("int32", "float32"), ("int64", "int32")), ways) for case in chosen]
    return [{"what": case.name, "checks": n} for case, n in zip(chosen, counts, strict=True)]


def every_dtype(bench: Any) -> Results:
    """Gather every stored dtype and width of columns into every dtype of a batch."""
    from emulator import cases

    from scdl_gpu.kernels import shards

    memory, found = CaseMemory(bench.machine), []
    case = cases.one_shard("rows of five lengths", 150, [0, 1, 33, 150, 70], [4, 0, 3, 2, 1, 3])
    dense = tuple((name, 0.0, False) for name in shards.DENSE_KINDS if name != "bfloat16")
    for stored in shards.STORED:
        for columns in ("uint8", "uint16", "uint32", "uint64"):
            csr = tuple((index, made) for index in ("int32", "int64") for made in shards.CSR_KINDS)
            n = _check_case(case.with_dtypes(columns, stored, top=120), memory, csr, dense)
            found.append({"what": f"{stored} with {columns} columns", "checks": n})
    return found


def edges(bench: Any) -> Results:
    """Convert numbers at the edges of every dtype: ties, subnormals (CuPy compiles with -ftz=true), infinities, what does not fit."""
    from emulator import numbers

    from scdl_gpu.kernels import shards

    memory, found = CaseMemory(bench.machine), []
    for stored in shards.STORED:
        for made in shards.DENSE_KINDS:
            values = numbers.edges(stored)
            expected = numbers.model(values, made)
            for row, is_reported in numbers.gathered(values, made, memory):
                wrong = [(value, a, b) for value, a, b in zip(values.tolist(), row, expected, strict=True) if a != b]
                _require(f"{stored} to {made}: {wrong[:5]}", not wrong and is_reported == (None in expected))
        found.append({"what": f"numbers at the edges of {stored}", "checks": len(shards.DENSE_KINDS) * numbers.edges(stored).size})
    return found


def faults(bench: Any) -> Results:
    """Gather damaged rows: each fault is reported at its position, and columns stay inside the range."""
    from emulator import cases

    memory = CaseMemory(bench.machine)
    for is_sorted, columns, values, place in (
        (True, [3, 100], [1, 1], 0),
        (False, [65_535, 3], [1, 1], 0),
        (False, [7, 7], [1, 1], 1),
        (True, [3, 9], [1, 0.5], 2),
    ):
        indices, data = np.array([1, 2, *columns, 5], np.uint16), np.array([1, 1, *values, 1], np.float32)
        stored = cases.Stored(np.array([0, 2, 4, 5]), indices, data, is_sorted)
        case = cases.Case("damaged", 100, (stored,), np.array([(0, 0), (0, 1), (0, 2)]))
        found, _, fault = cases.csr_by_gpu(case, memory, "int32", "int32")
        reported = [int(position) for position in fault]
        expected = [1 if k == place else int(clean) for k, clean in enumerate(cases.no_faults())]
        _require(f"faults of {columns} {values}: {reported}", reported == expected and bool(((found >= 0) & (found < 100)).all()))
    return [{"what": "out of range, sorted and not; twice; a fraction as an integer", "checks": 4}]


def small_cases(bench: Any) -> Results:
    """Gather at most 64 rows in every way: what sanitizers run, since they slow kernels down a hundredfold."""
    from emulator import cases

    table, memory = cases.table(), CaseMemory(bench.machine)
    ways = (("float32", 1e4, True), ("uint8", 0.0, False))
    counts = [_check_case(table[name], memory, (("int32", "float32"), ("int64", "int64")), ways) for name in SMALL_CASES]
    return [{"what": "small cases", "checks": sum(counts)}]


# ---- steps, in a process of their own


def all_steps() -> Steps:
    """Give every step by name, in order."""
    import kernels_gpu
    import loader_gpu
    import packed_gpu

    correctness: Steps = {"named cases": named_cases, "every dtype": every_dtype, "edges": edges, "faults": faults}
    return {**correctness, **kernels_gpu.STEPS, **packed_gpu.STEPS, **loader_gpu.STEPS}


def run_steps(names: list[str], out: Path, *, rehearse: bool) -> None:
    """Run steps one after the other, in this process; the record is whole after each."""
    import kernels_gpu
    import packed_gpu

    machine: Machine = Rehearsal() if rehearse else CudaMachine()
    record = Record(out)
    record.set("machine", machine.facts())
    bench, steps = kernels_gpu.Bench(machine), {**all_steps(), "small cases": small_cases, **packed_gpu.SMALL_STEPS}
    for name in names:
        print(f"== {name}", flush=True)
        start = time.perf_counter()
        results = steps[name](bench)
        machine.synchronize()
        record.step(name, status="done", seconds=round(time.perf_counter() - start, 1), results=results)
        for result in results:
            facts = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in result.items()}
            print(f"   {facts.pop('what')}: {', '.join(f'{key} {value}' for key, value in facts.items())}", flush=True)


class Record:
    """gpu-check.json: read, changed and replaced as a whole, by whichever process runs a step."""

    def __init__(self, out: Path) -> None:
        self._path = out / "gpu-check.json"

    def read(self) -> dict[str, Any]:
        """Give what is recorded so far."""
        return json.loads(self._path.read_text()) if self._path.exists() else {"steps": {}}

    def set(self, key: str, value: Any) -> None:
        """Record something of the whole run."""
        self._write(self.read() | {key: value})

    def step(self, name: str, **what: Any) -> None:
        """Record a step."""
        content = self.read()
        content["steps"][name] = what
        self._write(content)

    def _write(self, content: dict[str, Any]) -> None:
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1))
        partial.replace(self._path)


# ---- the process that starts the others, and never touches the GPU itself


class Check:
    """One run: what is left of its time, and where it is recorded."""

    def __init__(self, out: Path, minutes: float, *, rehearse: bool) -> None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "gpu-check.json").unlink(missing_ok=True)
        self.record, self._out = Record(out), out
        self._end = time.monotonic() + 60 * minutes
        self._flags = ["--rehearse"] if rehearse else []

    def command(self, steps: list[str], out: Path) -> list[str]:
        """Give the command line of a process that runs `steps`."""
        return [sys.executable, str(Path(__file__)), "--out", str(out), *self._flags, "--in-this-process", "--only", *steps]

    def run(self, names: list[str]) -> None:
        """Run steps in processes, a new one after each that dies."""
        left = list(names)
        while left:
            said = self._out / "gpu-check.log"
            seconds = self._seconds(left[0])
            if not seconds:
                left = left[1:]
                continue
            with said.open("a") as log:
                status, why = _call(self.command(left, self._out), seconds, log)
            done = self.record.read()["steps"]
            left = [name for name in left if name not in done]
            if left and status == 0:
                why = "the process ended without it"
            if left:
                self.record.step(left[0], status="failed", why=why or f"exit status {status}")
                print(f"== {left[0]}: failed\n{why}", flush=True)
                left = left[1:]

    def test(self) -> None:
        """Run the tests that are marked gpu, where pytest is installed."""
        seconds = self._seconds("gpu tests", a_GPU=not self._flags, pytest=importlib.util.find_spec("pytest") is not None)
        if seconds:
            start, command = time.monotonic(), [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *gpu_test_files()]
            with (self._out / "gpu-check.log").open("a") as log:
                status, said = _call(command, seconds, log, folder=ROOT)
            what = "done" if status == 0 else "not available" if status == NO_TESTS else "failed"
            self.record.step("gpu tests", status=what, seconds=round(time.monotonic() - start, 1), lines=said.splitlines())

    def _seconds(self, name: str, **needed: bool) -> float:
        """Give the time left, or record why a step is not run and give 0."""
        missing = [what for what, is_there in needed.items() if not is_there]
        seconds = self._end - time.monotonic()
        if missing:
            self.record.step(name, status="not available", why=f"{missing[0].replace('_', ' ')} is not there")
        elif seconds < 5:
            self.record.step(name, status="not run", why="out of time")
        else:
            return seconds
        return 0

    def sanitize(self, tool: str) -> None:
        """Run the small cases under compute-sanitizer; what it refuses is recorded, not raised."""
        name, program = f"compute-sanitizer {tool}", shutil.which("compute-sanitizer")
        seconds = min(SANITIZER_SECONDS, self._seconds(name, compute_sanitizer=program is not None))
        if program is None or not seconds:
            return
        own = self._out / f"sanitized-{tool}"
        own.mkdir(exist_ok=True)
        # torch's cache of freed blocks would hide an access just behind a tensor.
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        names = [step for step in SANITIZED if step not in NOT_SANITIZED.get(tool, ())]
        command = [program, "--tool", tool, "--error-exitcode", "9", *self.command(names, own)]
        start = time.monotonic()
        try:
            run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds, env=environment)
        except subprocess.TimeoutExpired:
            self.record.step(name, status="not available", why=f"not done after {seconds:.0f} s")
            return
        finally:
            steps = Record(own).read()["steps"]
            done = all((steps.get(name) or {}).get("status") == "done" for name in names)
            shutil.rmtree(own)
        lines = [line.strip() for line in (run.stdout + run.stderr).splitlines() if line.startswith("=========")]
        summary = next((line for line in lines if "SUMMARY" in line), lines[-1] if lines else f"exit status {run.returncode}")
        refused = any(word in line for line in lines for word in ("not supported", "Unable to", "Internal", "failed to"))
        status = "done" if done and run.returncode == 0 else "not available" if refused else "failed"
        self.record.step(name, status=status, seconds=round(time.monotonic() - start, 1), summary=summary, lines=lines[:40])
        print(f"== {name}: {status}, {summary}", flush=True)


def gpu_test_files() -> list[str]:
    """List the files with tests that are marked gpu; the others may need packages that are not there."""
    return [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]


def _call(command: list[str], seconds: float, log: Any, folder: Path | None = None) -> tuple[int, str]:
    """Run a command, its output to this one's and to `log`; returns the exit status and the last lines that it said."""
    last: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder) as process:
        alarm = threading.Timer(seconds, process.kill)
        alarm.start()
        for line in process.stdout or ():
            sys.stdout.write(line)
            log.write(line)
            last = [*last, line.rstrip()][-30:]
        alarm.cancel()
    return process.returncode, "\n".join(last)


def main(names: list[str] | None = None) -> None:
    """Parse the arguments; run, or start the processes that run, and print what came of each step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "gpu-check"))
    parser.add_argument("--minutes", type=float, default=8.0, help="after which steps are not begun any more")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="steps to run; all of them where it is not given")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the emulator; needs no GPU")
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    steps = arguments.only or names or list(all_steps())
    if arguments.in_this_process:
        run_steps(steps, arguments.out, rehearse=arguments.rehearse)
        return
    check = Check(arguments.out, arguments.minutes, rehearse=arguments.rehearse)
    check.record.set("commit", _commit())
    check.run(steps)
    if not (arguments.only or names):
        check.test()
        for tool in SANITIZERS:
            check.sanitize(tool)
    found = check.record.read()["steps"]
    print(*(f"{step['status']:>14}  {name}  {step.get('seconds', '')}" for name, step in found.items()), sep="\n")
    print(f"\n{arguments.out / 'gpu-check.json'}")
    sys.exit(any(step["status"] == "failed" for step in found.values()))


def _commit() -> str:
    run = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return run.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
