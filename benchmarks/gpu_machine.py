"""Where gpu_check.py runs: a GPU, or the emulator for a rehearsal. Clocks, memory and facts of the machine.

Knows devices, not kernels. Times are medians, by CUDA events around several runs that rotate among inputs and outputs;
a graph of the same runs tells the device's time from the host's.
"""

import mmap
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

Run = Callable[[], Any]
PACKAGES = ("torch", "cupy-cuda13x", "cupy-cuda12x", "numba", "numpy", "scipy", "h5py", "kvikio-cu13")


class Machine:
    """What steps ask for; this part is the same for both kinds. device: as scdl_gpu.device has it."""

    rehearsed = False

    def __init__(self, device: Any, scale: int) -> None:
        self.device, self.launch, self.scale = device, device.launch, scale
        self.torch_device: torch.device = device.torch_device

    def tensor(self, array: Any) -> torch.Tensor:
        """Copy an array to the device; waits."""
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.torch_device)

    def empty(self, shape: Any, dtype: str) -> torch.Tensor:
        """Make a tensor full of rubbish: what is not written shows."""
        made = torch.empty(shape, dtype=getattr(torch, dtype), device=self.torch_device)
        made.view(torch.uint8).fill_(0xA5)
        return made

    def host_memory(self, size_bytes: int) -> torch.Tensor:
        """Make memory of the host that begins a page."""
        return torch.from_numpy(np.frombuffer(mmap.mmap(-1, -(-size_bytes // 4096) * 4096), np.uint8))

    def synchronize(self) -> None:
        """Wait until the device has done everything."""

    def seconds(self, runs: Sequence[Run], repeats: int = 7) -> float:
        """Time one run, on average over `runs`; the median of `repeats` passes."""
        raise NotImplementedError

    def graph_seconds(self, runs: Sequence[Run], repeats: int = 7) -> float:
        """Time one run without what the host adds to it. Raises RuntimeError where the runs cannot be captured."""
        raise NotImplementedError

    def host_seconds(self, run: Run, n: int = 200, repeats: int = 5) -> float:
        """Time what a run takes of the host, which does not wait; the queue of the device never fills."""
        run()
        times = []
        for _ in range(repeats):
            self.synchronize()
            start = time.perf_counter()
            for _ in range(n):
                run()
            times.append((time.perf_counter() - start) / n)
        self.synchronize()
        return statistics.median(times)

    def facts(self) -> dict[str, Any]:
        """Say what the machine is."""
        versions = {name: metadata.version(name) for name in PACKAGES if _is_installed(name)}
        return {"python": platform.python_version(), "host": platform.processor() or platform.machine(), **versions}


class CudaMachine(Machine):
    """torch's current GPU."""

    def __init__(self) -> None:
        from scdl_gpu.device import CudaDevice

        super().__init__(CudaDevice(), 1)

    def synchronize(self) -> None:
        """Wait for the GPU."""
        torch.cuda.synchronize()  # waits

    def seconds(self, runs: Sequence[Run], repeats: int = 7) -> float:
        """Time by CUDA events."""
        _once(runs)
        _once(runs)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in events:
            start.record()
            _once(runs)
            end.record()
        self.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3 / len(runs)

    def graph_seconds(self, runs: Sequence[Run], repeats: int = 7) -> float:
        """Time the replay of a CUDA graph."""
        _once(runs)
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            _once(runs)
        return self.seconds([graph.replay], repeats) / len(runs)

    def facts(self) -> dict[str, Any]:
        """Add the GPU and what its driver says."""
        gpu = torch.cuda.get_device_properties(0)
        words = "name,driver_version,memory.total,pcie.link.gen.max,pcie.link.width.max,clocks.max.sm,clocks.max.memory"
        return {
            **super().facts(),
            "gpu": gpu.name,
            "compute_capability": f"{gpu.major}.{gpu.minor}",
            "multiprocessors": gpu.multi_processor_count,
            "l2_bytes": getattr(gpu, "L2_cache_size", None),
            "memory_bytes": gpu.total_memory,
            "cuda": torch.version.cuda,
            "nvidia_smi": _said(f"nvidia-smi --query-gpu={words} --format=csv,noheader"),
        }


class Rehearsal(Machine):
    """The emulator: every step with tiny data, so that each line has run once before there is a GPU. Its times mean nothing."""

    rehearsed = True

    def __init__(self) -> None:
        from emulator.device import EmulatedDevice
        from emulator.launcher import Emulator

        super().__init__(EmulatedDevice(launcher=Emulator(1)), 1024)

    def synchronize(self) -> None:
        """Do what is enqueued."""
        self.device.record().wait()

    def seconds(self, runs: Sequence[Run], repeats: int = 1) -> float:
        """Time by the host's clock."""
        start = time.perf_counter()
        _once(runs)
        return (time.perf_counter() - start) / len(runs)

    def graph_seconds(self, runs: Sequence[Run], repeats: int = 1) -> float:
        """Time by the host's clock: there are no graphs."""
        return self.seconds(runs)

    def host_seconds(self, run: Run, n: int = 2, repeats: int = 1) -> float:
        """Time by the host's clock."""
        return super().host_seconds(run, 2, 1)

    def facts(self) -> dict[str, Any]:
        """Say that it is none."""
        return {**super().facts(), "gpu": "none: rehearsed on the emulator"}


class CaseMemory:
    """The `Memory` of tests/emulator/cases.py on a machine."""

    def __init__(self, machine: Machine) -> None:
        self._machine, self.launch = machine, machine.launch

    def put(self, array: Any, padded_to: int = 1) -> torch.Tensor:
        """Copy to the device; shards into memory padded as kernels need it."""
        if array.size == 0:
            return torch.empty(0, dtype=torch.int32)
        if padded_to == 1:
            return self._machine.tensor(array)
        block = self._machine.device.allocate(array.nbytes)
        block.zero_()  # kernels load the padding too, and initcheck would say so
        block[: array.nbytes].copy_(torch.from_numpy(array.view(np.uint8)))
        return block

    def empty(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        """Make a tensor full of rubbish."""
        return self._machine.empty(shape, dtype)

    def get(self, array: torch.Tensor) -> Any:
        """Bring a tensor back; waits."""
        host = array.cpu()
        return host.view(torch.int16).numpy().view(np.uint16) if array.dtype == torch.bfloat16 else host.numpy()

    def address(self, array: torch.Tensor) -> int:
        """Give where the tensor begins."""
        return array.data_ptr()


def _once(runs: Sequence[Run]) -> None:
    for run in runs:
        run()


def _said(command: str) -> str | None:
    words = command.split()
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip() if shutil.which(words[0]) else None


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
