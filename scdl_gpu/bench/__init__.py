"""Measuring: alternatives side by side in one run, and what the machine was.

Knows clocks and memory, not what is measured. A figure is the median of rounds in which every alternative took
its turn, because shared machines drift by more than most differences; a claim is a ratio within one run.
"""

import json
import os
import platform
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("scdl-gpu", "numpy", "numba", "torch", "h5py", "anndata", "scipy", "bionemo-scdl")


@dataclass(frozen=True, slots=True)
class Result:
    """Seconds of each round of one alternative, and what it did in a round."""

    what: str
    seconds: tuple[float, ...]
    count: int
    size_bytes: int = 0

    @property
    def per_second(self) -> float:
        """Median count (cells, say) per second."""
        return self.count / statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """(slowest - fastest) / median of the rounds."""
        return (max(self.seconds) - min(self.seconds)) / statistics.median(self.seconds)

    @property
    def gb_per_second(self) -> float:
        """Median bytes per second, in 10^9."""
        return self.size_bytes / statistics.median(self.seconds) / 1e9


def interleaved(
    alternatives: Mapping[str, Callable[[], Any]],
    *,
    count: int,
    rounds: int = 5,
    size_bytes: int = 0,
    before: Callable[[], Any] = lambda: None,
) -> list[Result]:
    """Run each alternative once unmeasured, then `rounds` times in turn; `count` things are done in each run.

    before: done before each run, unmeasured.
    """
    for run in alternatives.values():
        run()
    seconds: dict[str, list[float]] = {what: [] for what in alternatives}
    for _ in range(rounds):
        for what, run in alternatives.items():
            before()
            start = time.perf_counter()
            run()
            seconds[what].append(time.perf_counter() - start)
    return [Result(what, tuple(times), count, size_bytes) for what, times in seconds.items()]


def json_line(result: Result, unit: str = "cells", **facts: Any) -> str:
    """Write a result as one line of JSON, with the machine and whatever `facts` the caller adds."""
    figures = {
        "what": result.what,
        f"{unit}_per_second": round(result.per_second, 1),
        "gb_per_second": round(result.gb_per_second, 3),
        "seconds": [round(second, 4) for second in result.seconds],
        "spread": round(result.spread, 3),
    }
    return json.dumps({**figures, **facts, **machine()})


def table(results: Sequence[Result], unit: str = "cells") -> str:
    """Write results as a table for people; ratios are to the last one."""
    base = results[-1].per_second
    width = max(len(result.what) for result in results)
    lines = [f"{'':{width}}  {unit + '/s':>14}  {'GB/s':>6}  {'ratio':>6}  {'spread':>6}"]
    for result in results:
        lines.append(
            f"{result.what:{width}}  {result.per_second:14,.0f}  {result.gb_per_second:6.2f}  "
            f"{result.per_second / base:6.2f}  {100 * result.spread:5.0f}%"
        )
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """Describe the machine, the commit and the versions that a figure belongs to."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "device": "cpu",
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    here = Path(__file__).resolve().parent
    done = subprocess.run(["git", "-C", str(here), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


class PeakMemory:
    """Largest memory while the context lasts, by each of some measures: bytes that a function gives, sampled in a thread.

    measures: without any, `private_bytes` of this process and its children. every_s: seconds between samples.
    `peak_bytes` has one figure a measure, `growth_bytes` what the first grew by since entry.
    """

    def __init__(self, *measures: Callable[[], int], every_s: float = 0.01) -> None:
        self._measures, self._every_s = measures or (private_bytes,), every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._before = self.peak_bytes = [measure() for measure in self._measures]
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def growth_bytes(self) -> int:
        """What the first measure grew by since entry."""
        return self.peak_bytes[0] - self._before[0]

    def _watch(self) -> None:
        while not self._stop.wait(self._every_s):
            self.peak_bytes = [max(peak, measure()) for peak, measure in zip(self.peak_bytes, self._measures, strict=True)]


def private_bytes(pid: int | None = None) -> int:
    """Sum RssAnon of a process, this one by default, and all below it; a process that ends meanwhile counts nothing."""
    return sum(_field(Path(f"/proc/{one}/status"), "RssAnon") for one in tree(os.getpid() if pid is None else pid))


def pss_bytes(pid: int) -> int:
    """Sum Pss of a process and all below it: what it has mapped and is in memory, files too, shared pages by their share.

    The kernel walks all page tables for it, and holds up who maps memory meanwhile: not to be asked every 10 ms.
    """
    return sum(_field(Path(f"/proc/{one}/smaps_rollup"), "Pss") for one in tree(pid))


def tree(pid: int) -> list[int]:
    """List a process and all below it."""
    found, todo = [], [pid]
    while todo:
        one = todo.pop()
        try:
            todo += [int(child) for task in Path(f"/proc/{one}/task").iterdir() for child in (task / "children").read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue
        found.append(one)
    return found


def _field(path: Path, name: str) -> int:
    """Read the bytes that a file of /proc gives in kB; 0 where the process has ended."""
    try:
        lines = path.read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)


def resident_bytes(pid: int | None = None) -> int:
    """Sum what a process, this one unless another is named, has in memory that is no page of a file; 0 where it has ended."""
    return sum(_field(Path(f"/proc/{pid or 'self'}/status"), name) for name in ("RssAnon", "RssShmem"))
