"""Rows through each path of the loader, from a matrix to batches: what works is tried, not concluded.

Knows one small matrix and what its batches must be. It goes through conversion, packing, the kernels and the loader, as data
of a user would; the first batch compiles what a machine has not compiled yet, and shows whether that can be kept.
"""

import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scdl_gpu.cli.machine import Finding
from scdl_gpu.errors import ScdlError

if TYPE_CHECKING:
    from scdl_gpu.device import Device

N_ROWS, N_VARS, BATCH_SIZE = 100, 300, 32
REFUSALS = (ScdlError, ValueError, OSError, ImportError, RuntimeError)
"""RuntimeError is what Numba raises where it can keep no code, and torch and CuPy where a device fails."""
CACHE_CURE = "set NUMBA_CACHE_DIR to a directory that can be written to, so that kernels are compiled once a machine"


def try_cpu() -> Finding:
    """Convert, pack and iterate on the CPU; the finding says what failed."""
    start = time.perf_counter()
    try:
        _iterate("cpu", "host")
        kept = cache_directory()
    except REFUSALS as error:
        cure = CACHE_CURE if "cache" in str(error) else "see the message; reinstall what it names"
        return Finding("CPU path", "fault", f"does not work: {_line(error)}", cure, {"works": False})
    seconds = time.perf_counter() - start
    facts = {"works": True, "seconds": seconds, "numba_cache": None if kept is None else str(kept)}
    words = f"works: converted, packed, and right batches, in {seconds:.1f} s"
    if kept is None or not os.access(kept, os.W_OK):
        return Finding("CPU path", "lacking", f"{words}; compiled kernels are not kept", CACHE_CURE, facts)
    return Finding("CPU path", "ok", f"{words}; compiled kernels are kept in {kept}", facts=facts)


def try_device(device: "str | Device" = "cuda", placements: Iterable[str] = ("device", "pinned", "host")) -> Finding:
    """Iterate on a GPU, with rows in each placement; the finding says what failed, and where."""
    works: dict[str, bool] = {}
    faults, start = [], time.perf_counter()
    for placement in placements:
        try:
            _iterate(device, placement)
            works[placement] = True
        except REFUSALS as error:
            works[placement] = False
            faults.append(f"{placement}: {_line(error)}")
    facts = {"works": all(works.values()), "placements": works, "seconds": time.perf_counter() - start}
    if faults:
        return Finding("GPU path", "fault", f"does not work ({'; '.join(faults)})", 'see the messages; until then device="cpu"', facts)
    return Finding("GPU path", "ok", f"works: right batches with rows placed {', '.join(works)}, in {facts['seconds']:.1f} s", facts=facts)


def no_device() -> Finding:
    """Say that there is no GPU to try."""
    return Finding("GPU path", "lacking", "not tried: there is no GPU", facts={"works": False})


def cache_directory() -> Path | None:
    """Return where Numba keeps the kernels of this package, None where it keeps none."""
    from scdl_gpu.kernels import cpu

    path = cpu.gather_csr.stats.cache_path
    return Path(path) if path else None


def _iterate(device: "str | Device", placement: str) -> None:
    """Make a raw and a packed archive of a matrix and take all batches of both; ScdlError where one is wrong."""
    import numpy as np
    import scipy.sparse

    from scdl_gpu.convert import convert_h5ad
    from scdl_gpu.loader import GPUBatchLoader

    random = np.random.default_rng(0)
    counts = random.integers(1, 400, (N_ROWS, N_VARS)) * (random.random((N_ROWS, N_VARS)) < 0.1)
    matrix = scipy.sparse.csr_matrix(counts.astype(np.float32))
    with tempfile.TemporaryDirectory(prefix="scdl-gpu-doctor-") as folder:
        for packed in (False, True):
            archive = convert_h5ad(matrix, Path(folder) / f"{packed}", packed=packed)
            with GPUBatchLoader(archive, BATCH_SIZE, device=device, placement=placement, output="dense") as loader:
                batches = list(loader)
                if not isinstance(device, str):
                    device.record().wait()  # waits: `cpu()` of a batch does so for torch's devices only
                for batch in batches:
                    _compare(batch, counts)


def _compare(batch: Any, counts: Any) -> None:
    import numpy as np

    if not np.array_equal(batch.x.cpu().numpy(), counts[batch.rows.cpu().numpy()]):
        raise ScdlError("a batch differs from its rows: please report it, with what `scdl-gpu doctor --json` prints")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
