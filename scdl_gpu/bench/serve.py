"""The measured side of a benchmark: one loader in a process of its own, which answers lines of JSON with lines of JSON.

    PYTHON serve.py SUBJECT.py

Knows clocks, and how rows are told apart; whose loader it is the subject knows, a file with
    convert(sources, store, settings)     makes the store of its format out of h5ad files; absent where it reads these
    prepare()                             what is not to be timed with that, such as compiling; may be absent
    open(sources, store, settings)        makes an object that has: epoch(number), an iterable of batches; n_cells(batch);
                                          rows(batch), which gives (indptr, indices, data) of a CSR or a dense array; close()
    facts()                               versions; imports what it works with, so that no clock runs meanwhile
    device_bytes(), synchronize()         where it uses a GPU; both may be absent
Imports NumPy and nothing of ours: peers live in environments that have no scdl_gpu, and other versions of everything.
What is timed is what a training loop sees: from asking for a batch to having it, of an epoch after the other, without a look at
its content; content is looked at after the clock has stopped, in the batches that follow, or in an epoch more where none do.
"""

import base64
import gc
import importlib.util
import json
import os
import shutil
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

Asked = dict[str, Any]
SHOWN = 8_192
"""Rows of batches that are looked at, at least two batches: to find the nonzeros of a dense one takes longer than to make it."""
PATIENCE = 3.0
"""The consumer that must wait takes so many mean batch times for a step: a loader that works ahead meanwhile has the next batch."""


def fingerprints(indptr: Any, indices: Any, data: Any) -> Any:
    """Give each row of a CSR a 64-bit number that follows from its (gene, value) pairs, in whatever order; zeros do not count.

    The sum over the pairs of a finaliser of MurmurHash3's kind over gene and the bits of the value as float32: uint64, (rows,).
    """
    values = np.ascontiguousarray(data, dtype=np.float32)
    with np.errstate(over="ignore"):
        z = np.asarray(indices).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + values.view(np.uint32)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
        z[values == 0] = 0
        ends = np.concatenate([np.zeros(1, np.uint64), np.cumsum(z, dtype=np.uint64)])
        pointers = np.asarray(indptr).astype(np.int64)
        return ends[pointers[1:] - pointers[0]] - ends[pointers[:-1] - pointers[0]]


def of_dense(array: Any) -> Any:
    """Give the fingerprints of the rows of a dense array."""
    array = np.asarray(array)
    rows, genes = np.nonzero(array)
    indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=array.shape[0]))])
    return fingerprints(indptr, genes, array[rows, genes])


class Endless:
    """Batches, epoch after epoch, at most `n_epochs`. Raises ValueError where an epoch has none."""

    def __init__(self, loader: Any, n_epochs: int | None) -> None:
        self._loader, self._n_epochs = loader, n_epochs
        self._batches = self._all()

    def _all(self) -> Iterator[Any]:
        number = 0
        while self._n_epochs is None or number < self._n_epochs:
            is_empty = True
            for batch in self._loader.epoch(number):
                is_empty = False
                yield batch
            if is_empty:
                raise ValueError("an epoch without a batch: fewer cells than batch_size")
            number += 1

    def next(self) -> Any:
        """Give the next one, None at the end."""
        return next(self._batches, None)

    def close(self) -> None:
        """End the epoch that is under way."""
        self._batches.close()  # type: ignore[attr-defined]


def measured(subject: Any, asked: Asked) -> dict[str, Any]:
    """Open a loader, time its batches, let a slow consumer wait for some, and show the rows of those that follow."""
    synchronize = getattr(subject, "synchronize", lambda: None)
    before = _device_bytes(subject)
    start = time.perf_counter()
    loader = subject.open(asked["sources"], asked["store"], asked["settings"])
    opened = time.perf_counter() - start
    batches = Endless(loader, asked.get("epochs"))
    try:
        batch = batches.next()
        synchronize()
        found: dict[str, Any] = {"open_s": opened, "first_s": time.perf_counter() - start}
        first = loader.n_cells(batch)
        while batch is not None and time.perf_counter() - start - found["first_s"] < asked["warmup_s"]:
            batch = batches.next()
        synchronize()
        found |= _timed(loader, batches, asked["max_s"], synchronize)
        if asked["cold"]:  # the first batch and what was read ahead with it are the cold ones
            found |= {"cells": found["cells"] + first, "seconds": found["seconds"] + found["first_s"]}
        found["device_bytes"] = max(0, _device_bytes(subject) - before)
        found |= _waited(batches, found["seconds"] / found["cells"] * first, asked["max_s"])
        found["fingerprints"] = _shown(loader, batches, asked["check"]) or _shown(loader, Endless(loader, 1), asked["check"])
        if hasattr(loader, "words"):
            found["loader"] = loader.words()
    finally:
        batches.close()
        loader.close()
    return found


def _timed(loader: Any, batches: Endless, max_s: float, synchronize: Any) -> dict[str, Any]:
    times, cells = [], 0
    cpu, start = time.process_time(), time.perf_counter()
    last = start
    while last - start < max_s:
        batch = batches.next()
        if batch is None:
            break
        cells += loader.n_cells(batch)
        now = time.perf_counter()
        times.append(now - last)
        last = now
    synchronize()
    seconds = time.perf_counter() - start
    if not times:
        raise ValueError("no batch was left to be timed: the epochs ended in the warm-up; fewer seconds of it, or more epochs")
    p50, p99 = np.quantile(times, (0.5, 0.99))
    return {"cells": cells, "batches": len(times), "seconds": seconds, "cpu_s": time.process_time() - cpu, "p50_s": p50, "p99_s": p99}


def _waited(batches: Endless, mean: float, max_s: float) -> dict[str, Any]:
    """Take batches as a training step would that lasts PATIENCE mean batch times: which share of the time goes in waiting for them."""
    step = max(PATIENCE * mean, 1e-4)
    waits: list[float] = []
    start = time.perf_counter()
    while (begun := time.perf_counter()) - start < max_s / 4 and len(waits) < 2_000:
        if batches.next() is None:
            break
        waits.append(time.perf_counter() - begun)
        time.sleep(step)
    total = time.perf_counter() - start
    return {"wait_s": statistics.fmean(waits), "wait_share": sum(waits) / total} if waits else {"wait_s": None, "wait_share": None}


def _shown(loader: Any, batches: Endless, n: int) -> list[str]:
    shown: list[str] = []
    n_rows = 0
    while len(shown) < n and (n_rows < SHOWN or len(shown) < 2) and (batch := batches.next()) is not None:
        n_rows += loader.n_cells(batch)
        rows = loader.rows(batch)
        numbers = fingerprints(*rows) if isinstance(rows, tuple) else of_dense(rows)
        shown.append(base64.b64encode(numbers.tobytes()).decode())
    return shown


def _device_bytes(subject: Any) -> int:
    return int(subject.device_bytes()) if hasattr(subject, "device_bytes") else 0


def epoch(subject: Any, asked: Asked, loaders: dict[str, Any]) -> dict[str, Any]:
    """Run through one epoch of a loader that stays open for the next: cells, and on request the sum of all values."""
    key = json.dumps([asked["store"], asked["settings"]])
    if key not in loaders:
        loaders[key] = subject.open(asked["sources"], asked["store"], asked["settings"])
    loader, cells, total = loaders[key], 0, 0.0
    for batch in loader.epoch(0):
        cells += loader.n_cells(batch)
        if asked.get("sum"):
            rows = loader.rows(batch)
            total += float(np.sum(rows[2] if isinstance(rows, tuple) else rows, dtype=np.float64))
    return {"cells": cells, "sum": total}


def converted(subject: Any, asked: Asked) -> dict[str, Any]:
    """Make the store, if it is not there; `seconds` is None then. It is there under its name only when it is whole."""
    store = Path(asked["store"])
    seconds = None
    if not store.exists() and hasattr(subject, "convert"):
        getattr(subject, "prepare", lambda: None)()
        making = store.parent / f".{store.name}.making" / store.name
        shutil.rmtree(making.parent, ignore_errors=True)
        making.parent.mkdir()
        start = time.perf_counter()
        subject.convert(asked["sources"], str(making), asked["settings"])
        seconds = time.perf_counter() - start
        making.rename(store)
        making.parent.rmdir()
    return {"seconds": seconds}


class Ranks:
    """The processes that torchrun started: the first reads what is asked, all do it, the first says what they did together."""

    def __init__(self) -> None:
        self.size, self.rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        if self.size > 1:
            from torch import distributed

            distributed.init_process_group("gloo", timeout=timedelta(days=2))  # type: ignore[no-untyped-call, unused-ignore]

    def requests(self) -> Iterator[Asked]:
        """Give what is asked until stdin ends."""
        while True:
            line = [sys.stdin.readline()] if self.rank == 0 else [None]
            if self.size > 1:
                from torch import distributed

                distributed.broadcast_object_list(line)
            if not line[0]:
                return
            yield json.loads(line[0])

    def joined(self, found: dict[str, Any]) -> dict[str, Any]:
        """Join what all ranks found: cells of all in the time of the slowest."""
        if self.size == 1:
            return found
        from torch import distributed

        every: list[Any] = [None] * self.size
        distributed.all_gather_object(every, found)
        joined = dict(found)
        for key in found:
            values = [one[key] for one in every if one.get(key) is not None]
            if key in ("cells", "batches", "cpu_s", "device_bytes"):
                joined[key] = sum(values)
            elif key == "fingerprints":
                joined[key] = [shown for value in values for shown in value]
            elif values and isinstance(values[0], float):
                joined[key] = max(values)
        return joined


def main(path: str) -> None:
    """Answer until stdin ends; a fault is an answer too, and the end."""
    here = Path(__file__).resolve().parent
    sys.path[:] = [place for place in sys.path if Path(place).resolve() != here]  # where modules lie that have short names
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    spec = importlib.util.spec_from_file_location("subject", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} is no Python file")
    subject = importlib.util.module_from_spec(spec)
    sys.modules["subject"] = subject  # worker processes unpickle by this name
    ranks, loaders = Ranks(), {}  # type: tuple[Ranks, dict[str, Any]]
    verbs: dict[str, Any] = {"measure": measured, "convert": converted, "epoch": lambda subject, asked: epoch(subject, asked, loaders)}
    try:
        spec.loader.exec_module(subject)
        _answer(answers, ranks, {"facts": {"python": sys.version.split()[0], **subject.facts()}})
        for asked in ranks.requests():
            is_mine = ranks.rank == 0 or asked["do"] != "convert"  # one makes the store, the others wait
            found = ranks.joined(verbs[asked["do"]](subject, asked) if is_mine else {})
            gc.collect()  # what the loader had mapped would stay in the page cache
            _answer(answers, ranks, found)
    except BaseException as error:
        traceback.print_exc()
        _answer(answers, ranks, {"fault": f"{type(error).__name__}: {error}"})
        raise
    for loader in loaders.values():
        loader.close()


def _answer(answers: Any, ranks: Ranks, found: dict[str, Any]) -> None:
    if ranks.rank == 0:
        answers.write(json.dumps(found) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
