"""GPUBatchLoader from end to end on a GPU: every placement and output, beside a CPU loader and what torch and CuPy have.

    python benchmarks/loader_gpu.py [--out FOLDER]      or, with everything else, make gpu-check

An archive of Tahoe-like rows (62,710 genes, about 1,450 nonzeros a row, uint16 columns and float32 values) is made on the
spot, ARCHIVE_BYTES of it. A figure is of SECONDS of whole shuffled epochs, the begin of each included; the first batch is
compared with SciPy. `microseconds` is the wall clock's for a batch; `consumer_microseconds` what the thread that
consumes is busy for, in bursts that never fill the queue of the device; `cpu_microseconds` what all threads together are.
Bytes are counted once: those stored (`read`), those made, and both (`moved`).
"""

import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import kernels_gpu
import numpy as np
import scipy.sparse as sp
import torch
from gpu_machine import Machine
from torch.utils.data import DataLoader

import scdl_gpu

Result = dict[str, Any]

ARCHIVE_BYTES = 2 << 30
SECONDS = 0.5
BURST, BURSTS = 50, 5
"""Batches of a burst: fewer than a device queues, and than it has room for."""
OUTPUTS: dict[str, dict[str, Any]] = {
    "csr": {},
    "dense float32": {"output": "dense"},
    "dense bfloat16": {"output": "dense", "dtype": torch.bfloat16},
}
SIZES = (64, 1_024, 8_192)
HOST_DENSE_SIZES = (64, 1_024)
"""Dense batches of 8,192 rows take 2 GB each, and every thread of the CPU would hold one in page-locked memory."""
SMALL_ROWS = 64


class Cells:
    """An archive of many copies of a base of rows, in a folder that goes away with the process."""

    def __init__(self, base: sp.csr_matrix, n_copies: int) -> None:
        from scdl_gpu.archive.features import ObservedFeatureIndex, VariableFeatureIndex
        from scdl_gpu.archive.writer import ArrayWriter, finish

        self.base, self.n_copies, self.n_rows = base, n_copies, n_copies * base.shape[0]
        columns, values = base.indices.astype(np.uint16), base.data
        self._folder = tempfile.TemporaryDirectory(dir=_roomy_folder(n_copies * (columns.nbytes + values.nbytes)))
        self.path = Path(self._folder.name) / "cells"
        self.path.mkdir()
        indptr = np.concatenate([[0], (np.arange(n_copies)[:, None] * base.nnz + base.indptr[1:]).ravel()]).astype(np.uint64)
        for name, array, times in (("row_ptr.npy", indptr, 1), ("col_ptr.npy", columns, n_copies), ("data.npy", values, n_copies)):
            with ArrayWriter(self.path / name, array.dtype) as writer:
                for _ in range(times):
                    writer.append(array)
        var, obs = VariableFeatureIndex(), ObservedFeatureIndex()
        var.append_features(self.n_rows, {"gene": np.arange(base.shape[1])})
        obs.append_features({"cell": np.arange(self.n_rows)})
        dtypes = {"row_ptr.npy": "uint64", "col_ptr.npy": "uint16", "data.npy": "float32"}
        finish(self.path, dtypes=dtypes, var=var, obs=obs, canonical=True)

    def bytes_of(self, output: str) -> tuple[float, float]:
        """Give how many bytes a row takes stored, and in a batch, on average."""
        nnz = self.base.nnz / self.base.shape[0]
        made = 8 * nnz if output == "csr" else self.base.shape[1] * (4 if "float32" in output else 2)
        return 6 * nnz, made

    def check(self, what: str, rows: Any, x: Any) -> None:
        """Compare some rows of a batch with SciPy. Raises ValueError."""
        numbers = np.asarray(rows.cpu() if isinstance(rows, torch.Tensor) else rows)
        expected = self.base[numbers[:SMALL_ROWS] % self.base.shape[0]].toarray()
        if not np.array_equal(_dense(x, expected.shape[0]), expected):
            raise ValueError(f"{what}: the batch is not what SciPy makes")


def _roomy_folder(size_bytes: int) -> str | None:
    """Prefer memory to a disk, whose writing would disturb what is measured."""
    shm = Path("/dev/shm")
    return str(shm) if shm.is_dir() and shutil.disk_usage(shm).free > 4 * size_bytes else None


def _dense(x: Any, n: int) -> np.ndarray:
    """Give the first n rows of a batch of torch, CuPy or SciPy; waits."""
    if isinstance(x, torch.Tensor):
        return (x.cpu().to_dense() if x.layout != torch.strided else x[:n].cpu())[:n].float().numpy()
    x = x.get() if hasattr(x, "get") else x
    return (x.toarray() if sp.issparse(x) else x)[:n]


@cache
def cells(bench: kernels_gpu.Bench) -> Cells:
    """Make the archive, once; what other steps hold in the memory of the device goes."""
    for held in ("resident", "pinned"):
        if held in vars(bench):
            vars(bench).pop(held).close()
    base = bench.base
    return Cells(base, max(2, ARCHIVE_BYTES // bench.machine.scale**2 // (6 * base.nnz)))


def _size(machine: Machine, batch_size: int) -> int:
    return max(4, batch_size // machine.scale)


def opened(bench: kernels_gpu.Bench, placement: str, output: str, batch_size: int) -> "scdl_gpu.GPUBatchLoader":
    """Make a loader; the budgets are all that is free."""
    path, device = cells(bench).path, bench.machine.device
    budgets: dict[str, Any] = {"memory_budget": 1.0, "host_budget": 1.0}
    return scdl_gpu.GPUBatchLoader(path, _size(bench.machine, batch_size), device=device, placement=placement, **OUTPUTS[output], **budgets)


def epochs(loader: Any) -> Iterator[Any]:
    """Give the batches of one epoch after the other."""
    while True:
        yield from loader


def served_in(machine: Machine, batches: Iterator[Any], seconds: float) -> tuple[int, float, float]:
    """Consume batches for some time; returns how many there were, the time that they took, and that of all threads of the CPU."""
    machine.synchronize()
    start, cpu_start, n = time.perf_counter(), time.process_time(), 0
    while n == 0 or time.perf_counter() - start < seconds:
        next(batches)
        n += 1
    cpu = time.process_time() - cpu_start
    machine.synchronize()
    return n, time.perf_counter() - start, cpu


def busy_seconds(machine: Machine, batches: Iterator[Any]) -> float:
    """Give how long the consuming thread works for a batch: the median of bursts."""
    times = []
    n, bursts = (2, 1) if machine.rehearsed else (BURST, BURSTS)
    for _ in range(bursts):
        machine.synchronize()
        start = time.thread_time()
        for _ in itertools.islice(batches, n):
            pass
        times.append((time.thread_time() - start) / n)
    return statistics.median(times)


def measured(bench: kernels_gpu.Bench, placement: str, output: str, batch_size: int) -> Result:
    """Measure one loader; what the machine has no room for is recorded."""
    machine, source = bench.machine, cells(bench)
    facts: Result = {"what": f"{output}, {placement}, {batch_size}", "placement": placement, "batch_size": batch_size}
    start = time.perf_counter()
    try:
        with opened(bench, placement, output, batch_size) as loader:
            facts["seconds_to_open"] = time.perf_counter() - start
            batches = epochs(loader)
            first = next(batches)
            machine.synchronize()
            source.check(facts["what"], first.rows, first.x)
            rows = len(first)
            del first
            served_in(machine, batches, 0.1 * SECONDS / machine.scale)
            n, seconds, cpu = served_in(machine, batches, SECONDS / machine.scale)
            busy = busy_seconds(machine, batches)
            batches.close()
    except (scdl_gpu.DeviceError, torch.OutOfMemoryError) as error:
        return facts | {"not_available": str(error)[:160]}
    read, made = source.bytes_of(output)
    figures = {"cells_per_second": n * rows / seconds, "microseconds": seconds / n * 1e6}
    figures |= {"consumer_microseconds": busy * 1e6, "cpu_microseconds": cpu / n * 1e6}
    for name, size in (("read", read), ("made", made), ("moved", read + made)):
        figures[f"{name}_gb_per_second"] = size * figures["cells_per_second"] / 1e9
    return facts | figures


def placed(placement: str, bench: kernels_gpu.Bench) -> list[Result]:
    """Measure all outputs and sizes of a placement, each beside the copy that bounds it."""
    found = []
    for output in OUTPUTS:
        for batch_size in HOST_DENSE_SIZES if placement == "host" and output != "csr" else SIZES:
            result = measured(bench, placement, output, batch_size)
            limit = {"device": "device_copy" if output == "csr" else "device_write"}.get(placement, "host_copy")
            counted = {"device": "moved", "pinned": "read", "host": "made"}[placement]
            if "cells_per_second" in result:
                result |= {"limit": limit, "percent_of_limit": 100 * result[f"{counted}_gb_per_second"] / bench.limits[limit]}
            found.append(result)
    return found


# ---- others, end to end: row numbers are drawn on the host


def rivals(bench: kernels_gpu.Bench) -> list[Result]:
    """Serve random batches of 1,024 rows as others do: CPU loaders and a copy, torch and CuPy on a matrix in the device's memory."""
    machine, source, found = bench.machine, cells(bench), []
    b = _size(machine, 1_024)
    for output in ("csr", "dense float32"):
        for what, serve in alternatives(bench, b, output).items():
            facts = {"what": f"{output}: {what}", "batch_size": b}
            try:
                batches = serve()
                rows, x = next(batches)
                machine.synchronize()
                if rows is not None:
                    source.check(what, rows, x)
                del x
                n, seconds, _ = served_in(machine, batches, SECONDS / machine.scale)
                batches.close()
            except (RuntimeError, ImportError, TypeError) as error:
                found.append({**facts, "not_available": str(error)[:160]})
                continue
            found.append({**facts, "cells_per_second": n * b / seconds, "microseconds": seconds / n * 1e6})
    return found


def alternatives(bench: kernels_gpu.Bench, b: int, output: str) -> dict[str, Callable[[], Iterator[tuple[Any, Any]]]]:
    """Give ways to batches on the device: each yields row numbers (None where nobody tells them) and what was made of them."""
    found: dict[str, Callable[[], Iterator[tuple[Any, Any]]]] = {
        "GPUBatchLoader, device": partial(_by_loader, bench, output),
        "GPUBatchLoader on the CPU, then .to()": partial(_by_cpu_loader, bench, b, output),
        "torch DataLoader, then .to()": partial(_by_torch_loader, bench, b, output),
    }
    crow, indices, data, shape = kernels_gpu.repeated(bench.machine, bench.base, cells(bench).n_copies)
    for what, open_matrix in kernels_gpu.selectors(crow, indices, data, shape).items():
        if "COO" not in what:
            found[f"{what}, rows from the host"] = partial(_by_selection, bench, b, output, open_matrix)
    return found


def _by_loader(bench: kernels_gpu.Bench, output: str) -> Iterator[tuple[Any, Any]]:
    with opened(bench, "device", output, 1_024) as loader:
        for batch in epochs(loader):
            yield batch.rows, batch.x


def _by_cpu_loader(bench: kernels_gpu.Bench, b: int, output: str) -> Iterator[tuple[Any, Any]]:
    loader = scdl_gpu.GPUBatchLoader(cells(bench).path, b, device="cpu", **OUTPUTS[output])
    for batch in epochs(loader):
        yield batch.rows, batch.to(bench.machine.torch_device).x


def _by_torch_loader(bench: kernels_gpu.Bench, b: int, output: str) -> Iterator[tuple[Any, Any]]:
    dataset = scdl_gpu.SingleCellMemMapDataset(cells(bench).path)
    loader = DataLoader(dataset, batch_size=b, shuffle=True, drop_last=True, collate_fn=scdl_gpu.collate_sparse_matrix_batch)
    for x in epochs(loader):
        there = x.to(bench.machine.torch_device)
        yield None, there.to_dense() if output != "csr" else there


def _by_selection(bench: kernels_gpu.Bench, b: int, output: str, open_matrix: Callable[[], Any]) -> Iterator[tuple[Any, Any]]:
    select, random = open_matrix(), np.random.default_rng(0)
    while True:
        order = random.permutation(cells(bench).n_rows)
        for start in range(0, order.size - b + 1, b):
            rows = order[start : start + b]
            x = select(bench.machine.tensor(rows))
            yield rows, x if output == "csr" else x.to_dense() if isinstance(x, torch.Tensor) else x.toarray()


# ---- correctness, and what sanitizers run


def small_loader(bench: kernels_gpu.Bench) -> list[Result]:
    """Serve an epoch of at most 64 rows from every placement, in every output, and compare each batch with SciPy."""
    found = []
    source = Cells(bench.base[: min(SMALL_ROWS // 2, bench.base.shape[0] // 2)], 2)
    for placement in ("device", "pinned", "host"):
        for output, options in OUTPUTS.items():
            with scdl_gpu.GPUBatchLoader(source.path, 10, device=bench.machine.device, placement=placement, **options) as loader:
                batches = list(loader)
                bench.machine.synchronize()
            for batch in batches:
                source.check(f"{output} from {placement}", batch.rows, batch.x)
            found.append({"what": f"{output}, {placement}", "checks": len(batches)})
    return found


STEPS: dict[str, Callable[[Any], list[Result]]] = {
    "small loader": small_loader,
    "loader device": partial(placed, "device"),
    "loader pinned": partial(placed, "pinned"),
    "loader host": partial(placed, "host"),
    "loader rivals": rivals,
}

if __name__ == "__main__":
    import gpu_check

    gpu_check.main(list(STEPS))
