"""The measured side of a benchmark: one loader in a process of its own, which answers lines of JSON with lines of JSON.

    PYTHON serve.py SUBJECT.py

Knows clocks, and how rows are told apart; whose loader it is the subject knows, a file with
    convert(sources, store, settings)     makes the store of its format out of h5ad files; absent where it reads these
    prepare()                             what is not to be timed with that, such as compiling; may be absent
    Loader(sources, store, settings)      opens it: epoch(number), an iterable of batches; close(); words(), which may be absent, as
                                          may n_cells(batch) and rows(batch) where batches are tensors, arrays or SciPy's matrices:
                                          the latter gives (indptr, indices, data) of a CSR, or a dense array
    USES, PACKAGES                        modules to be imported before any clock runs, packages whose versions are told; may be absent
    facts()                               what else is to be told; may be absent
    device_bytes(), synchronize()         where it uses a GPU; both may be absent
Imports NumPy and nothing of ours: peers live in environments that have no scdl_gpu, and other versions of everything.
What is timed is what a training loop sees: from asking for a batch to having it, of an epoch after the other, without a look at
its content; content is looked at after the clock has stopped, in the batches that follow, or in an epoch more
where none do. A turn that its limit cuts short has the
figures of what was delivered by then, and of that the first and the last batch are looked at; the process ends then, since what was
interrupted is in no state to go on.
"""

import base64
import contextlib
import gc
import importlib.util
import json
import os
import shutil
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from importlib import metadata
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


def n_cells(batch: Any) -> int:
    """Count the rows of a tensor, an array or a matrix of SciPy's."""
    return int(batch.shape[0])


def rows_of(batch: Any) -> Any:
    """Give (indptr, indices, data) of a CSR of torch's or SciPy's, or a dense array."""
    if hasattr(batch, "indptr"):
        return batch.indptr, batch.indices, batch.data
    if str(getattr(batch, "layout", None)) == "torch.sparse_csr":
        return tuple(part.numpy() for part in (batch.crow_indices(), batch.col_indices(), batch.values()))
    return np.asarray(batch)


def facts(subject: Any) -> dict[str, Any]:
    """Import what a subject uses, and give the versions of its packages and of Python, and what it says itself."""
    for name in getattr(subject, "USES", ()):
        importlib.import_module(name)
    versions = {}
    for name in getattr(subject, "PACKAGES", ()):
        with contextlib.suppress(metadata.PackageNotFoundError):  # annbatch takes torch or leaves it
            versions[name] = metadata.version(name)
    return {"python": sys.version.split()[0], "versions": versions, **getattr(subject, "facts", dict)()}


class Late(BaseException):
    """The turn has taken as long as it may. No Exception: loaders that try again after errors are not to swallow it."""


class Endless:
    """Batches, epoch after epoch, at most `n_epochs`; `cells` counts those delivered. Raises ValueError where an epoch has none."""

    def __init__(self, loader: Any, n_epochs: int | None) -> None:
        self.loader, self._n_epochs, self._n_cells = loader, n_epochs, getattr(loader, "n_cells", n_cells)
        self._batches = self._all()
        self.cells = 0
        self.last: Any = None

    def _all(self) -> Iterator[Any]:
        number = 0
        while self._n_epochs is None or number < self._n_epochs:
            is_empty = True
            for batch in self.loader.epoch(number):
                is_empty = False
                yield batch
            if is_empty:
                raise ValueError("an epoch without a batch: fewer cells than batch_size")
            number += 1

    def next(self) -> Any:
        """Give the next one, None at the end."""
        batch = next(self._batches, None)
        if batch is not None:
            self.cells += self._n_cells(batch)
            self.last = batch
        return batch

    def close(self) -> None:
        """End the epoch that is under way."""
        self._batches.close()  # type: ignore[attr-defined]


class Turn:
    """One loader opened and its batches timed; `found` has what is known so far, whenever it is cut short."""

    def __init__(self, subject: Any, asked: Asked) -> None:
        self.found: dict[str, Any] = {"cut_s": None, "cells": 0, "fingerprints": []}
        self._subject, self._asked = subject, asked
        self._synchronize = getattr(subject, "synchronize", lambda: None)
        self._batches: Endless | None = None
        self._first: Any = None
        self._start = time.perf_counter()

    def run(self) -> None:
        """Open, time, let a slow consumer wait, and show the rows of the batches that follow; then close."""
        subject, asked, found = self._subject, self._asked, self.found
        before = _device_bytes(subject)
        loader = subject.Loader(asked["sources"], asked["store"], asked["settings"])
        found["open_s"] = time.perf_counter() - self._start
        batches = self._batches = Endless(loader, asked.get("epochs"))
        batch = self._first = batches.next()
        self._synchronize()
        found["first_s"] = time.perf_counter() - self._start
        first = found["first_cells"] = batches.cells
        while batch is not None and time.perf_counter() - self._start - found["first_s"] < asked["warmup_s"]:
            batch = batches.next()
        self._synchronize()
        timed = _timed(batches, asked["max_s"], self._synchronize)
        if asked["cold"]:  # the first batch and what was read ahead with it are the cold ones
            timed |= {"cells": timed["cells"] + first, "seconds": timed["seconds"] + found["first_s"]}
        found |= timed  # at once: a turn that is cut short has all of it or nothing
        self._first = None
        found["device_bytes"] = max(0, _device_bytes(subject) - before)
        if hasattr(loader, "words"):
            found["loader"] = loader.words()
        found |= _waited(batches, found["seconds"] / found["cells"] * first, asked["max_s"])
        _show(batches, asked["check"], found["fingerprints"])
        if not found["fingerprints"]:
            _show(Endless(loader, 1), asked["check"], found["fingerprints"])

    def close(self) -> None:
        """End the epoch, and close the loader."""
        if self._batches is not None:
            self._batches.close()
            self._batches.loader.close()

    def cut(self) -> None:
        """Take what was delivered until now: cells since the first batch, or with it where nothing followed or the cache was cold."""
        found, batches = self.found, self._batches
        found["cut_s"] = time.perf_counter() - self._start
        if batches is None or not batches.cells:
            return
        if "seconds" not in found:
            first = found.get("first_cells", batches.cells)
            is_whole = self._asked["cold"] or batches.cells == first
            found["cells"] = batches.cells - (0 if is_whole else first)
            found["seconds"] = found["cut_s"] - (0 if is_whole else found["first_s"])
            found["device_bytes"] = _device_bytes(self._subject)
        if self._asked["check"] and not found["fingerprints"]:
            for batch in [batches.last] if self._first is None or self._first is batches.last else [self._first, batches.last]:
                found["fingerprints"].append(_shown(batches.loader, batch))


def measured(subject: Any, asked: Asked) -> dict[str, Any]:
    """Take a turn of `limit_s` seconds at most."""

    def late(*_: Any) -> None:
        raise Late

    turn = Turn(subject, asked)
    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, asked["limit_s"], 1.0)  # again and again: what is raised in a finaliser is lost
    is_cut = False
    try:
        turn.run()
    except Late:
        is_cut = True
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if not is_cut:  # what was interrupted might hang
            turn.close()
    if is_cut:
        turn.cut()
    return turn.found


def _timed(batches: Endless, max_s: float, synchronize: Any) -> dict[str, Any]:
    times, before = [], batches.cells
    cpu, start = time.process_time(), time.perf_counter()
    last = start
    while last - start < max_s:
        batch = batches.next()
        if batch is None:
            break
        now = time.perf_counter()
        times.append(now - last)
        last = now
    synchronize()
    seconds = time.perf_counter() - start
    if not times:
        raise ValueError("no batch was left to be timed: the epochs ended in the warm-up; fewer seconds of it, or more epochs")
    p50, p99 = np.quantile(times, (0.5, 0.99))
    cells = batches.cells - before
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


def _show(batches: Endless, n: int, shown: list[str]) -> None:
    """Append the fingerprints of at most n more batches."""
    start = batches.cells
    while len(shown) < n and (batches.cells - start < SHOWN or len(shown) < 2) and (batch := batches.next()) is not None:
        shown.append(_shown(batches.loader, batch))


def _shown(loader: Any, batch: Any) -> str:
    rows = getattr(loader, "rows", rows_of)(batch)
    numbers = fingerprints(*rows) if isinstance(rows, tuple) else of_dense(rows)
    return base64.b64encode(numbers.tobytes()).decode()


def _device_bytes(subject: Any) -> int:
    return int(subject.device_bytes()) if hasattr(subject, "device_bytes") else 0


def epoch(subject: Any, asked: Asked, loaders: dict[str, Any]) -> dict[str, Any]:
    """Run through one epoch of a loader that stays open for the next: cells, and on request the sum of all values."""
    key = json.dumps([asked["store"], asked["settings"]])
    if key not in loaders:
        loaders[key] = subject.Loader(asked["sources"], asked["store"], asked["settings"])
    loader, cells, total = loaders[key], 0, 0.0
    for batch in loader.epoch(0):
        cells += getattr(loader, "n_cells", n_cells)(batch)
        if asked.get("sum"):
            rows = getattr(loader, "rows", rows_of)(batch)
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
        _answer(answers, ranks, {"facts": facts(subject)})
        for asked in ranks.requests():
            is_mine = ranks.rank == 0 or asked["do"] != "convert"  # one makes the store, the others wait
            found = ranks.joined(verbs[asked["do"]](subject, asked) if is_mine else {})
            gc.collect()  # what the loader had mapped would stay in the page cache
            _answer(answers, ranks, found)
            if found.get("cut_s") is not None:
                os._exit(0)  # threads that the loader waits for would hold up any other end
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
