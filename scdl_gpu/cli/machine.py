"""What this machine offers: facts, piece by piece, each with what to install or change where it is missing.

Knows where the facts are found, not how they are printed. Nothing is changed, and no piece is needed for another: what
cannot be asked is a finding, not an error. That the paths work is not concluded from the pieces: `trial` tries them.
"""

import ctypes
import os
import platform
import re
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from scdl_gpu.cli import disk
from scdl_gpu.cli.report import size

State = Literal["ok", "lacking", "fault"]
"""lacking: done without, more slowly or not on a GPU; fault: what is there does not work."""

DRIVER_FILE = Path("/proc/driver/nvidia/version")
GPUDIRECT_FILE = Path("/proc/driver/nvidia-fs/version")
CGROUPS = Path("/sys/fs/cgroup")
PACKAGES = ("numpy", "numba", "torch", "h5py", "anndata", "scipy", "pandas", "pyarrow")
SLOW_BYTES_PER_SECOND = 500e6
"""Of cells of 1,500 nonzeros, at 8 bytes each, that are some 40,000 a second; below it a loader waits for the disk."""
FOR_GPU = ("driver", "CuPy", "reading", "GPUDirect", "GPU path")
OLDEST_CAPABILITY = (7, 5)
"""The oldest generation that the kernels are compiled for in the tests."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One piece. words: for people; facts: the same for programs; cure: what to install or change."""

    name: str
    state: State
    words: str
    cure: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def is_for_gpu(self) -> bool:
        """Whether the piece matters on a machine with a GPU only."""
        return self.name in FOR_GPU


def findings(directory: Path) -> Iterator[Finding]:
    """Look at every piece; `directory` is where the speed of the disk is measured."""
    yield system()
    yield cores()
    yield memory()
    yield locked()
    yield from storage(directory)
    yield driver()
    yield torch_build()
    yield from gpus()
    yield cupy()
    yield kvikio()
    yield gpudirect()


def system() -> Finding:
    """Tell the system, Python, and the versions of what this package works with."""
    versions = {name: _version(name) for name in ("scdl-gpu", *PACKAGES)}
    missing = [name for name, version in versions.items() if version is None and name != "scdl-gpu"]
    words = f"{platform.system()} {platform.release()} {platform.machine()}, Python {platform.python_version()}"
    words += "".join(f", {name} {version}" for name, version in versions.items() if version)
    facts = {"system": platform.system(), "machine": platform.machine(), "python": platform.python_version(), "versions": versions}
    if sys.platform != "linux":
        return Finding("system", "fault", words, "scdl-gpu runs on Linux and nothing else", facts)
    if missing:
        return Finding("system", "fault", f"{words}; without {', '.join(missing)}", f"pip install {' '.join(missing)}", facts)
    return Finding("system", "ok", words, facts=facts)


def cores() -> Finding:
    """Tell how many cores this process may use: its affinity, and the quota of its cgroup."""
    usable, quota = len(os.sched_getaffinity(0)), _cpu_quota()
    facts = {"cores": os.cpu_count(), "usable": usable, "quota": quota}
    words = f"{usable} of {os.cpu_count()}" if usable != os.cpu_count() else f"{usable}"
    if quota is not None and quota < usable:
        cure = f"a cgroup limits this process to {quota:g} cores: threads beyond that wait; raise the limit, or set OMP_NUM_THREADS"
        return Finding("cores", "lacking", f"{words}, limited to {quota:g} by a cgroup", cure, facts)
    return Finding("cores", "ok", words, facts=facts)


def memory() -> Finding:
    """Tell the memory of the host that could be had, limits of containers counted."""
    from scdl_gpu.arena import available_bytes

    total, available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), available_bytes()
    words = f"{size(available)} available of {size(total)}; half of it is the default host_budget"
    return Finding("memory", "ok", words, facts={"available_bytes": available, "total_bytes": total})


def locked() -> Finding:
    """Tell the limit of page-locked memory. NVIDIA's driver locks memory itself, so `trial` tries it instead of believing this."""
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    facts = {name: None if limit == resource.RLIM_INFINITY else limit for name, limit in (("soft_bytes", soft), ("hard_bytes", hard))}
    words = "unlimited" if facts["soft_bytes"] is None else size(soft)
    return Finding("ulimit -l", "ok", f"{words} of page-locked memory for other users of it than CUDA", facts=facts)


def storage(directory: Path) -> Iterator[Finding]:
    """Tell what is free in `directory`, and how fast its disk is."""
    try:
        free = disk.free_bytes(directory)
        speed = disk.measure(directory, min(disk.PROBE_BYTES, free // 4 // disk.EXTENT_BYTES * disk.EXTENT_BYTES))
    except OSError as error:
        cure = "name a directory that exists, can be written to and has space: scdl-gpu doctor DIR"
        yield Finding("disk", "lacking", f"{directory}: not measured ({error.strerror or error})", cure, {"directory": str(directory)})
        return
    read, write = speed.read_bytes_per_second, speed.write_bytes_per_second
    how = "past the page cache" if speed.is_direct else "through the page cache: O_DIRECT is refused here, so the disk itself may be slower"
    words = f"{directory}: reads {size(int(read))}/s, writes {size(int(write))}/s ({how}); {size(free)} free"
    facts = {
        "directory": str(directory),
        "free_bytes": free,
        "read_bytes_per_second": read,
        "write_bytes_per_second": write,
        "probe_bytes": speed.size_bytes,
        "direct": speed.is_direct,
    }
    if read < SLOW_BYTES_PER_SECOND:
        cure = "keep archives on a local NVMe, or pack them (scdl-gpu pack): a fifth to a tenth of the bytes have to be read"
        yield Finding("disk", "lacking", words, cure, facts)
    else:
        yield Finding("disk", "ok", words, facts=facts)


def driver() -> Finding:
    """Tell the driver of the GPU, and up to which CUDA it goes, by libcuda itself."""
    version = _driver_version()
    supports = _driver_cuda()
    facts = {"version": version, "cuda": supports}
    if supports is None:
        if version is None:
            return Finding("driver", "lacking", "none: libcuda.so.1 cannot be loaded", "install NVIDIA's driver", facts)
        cure = "the driver is loaded but its library is not there: in a container start it with --gpus all (NVIDIA Container Toolkit)"
        return Finding("driver", "fault", f"{version}, but libcuda.so.1 cannot be loaded", cure, facts)
    return Finding("driver", "ok", f"{version or 'version unknown'}, CUDA up to {supports}", facts=facts)


def torch_build() -> Finding:
    """Tell the CUDA that torch was built for, and whether driver and build go together."""
    import torch

    built, supports = torch.version.cuda, _driver_cuda()
    facts = {"version": str(torch.__version__), "cuda": built, "available": torch.cuda.is_available(), "threads": torch.get_num_threads()}
    words = f"{torch.__version__}, {torch.get_num_threads()} threads, built for {f'CUDA {built}' if built else 'the CPU only'}"
    if facts["available"] or supports is None:
        return Finding("torch", "ok", words, facts=facts)
    if built is None:
        return Finding("torch", "fault", words, "there is a driver: install the build of torch for CUDA (pytorch.org says how)", facts)
    if int(built.split(".")[0]) > int(supports.split(".")[0]):
        cure = f"the driver goes up to CUDA {supports}: update it, or install the build of torch for CUDA {supports.split('.')[0]}"
        return Finding("torch", "fault", words, cure, facts)
    cure = "torch finds no GPU though there is a driver: see `nvidia-smi`, CUDA_VISIBLE_DEVICES, and whether this user may use /dev/nvidia*"
    return Finding("torch", "fault", words, cure, facts)


def gpus() -> Iterator[Finding]:
    """Tell every GPU that torch finds."""
    import torch

    if not torch.cuda.is_available():
        cure = 'batches are made on the CPU; device="cuda" is refused' if _driver_cuda() is None else "see driver and torch"
        yield Finding("GPU", "lacking", "none", cure, {"count": 0})
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        capability = torch.cuda.get_device_capability(index)
        name = torch.cuda.get_device_name(index)
        facts = {"index": index, "name": name, "free_bytes": free, "total_bytes": total, "capability": list(capability)}
        words = f"cuda:{index} {name}, {size(free)} free of {size(total)}, compute capability {'.'.join(map(str, capability))}"
        if capability < OLDEST_CAPABILITY:
            cure = f"older than {'.'.join(map(str, OLDEST_CAPABILITY))}, for which kernels are compiled in the tests; it may work"
            yield Finding("GPU", "fault", words, cure, facts)
        else:
            yield Finding("GPU", "ok", words, facts=facts)


def cupy() -> Finding:
    """Tell CuPy's version, or what to install."""
    from scdl_gpu.device import cupy_version
    from scdl_gpu.errors import DeviceError

    try:
        version = cupy_version()
    except DeviceError as error:
        return Finding("CuPy", "lacking", "not there", str(error).partition(": ")[2], {"version": None})
    return Finding("CuPy", "ok", version, facts={"version": version})


def kvikio() -> Finding:
    """Tell how extents of files are read."""
    from scdl_gpu.reader import path_in_use, reaches_device

    words = path_in_use()
    facts = {"path": words, "version": _version("kvikio-cu13") or _version("kvikio-cu12"), "reaches_device": reaches_device()}
    if reaches_device():
        return Finding("reading", "ok", words, facts=facts)
    return Finding("reading", "lacking", words, f'beside CuPy: pip install ".[{_extra()}]" in a checkout', facts)


def gpudirect() -> Finding:
    """Tell whether GPUDirect Storage can be had: the kernel module, and what kvikio made of it."""
    from scdl_gpu.reader import path_in_use

    module, words = GPUDIRECT_FILE.exists(), path_in_use()
    facts = {"module": module, "in_use": "GPUDirect" in words}
    if facts["in_use"]:
        return Finding("GPUDirect", "ok", "kvikio uses it where the file system has it", facts=facts)
    if module:
        cure = "kvikio does not use it: see KVIKIO_COMPAT_MODE and cufile.json (CUFILE_ENV_PATH_JSON), and gdscheck of the CUDA toolkit"
        return Finding("GPUDirect", "lacking", "the module nvidia_fs is loaded, and not in use", cure, facts)
    cure = (
        "reads go through memory of the host; for GPUDirect Storage install nvidia-gds, load nvidia_fs, and use XFS or ext4 on local NVMe"
    )
    return Finding("GPUDirect", "lacking", "no: the module nvidia_fs is not loaded", cure, facts)


def _extra() -> str:
    """Name the extra of this package for the CUDA that torch was built for."""
    import torch

    return f"cuda{(torch.version.cuda or '13').split('.')[0]}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _driver_version() -> str | None:
    try:
        found = re.search(r"(\d+\.\d+(?:\.\d+)?)", DRIVER_FILE.read_text())
    except OSError:
        return None
    return found[1] if found else None


def _driver_cuda() -> str | None:
    """Ask libcuda which CUDA it goes up to, None where there is no driver; that initialises no device."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
        number = ctypes.c_int(0)
        if library.cuDriverGetVersion(ctypes.byref(number)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return f"{number.value // 1000}.{number.value % 1000 // 10}" if number.value else None


def _cpu_quota() -> float | None:
    """Return the cores that the cgroups over this process allow in all, None without a limit (cgroup v2)."""
    quotas = []
    group = CGROUPS / _own_cgroup()
    for folder in (group, *group.parents):
        if not folder.is_relative_to(CGROUPS):
            break
        try:
            limit, period = (folder / "cpu.max").read_text().split()
        except (OSError, ValueError):  # no such controller here
            continue
        if limit != "max":
            quotas.append(int(limit) / int(period))
    return min(quotas, default=None)


def _own_cgroup() -> str:
    try:
        found = re.search(r"^0::/(.*)$", Path("/proc/self/cgroup").read_text(), re.MULTILINE)
    except OSError:
        return ""
    return found[1] if found else ""
