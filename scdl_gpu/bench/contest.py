"""Contenders side by side: their stores are made, then they take turns, beside the limits of the machine.

Knows the order of the work, not how a loader is opened (`serve`) nor how results look (`report`). A round measures the limits and
everybody once, so that a drift of the machine meets all alike; a contender that fails is told, and the others go on. One that is slow
ends nothing either: a turn is cut short after a while, and who has used up the time of all its turns is left out of the rest.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scdl_gpu.bench import limits, machine, pages
from scdl_gpu.bench.peer import LateError, PeerError, Process
from scdl_gpu.bench.quality import Table
from scdl_gpu.bench.source import Source

COLD, ENOUGH = 0.01, 1 << 30
"""Of a cold store's pages, at most so many may be in memory; bytes from which on a store shows what the disk can do."""
PATIENCE_S = 60.0
"""A loader that has not answered so long after its turn was up hangs where nothing interrupts it, and is killed."""
CONVERSION_S, CONVERSION_S_PER_CELL = 1_800.0, 0.01
"""A conversion may take so long, and so much more for each cell: the slowest seen takes a tenth of it."""
Say = Callable[[str], None]
Facts = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Contender:
    """One line of the result. store: its own format, None where it reads the h5ad files; given: the store is the input itself."""

    label: str
    python: Path
    script: Path
    store: Path | None
    settings: Facts
    is_given: bool = False
    world_size: int = 1

    def files(self, source: Source) -> list[Path]:
        """List what it reads."""
        return [self.store] if self.store is not None else list(source.paths)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How all are measured alike. max_s, warmup_s: seconds; epochs: at most, None: as many as max_s holds; check: batches looked at.

    turn_s: of a turn, opening and all, at most; loader_s: of all turns of a loader.
    """

    batch_sizes: Sequence[int] = (64, 1024)
    outputs: Sequence[str] = ("csr",)
    caches: Sequence[str] = ("warm", "cold")
    rounds: int = 3
    max_s: float = 3.0
    warmup_s: float = 1.0
    epochs: int | None = None
    check: int = 32
    turn_s: float = 60.0
    loader_s: float = 600.0
    sampling: str = "shuffle"
    seed: int = 0
    device: str = "cpu"


@dataclass(slots=True)
class Line:
    """All rounds of a contender at one output, batch size and state of the cache."""

    label: str
    output: str
    batch_size: int
    cache: str
    rounds: list[Facts] = field(default_factory=list)


class Contest:
    """The processes, and what came of them: `limits`, `conversions`, `lines`, `failures`, `facts`, `cuts`, `spent_s`.

    contenders: who has not failed. cuts: for each one that was too slow its turns that were cut short, those without a figure, and those
        that it was left out of.
    """

    def __init__(self, source: Source, contenders: Sequence[Contender], rules: Rules, *, logs: Path, say: Say) -> None:
        self.source, self.rules = source, rules
        self.limits: list[dict[str, float]] = []
        self.conversions: list[Facts] = []
        self.lines: dict[tuple[str, str, int, str], Line] = {}
        self.failures: dict[str, str] = {}
        self.facts: dict[str, Facts] = {}
        self.cuts: dict[str, dict[str, int]] = {}
        self.spent_s = {contender.label: 0.0 for contender in contenders}
        self.contenders, self._logs, self._say = list(contenders), logs, say
        self._processes: dict[str, Process] = {}

    def run(self, table: Table | None) -> None:
        """Do it all. table: the rows of the source; None leaves batches unchecked."""
        try:
            self.convert()
            for number in range(self.rules.rounds):
                if self.contenders:  # or else all have failed
                    self._round(number, table)
        finally:
            self.close()

    def convert(self) -> None:
        """Make the stores that are missing; `contenders` are those for whom that went well."""
        for contender in list(self.contenders):
            self._guarded(contender, lambda contender=contender: self._convert(contender))  # type: ignore[misc]

    def turn(self, contender: Contender, kind: tuple[str, int, str], table: Table | None, place: str) -> None:
        """Let one of `contenders` run. kind: output, batch size, cache; its line has the figures, or `failures` what went wrong."""
        self._guarded(contender, lambda: self._measure(contender, kind, table, place))

    def rest(self, contender: Contender) -> None:
        """End the process of a contender, which lets go of all files for those who read them too; its next turn starts another."""
        if contender.label in self._processes:
            self._processes.pop(contender.label).close()

    def close(self) -> None:
        """End the processes."""
        for process in self._processes.values():
            process.close()

    def _guarded(self, contender: Contender, work: Callable[[], None]) -> None:
        try:
            work()
        except PeerError as error:
            self._say(f"{contender.label}: failed: {error}")
            self.failures[contender.label] = str(error)
            self.contenders.remove(contender)
            self.rest(contender)

    def _process(self, contender: Contender) -> Process:
        if contender.label not in self._processes:
            log_path = self._logs / f"{contender.label.replace(' ', '-').replace('/', '-')}.log"
            process = Process(contender.python, contender.script, log_path, world_size=contender.world_size)
            self._processes[contender.label], self.facts[contender.label] = process, process.facts
        return self._processes[contender.label]

    def _asked(self, contender: Contender, **settings: Any) -> Facts:
        store = None if contender.store is None else str(contender.store)
        rules = {
            "sampling": self.rules.sampling,
            "seed": self.rules.seed,
            "x": "auto" if self.source.is_archive else self.source.matrix.removesuffix("/X"),
        }
        return {"sources": [str(path) for path in self.source.paths], "store": store, "settings": rules | contender.settings | settings}

    def _convert(self, contender: Contender) -> None:
        process = self._process(contender)
        store = contender.store
        if store is None or contender.is_given:
            return
        found: Facts = {"seconds": None}
        if not store.exists():
            self._say(f"{contender.label}: converting")
            patience_s = CONVERSION_S + CONVERSION_S_PER_CELL * self.source.n_rows
            found = process.ask_watched("convert", patience_s=patience_s, **self._asked(contender))
        known = next((facts for facts in self.conversions if facts["store"] == store.name), None)
        if known is None:
            self.conversions.append({"store": store.name, "label": contender.label, "size_bytes": pages.size_of([store]), **found})

    def _round(self, number: int, table: Table | None) -> None:
        largest = max((contender.files(self.source) for contender in self.contenders), key=pages.size_of)
        if pages.size_of(largest) < ENOUGH:  # of small files the disk shows how fast it starts
            largest = [*largest, *self.source.paths]
        self.limits.append(limits.limits(largest, device=self.rules.device))
        self._say(f"limits: {', '.join(f'{name} {rate:.1f} GB/s' for name, rate in self.limits[-1].items())}")
        kinds = list(itertools.product(self.rules.caches, self.rules.outputs, self.rules.batch_sizes))
        total, done = len(kinds) * len(self.contenders), 0
        for cache, output, batch_size in kinds:
            for contender in list(self.contenders):
                done += 1
                place = f"round {number + 1} of {self.rules.rounds}, {done} of {total}"
                self.turn(contender, (output, batch_size, cache), table, place)

    def _measure(self, contender: Contender, kind: tuple[str, int, str], table: Table | None, place: str) -> None:
        """Measure, within the time that the contender has left."""
        label, start = contender.label, time.perf_counter()
        limit_s = min(self.rules.turn_s, self.rules.loader_s - self.spent_s[label])
        what = f"{place}: {label}, {', '.join(map(str, kind))}"
        if limit_s <= 0:
            self._cut(label, "left_out")
            self._say(f"{what}: left out, its {self.rules.loader_s:,.0f} s are used up")
            return
        try:
            resident = self._prepared(contender, kind[2])
            found = self._measured(contender, kind, limit_s, is_checked=table is not None)
        except LateError as error:
            self.rest(contender)
            found = {"cut_s": limit_s, "cells": 0}
            self._say(f"{what}: killed: {error}")
        finally:
            self.spent_s[label] += time.perf_counter() - start
        if found["cut_s"] is not None:
            self._cut(label, "cut_short" if found["cells"] else "without_a_batch")
            self.rest(contender)  # its process has ended
        if not found["cells"]:
            self._say(f"{what}: no batch in {found['cut_s']:.0f} s")
            return
        shown = found.pop("fingerprints")
        quality = table.judge(shown) if table is not None and shown else None
        if quality is not None and quality.strange:
            raise PeerError(f"{quality.strange} of {quality.rows} rows of its batches are no rows of the source: its figures are void")
        found |= {"resident": resident, "round": len(self.limits) - 1, **({} if quality is None else asdict(quality))}
        self.lines.setdefault((label, *kind), Line(label, *kind)).rounds.append(found)
        rate, cut = found["cells"] / found["seconds"], "" if found["cut_s"] is None else f", cut short after {found['cut_s']:.0f} s"
        self._say(f"{what}: {rate:,.0f} cells/s{cut}")

    def _cut(self, label: str, how: str) -> None:
        counts = self.cuts.setdefault(label, {"cut_short": 0, "without_a_batch": 0, "left_out": 0})
        counts[how] += 1

    def _measured(self, contender: Contender, kind: tuple[str, int, str], limit_s: float, *, is_checked: bool) -> Facts:
        (output, batch_size, cache), rules = kind, self.rules
        is_cold = cache == "cold"
        return self._process(contender).ask_watched(
            "measure",
            patience_s=limit_s + PATIENCE_S,
            limit_s=limit_s,
            **self._asked(contender, batch_size=batch_size, output=output, is_cold=is_cold),
            max_s=rules.max_s,
            warmup_s=0.0 if is_cold else rules.warmup_s,
            epochs=1 if is_cold else rules.epochs,
            cold=is_cold,
            check=rules.check if is_checked else 0,
        )

    def _prepared(self, contender: Contender, cache: str) -> float:
        """Bring the cache into the state that is asked for, as far as it goes; returns the share of pages that it holds then."""
        files = contender.files(self.source)
        if cache == "cold":
            resident = pages.drop(files)
            if resident > COLD:  # something is still mapped: only an end of the process undoes that
                self._say(f"{contender.label}: started anew, for {100 * resident:.0f} % of its pages stayed in the cache")
                self.rest(contender)
                self._process(contender)
                resident = pages.drop(files)
            return resident
        resident = pages.resident(files)
        if resident < 1 and pages.size_of(files) < _available() / 2:
            pages.warm(files)
            resident = pages.resident(files)
        return resident

    def record(self) -> Facts:
        """Give everything as it can be written into JSON."""
        source = self.source
        return {
            "machine": machine(),
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
            "source": {"cells": source.n_rows, "genes": source.n_vars, "nonzeros": source.nnz, "files": len(source.paths)},
            "rules": asdict(self.rules),
            "limits": self.limits,
            "conversions": self.conversions,
            "contenders": {contender.label: contender.settings for contender in self.contenders},
            "facts": self.facts,
            "sizes": {contender.label: pages.size_of(contender.files(source)) for contender in self.contenders},
            "lines": [asdict(line) for line in self.lines.values() if line.label not in self.failures],
            "failures": self.failures,
            "cuts": self.cuts,
            "spent_s": self.spent_s,
        }


def _available() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
