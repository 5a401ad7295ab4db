"""More bytes than memory, streamed with little of it: what `benchmarks/streaming.py --larger-than-memory GIB` does.

Copies of an archive are made beside it until there are as many bytes, and removed afterwards. An epoch of all of them goes twice
through windows: past the page cache, since the loader is told that the node has --limit GiB (of fewer bytes: a tenth of them);
and through it, the files' pages being dropped after each window. Each archive is streamed in a process of its own, which is watched a
hundred times a second, and ended where its memory, imports and windows included, is more than --limit; where it ends otherwise than
well the script says how, and ends with an error. Told are the memory of the process at its peak, and the bytes of the files that are in
the page cache at most. Every row must come once. To be held to a limit by the kernel, the page cache included, run it in a control
group: systemd-run --scope -p MemoryMax=2G python ...
"""

import argparse
import mmap
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from scdl_gpu import GPUBatchLoader, bench
from scdl_gpu.bench import contest, pages

PAGE = mmap.PAGESIZE


def row_files(archive: Path) -> list[Path]:
    """Give the files that hold columns and values: what streaming reads. Row tables, some per cent of it, are mapped."""
    return sorted(archive.glob("shard-*.scdp")) or [archive / "col_ptr.npy", archive / "data.npy"]


def chill(archives: Sequence[Path]) -> tuple[int, int]:
    """Drop the pages of archives; give the bytes of rows that were cached before and after. Raises SystemExit where they stay."""
    files = [file for archive in archives for file in row_files(archive)]
    before, _ = pages.cached_pages(files)
    pages.drop(archives)
    after, total = pages.cached_pages(files)
    if after > contest.COLD * total:
        raise SystemExit(f"{after * PAGE:,} of {pages.size_of(files):,} bytes stay in the page cache: somebody else has the files mapped")
    return before * PAGE, after * PAGE


@contextmanager
def copies(archive: Path, size_bytes: int) -> Iterator[list[Path]]:
    """Lend copies of an archive that have so many bytes: pages of their own. Raises SystemExit where the disk has no room."""
    own = pages.size_of([archive])
    count = max(1, -(-size_bytes // pages.size_of(row_files(archive))))
    free = shutil.disk_usage(archive.parent).free
    if free < count * own:
        raise SystemExit(f"{count} copies of {archive} take {count * own:,} bytes, and {free:,} are free")
    found = [archive.with_name(f"{archive.name}.copy{number}") for number in range(count)]
    try:
        for path in found:
            shutil.rmtree(path, ignore_errors=True)  # of a run that died
            shutil.copytree(archive, path)
        yield found
    finally:
        for path in found:
            shutil.rmtree(path, ignore_errors=True)


def apart(what: str, limit: int, run: Callable[..., Any], *given: Any) -> None:
    """Run something in a process of its own within `limit` bytes. Raises SystemExit that says how it ended, unless it ended well."""
    process = multiprocessing.get_context("spawn").Process(target=run, args=given)
    process.start()
    while process.is_alive():
        held = bench.resident_bytes(process.pid)
        if held > limit:
            process.kill()
            process.join()
            raise SystemExit(f"{what}: its process had {held:,} bytes of memory, {limit:,} were granted: it was ended")
        process.join(0.01)
    code = process.exitcode
    if code:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        hint = ", which the kernel sends where memory is out" if code == -signal.SIGKILL else ""
        raise SystemExit(f"{what}: its process {how}{hint}; what it had printed before is all there is")


def forget(files: Sequence[Path]) -> None:
    """Drop the pages of files that are being read, but for those that are mapped: of row tables."""
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def streamed(
    paths: list[Path], files: list[Path], budget: int, *, room: int, batch_size: int, is_dropped: bool
) -> tuple[bench.Result, dict[str, Any]]:
    """Go through an epoch on a node that is said to have `room` bytes; tell the time and what memory it took."""
    rows, n_windows, most, held = [], 0, 0, bench.resident_bytes()
    with (
        mock.patch("scdl_gpu.windows.available_bytes", return_value=room),
        bench.PeakMemory(bench.resident_bytes) as memory,
        GPUBatchLoader([*paths], batch_size, device="cpu", windows=True, host_budget=budget) as loader,
    ):
        start, report = time.perf_counter(), loader.streaming
        if report is None:
            raise SystemExit(f"{loader!r} does not stream")
        for batch in loader:
            rows.append(batch.rows[~batch.is_padding].numpy())
            if report.n_windows != n_windows:
                n_windows, most = report.n_windows, max(most, pages.cached_pages(files)[0] * PAGE)
                if is_dropped:
                    forget(files)
        seconds = time.perf_counter() - start
        came = np.concatenate(rows)
        if came.size != loader.shape[0] or np.bincount(came, minlength=came.size).max() > 1:
            raise SystemExit(f"{came.size:,} rows came, {np.unique(came).size:,} different ones, of {loader.shape[0]:,}")
    what = "pages dropped after each window" if is_dropped else "past the page cache"
    facts = {"path": report.path, "windows": n_windows, "peak_bytes": held + memory.growth_bytes, "most_cached": most}
    return bench.Result(what, (seconds,), came.size, pages.size_of(files)), facts | {"waited_seconds": round(report.seconds_waited, 3)}


def stream_both_ways(paths: list[Path], limit: int, window_bytes: int, batch_size: int) -> None:
    """Stream all rows of archives past the page cache and through it, within `limit` bytes, and print what was taken at most."""
    files = [file for path in paths for file in row_files(path)]
    name, size_bytes, budget = paths[0].stem, pages.size_of(files), min(2 * window_bytes, limit // 2)
    for is_dropped in (False, True):
        before, after = chill(paths)
        room = size_bytes + limit if is_dropped else limit if limit < size_bytes else size_bytes // 10
        result, facts = streamed(paths, files, budget, room=room, batch_size=batch_size, is_dropped=is_dropped)
        facts |= {"archive": name, "files_bytes": size_bytes, "limit_bytes": limit, "host_budget": budget}
        print(bench.json_line(result, **facts, cached_before=before, cached_after=after))
        print(
            f"\n{name}, {size_bytes / 1e9:.2f} GB {result.what} ({facts['path']}): {result.gb_per_second:.2f} GB/s, "
            f"{result.per_second:,.0f} cells/s; memory of the process {facts['peak_bytes'] / 1e6:,.0f} MB at most, "
            f"of its files cached {facts['most_cached'] / 1e6:,.0f} MB\n",
            flush=True,
        )


def stream_more(archive: Path, arguments: argparse.Namespace) -> None:
    """Stream more bytes of an archive than memory is granted. Raises SystemExit where that ends otherwise than well."""
    limit = int(arguments.limit * 2**30)
    print(f"{archive.name}: copying it until there are {arguments.larger_than_memory:g} GiB", file=sys.stderr, flush=True)
    with copies(archive, int(arguments.larger_than_memory * 2**30)) as paths:
        print(f"{archive.name}: streaming {len(paths)} copies", file=sys.stderr, flush=True)
        apart(archive.name, limit, stream_both_ways, paths, limit, arguments.window << 20, arguments.batch_size)
