"""GB/s of a dataset that streams through windows, page cache cold, beside the same files read from begin to end, and beside others.

    python benchmarks/streaming.py RAW|H5AD [PACKED] [--window 256] [--rounds 3] [--peer-cells 20000] [--annbatch PYTHON]
    python benchmarks/streaming.py RAW|H5AD [PACKED] --larger-than-memory 6 [--limit 2]

RAW is an archive, or an h5ad file (benchmarks/make_data.py makes one), converted beside itself; PACKED is made beside it where it is
not given. Alternatives take turns in one process. Before each the files' pages are dropped (posix_fadvise, when their maps are gone),
which mincore confirms, or the run ends. Of each archive:

    dd, k threads       the files of its rows from begin to end, O_DIRECT, 4 MiB a request, by k threads
    extents, 8 threads  the same bytes in extents of the size that windows have, in random order
    GPUBatchLoader      windows=True on the CPU: opened, every batch of an epoch made and dropped
    assembly alone      the same batches with windows=False, of the pages that the run before left in the page cache: not cold

and of the raw one, of --peer-cells random rows, so many of the bytes: bionemo-scdl in a DataLoader, and where it is installed
scDataset over it, blocks of 16 rows; --annbatch names a Python that has annbatch, which reads all rows from a store of its own,
made beside H5AD. Ratios are in cells/s to the last line. `of_dd` is the median of the rounds' shares of the faster dd, of the
whole epoch, opening and last window included, `of_limit` of the slower of dd and assembly; `reading` is GB/s while windows were read.

--larger-than-memory GIB copies the archive beside itself until there are as many bytes, and streams them with little memory: the
loader is told that the node has --limit GiB, so that it reads past the page cache; and once more through the page cache, whose pages are
dropped after each window. Told are the memory of the process at its peak and the bytes of the files that are in the page cache at most.
To be held to a limit by the kernel, run it in a control group: systemd-run --scope -p MemoryMax=2G python ...
"""

import argparse
import ctypes
import gc
import itertools
import mmap
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from annbatch_loader import Annbatch
from dataloader import archive_of, drain
from packed_loader import drop_pages, packed_of

from scdl_gpu import GPUBatchLoader, SingleCellMemMapDataset, bench
from scdl_gpu.window_order import extent_bytes_of

BLOCK_BYTES = 4 << 20
WARM = "assembly alone"
RESIDENT_SHARE = 0.01
"""Of the files' pages that may still be in the page cache when it is said to be cold."""


# ---- files and pages


def row_files(archive: Path) -> list[Path]:
    """Give the files that hold columns and values: what streaming reads. Row tables, some per cent of it, are mapped."""
    return sorted(archive.glob("shard-*.scdp")) or [archive / "col_ptr.npy", archive / "data.npy"]


def size_of(files: Sequence[Path]) -> int:
    """Sum the bytes of files."""
    return sum(file.stat().st_size for file in files)


def cached_bytes(files: Sequence[Path]) -> int:
    """Ask mincore how many bytes of `files` are in the page cache."""
    libc, found = ctypes.CDLL(None, use_errno=True), 0
    for file in files:
        size = file.stat().st_size
        if not size:
            continue
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            pages = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
            view = np.frombuffer(mapped, np.uint8)
            failed = libc.mincore(ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size), ctypes.c_void_p(pages.ctypes.data))
            del view
            if failed:
                raise SystemExit(f"mincore of {file} failed: {os.strerror(ctypes.get_errno())}")
            found += int((pages & 1).sum()) * mmap.PAGESIZE
    return found


def chill(archives: list[Path]) -> tuple[int, int]:
    """Drop the pages of archives; give the bytes that were in the page cache before and after. Raises SystemExit where they stay."""
    files = [file for archive in archives for file in row_files(archive)]
    gc.collect()
    before = cached_bytes(files)
    drop_pages(archives)
    after = cached_bytes(files)
    if after > RESIDENT_SHARE * size_of(files):
        raise SystemExit(f"{after:,} of {size_of(files):,} bytes stay in the page cache: somebody else has the files mapped")
    return before, after


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


def peers(archive: Path, cells: int, batch_size: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Give runs of others over random rows of the raw archive, those that are installed."""
    if find_spec("bionemo") is None or find_spec("bionemo.scdl") is None:
        print("bionemo-scdl is not installed: pip install 'scdl-gpu[bench]' to compare with it", file=sys.stderr)
        return
    from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset as Reference
    from bionemo.scdl.util.torch_dataloader_utils import collate_sparse_matrix_batch
    from torch.utils.data import DataLoader, Subset

    rows = np.random.default_rng(0).permutation(len(SingleCellMemMapDataset(archive)))[:cells].tolist()

    def random_rows() -> None:
        for _ in DataLoader(Subset(Reference(str(archive)), rows), batch_size=batch_size, collate_fn=collate_sparse_matrix_batch):
            pass

    yield "bionemo-scdl, random rows", random_rows
    if find_spec("scdataset") is None:
        return
    from scdataset import BlockShuffling, scDataset

    def blocks() -> None:
        dataset = scDataset(
            Reference(str(archive)),
            BlockShuffling(block_size=16),
            batch_size=batch_size,
            fetch_factor=16,
            fetch_callback=lambda data, numbers: [data[int(row)] for row in numbers],
            batch_callback=lambda fetched, numbers: collate_sparse_matrix_batch([fetched[int(k)] for k in numbers]),
        )
        for _ in itertools.islice(DataLoader(dataset, batch_size=None), cells // batch_size):
            pass

    yield "scDataset over bionemo-scdl, blocks of 16", blocks


# ---- comparing


def compare(archive: Path, others: dict[str, tuple[Callable[[], Any], int, Sequence[Path]]], arguments: argparse.Namespace) -> None:
    """Let alternatives over one archive take turns, and print. others: name -> run, cells of it, folders whose pages it reads."""
    files, window_bytes = row_files(archive), arguments.window << 20
    size_bytes, n_rows = size_of(files), len(SingleCellMemMapDataset(archive))
    extent_bytes = extent_bytes_of(window_bytes)
    sequential, extents = requests_of(files, BLOCK_BYTES), requests_of(files, extent_bytes, shuffle=True)
    ours = Epochs(archive, arguments.batch_size, window_bytes, arguments.output)
    kilo = extent_bytes >> 10
    runs: dict[str, tuple[Callable[[], Any], int, Sequence[Path]]] = {
        "dd, 1 thread": (lambda: read_directly(sequential, 1), n_rows, ()),
        "dd, 8 threads": (lambda: read_directly(sequential, 8), n_rows, ()),
        f"extents of {kilo:,} KiB, 8 threads": (lambda: read_directly(extents, 8), n_rows, ()),
        "GPUBatchLoader": (ours, n_rows, ()),
        WARM: (
            lambda: drain(GPUBatchLoader(archive, arguments.batch_size, device="cpu", windows=False, output=arguments.output)),
            n_rows,
            (),
        ),
        **others,
    }
    cold: list[tuple[int, int]] = []
    seconds: dict[str, list[float]] = {what: [] for what in runs}
    for turn in range(arguments.rounds + 1):  # the first, unmeasured one compiles
        for what, (run, _, folders) in runs.items():
            if what != WARM:
                cold.append(chill([archive, *folders]))
            start = time.perf_counter()
            run()
            if turn:
                seconds[what].append(time.perf_counter() - start)
    results = [
        bench.Result(what, tuple(seconds[what]), cells, size_bytes * cells // n_rows if what not in others or cells < n_rows else 0)
        for what, (_, cells, _) in runs.items()
    ]
    dd = [min(pair) for pair in zip(seconds["dd, 1 thread"], seconds["dd, 8 threads"], strict=True)]
    of_dd = statistics.median(best / own for best, own in zip(dd, seconds["GPUBatchLoader"], strict=True))
    limits = [max(pair) for pair in zip(dd, seconds[WARM], strict=True)]
    of_limit = statistics.median(least / own for least, own in zip(limits, seconds["GPUBatchLoader"], strict=True))
    facts = {"archive": archive.name, "output": arguments.output, "batch_size": arguments.batch_size}
    facts |= {"window_bytes": window_bytes, "extent_bytes": extent_bytes, "files_bytes": size_bytes}
    facts |= {"cached_before": max(before for before, _ in cold), "cached_after": max(after for _, after in cold)}
    for result in results:
        shares = {"of_dd": round(of_dd, 3), "of_limit": round(of_limit, 3), "notes": ours.notes[1:]}
        own = shares if result.what == "GPUBatchLoader" else {}
        print(bench.json_line(result, **facts, **own, cache="warm" if result.what == WARM else "cold"))
    note = ours.notes[-1]
    print(f"\n{archive.name}, {size_bytes / 1e9:.2f} GB, cold: {facts['cached_after']:,} bytes cached\n{bench.table(results)}")
    print(
        f"GPUBatchLoader: {100 * of_dd:.0f} % of dd, {100 * of_limit:.0f} % of the slower of dd and assembly; "
        f"reading {note['reading']:.2f} GB/s by {note['path']}, first batch after "
        f"{note['first_batch_seconds']:.2f} s, waited {note['waited_seconds']:.2f} s, at most {note['peak_bytes'] / 1e6:,.0f} MB\n",
        flush=True,
    )


# ---- more than memory


def copies(archive: Path, size_bytes: int) -> list[Path]:
    """Give as many copies of an archive as have so many bytes, made beside it once: pages of their own."""
    count = max(1, -(-size_bytes // size_of(row_files(archive))))
    found = [archive.with_name(f"{archive.name}.copy{number}") for number in range(count)]
    for path in found:
        if not path.exists():
            shutil.copytree(archive, path)
    return found


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
    cells, n_windows, most = 0, 0, 0
    with (
        mock.patch("scdl_gpu.windows.available_bytes", return_value=room),
        bench.PeakMemory(bench.resident_bytes) as memory,
        GPUBatchLoader([*paths], batch_size, device="cpu", windows=True, host_budget=budget) as loader,
    ):
        start, report = time.perf_counter(), loader.streaming
        if report is None:
            raise SystemExit(f"{loader!r} does not stream")
        for batch in loader:
            cells += int((~batch.is_padding).sum())
            if report.n_windows != n_windows:
                n_windows, most = report.n_windows, max(most, cached_bytes(files))
                if is_dropped:
                    forget(files)
        seconds = time.perf_counter() - start
        if cells != loader.shape[0]:
            raise SystemExit(f"{cells:,} of {loader.shape[0]:,} rows came")
    what = "pages dropped after each window" if is_dropped else "past the page cache"
    facts = {"path": report.path, "windows": n_windows, "peak_bytes": memory.growth_bytes, "most_cached": most}
    return bench.Result(what, (seconds,), cells, size_of(files)), facts | {"waited_seconds": round(report.seconds_waited, 3)}


def stream_more(archive: Path, arguments: argparse.Namespace) -> None:
    """Stream more bytes than memory is granted, past the page cache and through it, and print what was taken at most."""
    limit, paths = int(arguments.limit * 2**30), copies(archive, int(arguments.larger_than_memory * 2**30))
    files = [file for path in paths for file in row_files(path)]
    budget = min(2 * arguments.window << 20, limit // 2)
    for is_dropped in (False, True):
        before, after = chill(paths)
        room = size_of(files) + limit if is_dropped else limit
        result, facts = streamed(paths, files, budget, room=room, batch_size=arguments.batch_size, is_dropped=is_dropped)
        facts |= {"archive": archive.name, "files_bytes": size_of(files), "limit_bytes": limit, "host_budget": budget}
        print(bench.json_line(result, **facts, cached_before=before, cached_after=after))
        print(
            f"\n{archive.name}, {size_of(files) / 1e9:.2f} GB {result.what} ({facts['path']}): {result.gb_per_second:.2f} GB/s, "
            f"{result.per_second:,.0f} cells/s; memory of the process {facts['peak_bytes'] / 1e6:,.0f} MB at most, "
            f"of its files cached {facts['most_cached'] / 1e6:,.0f} MB\n",
            flush=True,
        )


def main() -> None:
    """Parse the arguments, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("packed", type=Path, nargs="?")
    parser.add_argument("--window", type=int, default=256, help="MiB of each of two windows")
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--output", choices=["csr", "dense"], default="csr")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--peer-cells", type=int, default=20_000, help="random rows that bionemo-scdl and scDataset read; 0: leave them out"
    )
    parser.add_argument("--annbatch", type=Path, help="the interpreter that has annbatch; SOURCE must be an h5ad file then")
    parser.add_argument("--larger-than-memory", type=float, metavar="GIB", help="stream so many GiB with little memory instead")
    parser.add_argument("--limit", type=float, default=2, help="GiB that the loader is told the node has, with --larger-than-memory")
    arguments = parser.parse_args()
    raw = archive_of(arguments.source)
    packed = arguments.packed or packed_of(raw)
    if arguments.larger_than_memory:
        for archive in (raw, packed):
            stream_more(archive, arguments)
        return
    n_rows = len(SingleCellMemMapDataset(raw))
    others: dict[str, tuple[Callable[[], Any], int, Sequence[Path]]] = {}
    if 0 < arguments.peer_cells < arguments.batch_size:
        parser.error(f"--peer-cells is {arguments.peer_cells}, expected 0 or at least a batch of {arguments.batch_size}")
    if arguments.peer_cells:
        cells = min(arguments.peer_cells, n_rows) // arguments.batch_size * arguments.batch_size
        others |= {what: (run, cells, ()) for what, run in peers(raw, cells, arguments.batch_size)}
    compare(packed, {}, arguments)
    if not arguments.annbatch:
        compare(raw, others, arguments)
        return
    store = arguments.source.with_suffix(".annbatch.zarr")
    with closing(Annbatch(arguments.annbatch, arguments.source, store, store.with_suffix(".log"))) as annbatch:
        asked = {"batch_size": arguments.batch_size, "output": arguments.output, "obs": False}
        others["annbatch"] = (lambda: annbatch.epoch(**asked), n_rows // arguments.batch_size * arguments.batch_size, ())
        compare(raw, others, arguments)


if __name__ == "__main__":
    main()
