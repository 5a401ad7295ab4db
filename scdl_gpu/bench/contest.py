"""Contenders side by side: their stores are made, then they take turns, beside the limits of the machine.

Knows the order of the work, not how a loader is opened (`serve`) nor how results look (`report`). A round measures the limits and
everybody once, so that a drift of the machine meets all alike; a contender that fails is told, and the others go on.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scdl_gpu.bench import limits, machine, pages
from scdl_gpu.bench.peer import PeerError, Process
from scdl_gpu.bench.quality import Table
from scdl_gpu.bench.source import Source

COLD, ENOUGH = 0.01, 1 << 30
"""Of a cold store's pages, at most so many may be in memory; bytes from which on a store shows what the disk can do."""
PATIENCE_S = 600.0
"""A loader that has not answered so long after its time was up is taken for one that hangs: the slowest peer needs minutes to open."""
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
    """How all are measured alike. max_s, warmup_s: seconds; epochs: at most, None: as many as max_s holds; check: batches looked at."""

    batch_sizes: Sequence[int] = (64, 1024)
    outputs: Sequence[str] = ("csr",)
    caches: Sequence[str] = ("warm", "cold")
    rounds: int = 3
    max_s: float = 3.0
    warmup_s: float = 1.0
    epochs: int | None = None
    check: int = 32
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
    """The processes, and what came of them: `limits`, `conversions`, `lines`, `failures`, `facts`. `contenders`: who has not failed."""

    def __init__(self, source: Source, contenders: Sequence[Contender], rules: Rules, *, logs: Path, say: Say) -> None:
        self.source, self.rules = source, rules
        self.limits: list[dict[str, float]] = []
        self.conversions: list[Facts] = []
        self.lines: dict[tuple[str, str, int, str], Line] = {}
        self.failures: dict[str, str] = {}
        self.facts: dict[str, Facts] = {}
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
            found = process.ask_watched("convert", **self._asked(contender))
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
        output, batch_size, cache = kind
        resident = self._prepared(contender, cache)
        is_cold, rules = cache == "cold", self.rules
        found = self._process(contender).ask_watched(
            "measure",
            patience_s=PATIENCE_S + 10 * (rules.max_s + rules.warmup_s),
            **self._asked(contender, batch_size=batch_size, output=output, is_cold=is_cold),
            max_s=rules.max_s,
            warmup_s=0.0 if is_cold else rules.warmup_s,
            epochs=1 if is_cold else rules.epochs,
            cold=is_cold,
            check=rules.check if table is not None else 0,
        )
        shown = found.pop("fingerprints")
        quality = table.judge(shown) if table is not None and shown else None
        if quality is not None and quality.strange:
            raise PeerError(f"{quality.strange} of {quality.rows} rows of its batches are no rows of the source: its figures are void")
        found |= {"resident": resident, "round": len(self.limits) - 1, **({} if quality is None else asdict(quality))}
        line = self.lines.setdefault((contender.label, *kind), Line(contender.label, *kind))
        line.rounds.append(found)
        rate = found["cells"] / found["seconds"]
        self._say(f"{place}: {contender.label}, {output}, batch size {batch_size}, {cache}: {rate:,.0f} cells/s")

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
        }


def _available() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
