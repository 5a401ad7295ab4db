"""GB/s of a dataset that streams through windows, page cache cold, beside the same files read from begin to end, and beside others.

    python benchmarks/streaming.py RAW|H5AD [PACKED] [--window 256] [--rounds 3] [--environments DIR [--peers LABEL ...]]
    python benchmarks/streaming.py RAW|H5AD [PACKED] --larger-than-memory 6 [--limit 2]

RAW is an archive, or an h5ad file (benchmarks/make_data.py makes one), converted beside itself; PACKED is made beside it where it is
not given. Alternatives take turns. Before each the files' pages are dropped (posix_fadvise, when their maps are gone), which mincore
confirms, or the run ends. Of each archive, in this process:

    dd, k threads       the files of its rows from begin to end, O_DIRECT, 4 MiB a request, by k threads
    extents, 8 threads  the same bytes in extents of the size that windows have, in random order
    GPUBatchLoader      windows=True on the CPU: opened, every batch of an epoch made and dropped
    assembly alone      the same batches with windows=False, of the pages that the run before left in the page cache: not cold

and of the raw one peers, each in a process of its own, in the environment that `scdl-gpu bench --build-peers` made for it below
--environments, with the settings of benchmarks/peers/: bionemo-scdl, rows at random; scDataset over it, blocks of 16 rows, windows of
16,384; both read RAW; annbatch, chunks of 512 rows through zarrs, windows of 16,384 rows, of a store that it makes beside H5AD. They are
opened and read an epoch, of which --peer-seconds are timed at most, from its start: their GB/s and seconds are those of all rows at the
rate of that time. First every row must come from GPUBatchLoader once, and the rows of some batches must be rows of H5AD, those of
peers in every turn. A peer that fails is left out, and the script ends with an error. Ratios are in cells/s to
the last line. `of_dd` is the median of the rounds' shares of the faster dd, of the whole epoch, opening and last window included,
`of_limit` of the slower of dd and assembly; `reading` is GB/s while windows were read. What --larger-than-memory does
benchmarks/larger_than_memory.py says.
"""

import argparse
import mmap
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from dataloader import archive_of, drain
from larger_than_memory import chill, row_files, stream_more
from packed_loader import packed_of

from scdl_gpu import GPUBatchLoader, SingleCellMemMapDataset, bench
from scdl_gpu.bench import contenders, contest, pages, peer, serve
from scdl_gpu.bench.quality import Table
from scdl_gpu.bench.source import open_source
from scdl_gpu.window_order import extent_bytes_of

BLOCK_BYTES = 4 << 20
OURS, WARM = "GPUBatchLoader", "assembly alone"
LABELS = ("annbatch, chunk 512", "scDataset over SCDL, block 16", "bionemo-scdl")
CHECKED = 16
"""Batches whose rows are looked for in the source; of a peer two, for those that read rows at random take seconds for a batch."""


# ---- limits


def read_directly(requests: Sequence[tuple[Path, int, int]], threads: int) -> None:
    """Read requests, (file, start, bytes) with whole pages, past the page cache: each thread takes the next, into a buffer of its own."""
    files = {path: os.open(path, os.O_RDONLY | os.O_DIRECT) for path in {path for path, _, _ in requests}}
    todo = iter(requests)  # next() of it is atomic
    most = max(size for _, _, size in requests)

    def run(_: int) -> None:
        memory = memoryview(mmap.mmap(-1, most))
        for path, start, size in todo:
            os.preadv(files[path], [memory[:size]], start)

    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(run, range(threads)))
    finally:
        for fd in files.values():
            os.close(fd)


def requests_of(files: Sequence[Path], size_bytes: int, *, shuffle: bool = False) -> list[tuple[Path, int, int]]:
    """Cut files into requests of so many bytes, in their order or in random order."""
    found = [(file, start, size_bytes) for file in files for start in range(0, file.stat().st_size, size_bytes)]
    if shuffle:
        np.random.default_rng(0).shuffle(found)  # type: ignore[arg-type]
    return found


# ---- alternatives


class Epochs:
    """Runs of GPUBatchLoader through an epoch, and what its last run told."""

    def __init__(self, archive: Path, batch_size: int, window_bytes: int, output: str) -> None:
        self._archive, self._batch_size, self._output = archive, batch_size, output
        self._budget = 2 * window_bytes
        self.notes: list[dict[str, Any]] = []

    def __call__(self) -> None:
        """Open the archive, and go through an epoch."""
        start, cpu = time.perf_counter(), time.process_time()
        with (
            bench.PeakMemory(bench.resident_bytes) as memory,
            GPUBatchLoader(
                self._archive, self._batch_size, device="cpu", windows=True, host_budget=self._budget, output=self._output
            ) as loader,
        ):
            batches = iter(loader)
            next(batches)
            first = time.perf_counter() - start
            for _ in batches:
                pass
            report = loader.streaming
        if report is not None:
            self.notes.append(
                {
                    "reading": round(report.bytes_per_second / 1e9, 3),
                    "first_batch_seconds": round(first, 3),
                    "waited_seconds": round(report.seconds_waited, 3),
                    "cpu_seconds": round(time.process_time() - cpu, 3),
                    "windows": report.n_windows,
                    "read_bytes": report.size_bytes,
                    "path": report.path,
                    "peak_bytes": memory.growth_bytes,
                }
            )


def check(archive: Path, table: Table, arguments: argparse.Namespace) -> None:
    """Raise SystemExit unless an epoch of ours has every row once, and its first batches the rows of the source."""
    numbers: list[Any] = []
    budget = 2 * arguments.window << 20
    with GPUBatchLoader(archive, arguments.batch_size, device="cpu", windows=True, host_budget=budget, output=arguments.output) as loader:
        for batch in loader:
            if len(numbers) < CHECKED:
                x = batch.x
                of_csr = arguments.output == "csr" and (x.crow_indices().numpy(), x.col_indices().numpy(), x.values().numpy())
                found = table.rows(serve.fingerprints(*of_csr) if of_csr else serve.of_dense(x.numpy()))
                if (found < 0).any():
                    raise SystemExit(f"{(found < 0).sum()} of {found.size} rows of a batch of {archive.name} are no rows of the source")
            numbers.append(batch.rows[~batch.is_padding].numpy())
        rows = np.concatenate(numbers)
        if rows.size != loader.shape[0] or np.unique(rows).size != rows.size:
            raise SystemExit(f"{rows.size:,} rows came of {archive.name}, {np.unique(rows).size:,} different ones, of {loader.shape[0]:,}")


def peers_of(source: Path, raw: Path, arguments: argparse.Namespace) -> contest.Contest:
    """Give the peers that are asked for and installed, their stores made. Those of bionemo-scdl's format read the raw archive itself."""

    def placed(one: contest.Contender) -> contest.Contender:
        if one.store is None or one.is_given:
            return one
        if one.store.name == "bionemo-scdl":
            return replace(one, store=raw, is_given=True)
        return replace(one, store=source.with_name(f"{source.stem}.{one.store.name}"))

    def say(words: str) -> None:
        print(words, file=sys.stderr, flush=True)

    variants = {variant["label"]: name for name in peer.names() for variant in peer.head_of(peer.script_of(name)).VARIANTS}
    if unknown := set(arguments.peers) - set(variants):
        raise SystemExit(f"no peer is called {' or '.join(sorted(unknown))}; there are {'; '.join(variants)}")
    opened = open_source([source], use_x=True)
    names = list(dict.fromkeys(variants[label] for label in arguments.peers))
    found = contenders.peers(names, opened, source.parent, home=arguments.environments, builds=False, archive=raw, say=say)
    chosen = [placed(one) for label in arguments.peers for one in found if one.label == label]
    rules = contest.Rules(max_s=arguments.peer_seconds, check=2, turn_s=600 + arguments.peer_seconds, loader_s=float("inf"))
    made = contest.Contest(opened, chosen, rules, logs=arguments.logs, say=say)
    made.convert()
    return made


# ---- comparing


def alternatives(archive: Path, ours: Epochs, extent_bytes: int, arguments: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Make the runs in this process, ours among them."""
    files = row_files(archive)
    sequential, extents = requests_of(files, BLOCK_BYTES), requests_of(files, extent_bytes, shuffle=True)

    def resident() -> None:
        drain(GPUBatchLoader(archive, arguments.batch_size, device="cpu", windows=False, output=arguments.output))

    return {
        "dd, 1 thread": lambda: read_directly(sequential, 1),
        "dd, 8 threads": lambda: read_directly(sequential, 8),
        f"extents of {extent_bytes >> 10:,} KiB, 8 threads": lambda: read_directly(extents, 8),
        OURS: ours,
        WARM: resident,
    }


def compare(archive: Path, table: Table, peers: contest.Contest | None, arguments: argparse.Namespace) -> None:
    """Let alternatives over one archive take turns, and print."""
    window_bytes, size_bytes, n_rows = arguments.window << 20, pages.size_of(row_files(archive)), len(SingleCellMemMapDataset(archive))
    ours, extent_bytes = Epochs(archive, arguments.batch_size, window_bytes, arguments.output), extent_bytes_of(window_bytes)
    runs, cold = alternatives(archive, ours, extent_bytes, arguments), list[tuple[int, int]]()
    seconds: dict[str, list[float]] = {what: [] for what in runs}
    check(archive, table, arguments)
    for turn in range(arguments.rounds + 1):  # the first, unmeasured one compiles
        for what, run in runs.items():
            if what != WARM:
                cold.append(chill([archive]))
            start = time.perf_counter()
            run()
            if turn:
                seconds[what].append(time.perf_counter() - start)
        for contender in list(peers.contenders) if peers else []:
            peers.turn(contender, (arguments.output, arguments.batch_size, "cold"), table, f"turn {turn} of {arguments.rounds}")
            peers.rest(contender)  # else it might keep the files mapped that others read
    results = [bench.Result(what, tuple(taken), n_rows, size_bytes) for what, taken in seconds.items()]
    facts = {"archive": archive.name, "output": arguments.output, "batch_size": arguments.batch_size}
    facts |= {"window_bytes": window_bytes, "extent_bytes": extent_bytes, "files_bytes": size_bytes}
    facts |= {"cached_before": max(before for before, _ in cold), "cached_after": max(after for _, after in cold)}
    of_dd, of_limit, note = *shares(seconds), ours.notes[-1]
    for result in results:
        own = {"of_dd": round(of_dd, 3), "of_limit": round(of_limit, 3), "notes": ours.notes[1:]} if result.what == OURS else {}
        print(bench.json_line(result, **facts, **own, cache="warm" if result.what == WARM else "cold"))
    for result, told in told_of(peers, archive, n_rows) if peers else []:
        results.append(result)
        ratio = statistics.median(theirs / own for theirs, own in zip(result.seconds, seconds[OURS], strict=True))
        print(bench.json_line(result, **facts | told, ours_to_it=round(ratio, 2)))
    print(f"\n{archive.name}, {size_bytes / 1e9:.2f} GB, cold: {facts['cached_after']:,} bytes cached\n{bench.table(results)}")
    print(
        f"GPUBatchLoader: {100 * of_dd:.0f} % of dd, {100 * of_limit:.0f} % of the slower of dd and assembly; "
        f"reading {note['reading']:.2f} GB/s by {note['path']}, first batch after "
        f"{note['first_batch_seconds']:.2f} s, waited {note['waited_seconds']:.2f} s, at most {note['peak_bytes'] / 1e6:,.0f} MB\n",
        flush=True,
    )


def shares(seconds: dict[str, list[float]]) -> tuple[float, float]:
    """Give the medians of the rounds' shares that ours had of the faster dd, and of the slower of that and assembly."""
    dd = [min(pair) for pair in zip(seconds["dd, 1 thread"], seconds["dd, 8 threads"], strict=True)]
    limits = [max(pair) for pair in zip(dd, seconds[WARM], strict=True)]
    of = [statistics.median(best / own for best, own in zip(bests, seconds[OURS], strict=True)) for bests in (dd, limits)]
    return of[0], of[1]


def told_of(peers: contest.Contest, archive: Path, n_rows: int) -> list[tuple[bench.Result, dict[str, Any]]]:
    """Give the measured turns of peers as results of all rows at the rate of the rows that they gave, and what is told beside."""
    found = []
    for contender in peers.contenders:
        line = next(line for line in peers.lines.values() if line.label == contender.label)
        first, *rounds = line.rounds
        files = row_files(archive) if contender.store == archive else contender.files(peers.source)
        seconds = tuple(turn["seconds"] * n_rows / turn["cells"] for turn in rounds)
        told = {key: [turn[key] for turn in rounds] for key in ("cells", "first_s", "cpu_s", "peak_private_bytes", "resident")}
        told |= {"cache": "cold", "checked_rows": first["rows"] + sum(turn["rows"] for turn in rounds), "peer": peers.facts[line.label]}
        if max(told["resident"]) > contest.COLD:
            raise SystemExit(f"{line.label}: {100 * max(told['resident']):.1f} % of its files' pages stayed in the page cache")
        result = bench.Result(line.label, seconds, n_rows, pages.size_of(files))
        found.append((result, told | {"files_bytes": result.size_bytes, "settings": contender.settings}))
    return found


def main() -> None:
    """Parse the arguments, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("packed", type=Path, nargs="?")
    parser.add_argument("--window", type=int, default=256, help="MiB of each of two windows")
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--output", choices=["csr", "dense"], default="csr")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--environments", type=Path, default=Path("bench-data/peers"), help="where peers are installed")
    parser.add_argument("--peers", nargs="*", default=LABELS, metavar="LABEL", help="as benchmarks/peers/ has them; none: no peers")
    parser.add_argument("--peer-seconds", type=float, default=10, help="of an epoch of a peer that are timed in each turn")
    parser.add_argument("--logs", type=Path, help="a folder for what peers say; a temporary one otherwise")
    parser.add_argument("--larger-than-memory", type=float, metavar="GIB", help="stream so many GiB with little memory instead")
    parser.add_argument("--limit", type=float, default=2, help="GiB that the loader is told the node has, with --larger-than-memory")
    arguments = parser.parse_args()
    raw = archive_of(arguments.source)
    packed = arguments.packed or packed_of(raw)
    if arguments.larger_than_memory:
        for archive in (raw, packed):
            stream_more(archive, arguments)
        return
    with ExitStack() as stack:
        arguments.logs = arguments.logs or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        table, _ = open_source([arguments.source], use_x=True).table(raw.parent)
        compare(packed, table, None, arguments)
        peers = stack.enter_context(closing(peers_of(arguments.source, raw, arguments)))
        compare(raw, table, peers, arguments)
        if peers.failures:
            raise SystemExit(f"left out: {peers.failures}")


if __name__ == "__main__":
    main()
