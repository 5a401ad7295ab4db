"""One GPU: its memory, its stream, its launches, and page-locked memory that it can read.

Knows torch's current stream and CuPy's runtime calls, not rows or batches. Everything that the cuda backend does to a
device goes through the few methods of `Device`, so that tests put memory of the host and an emulator in its place.
torch owns all memory: CuPy's pool ignores `record_stream`, and would give away what torch still reads.
"""

import contextlib
import importlib
import logging
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, cast

import torch

from scdl_gpu.arguments import shown, whole
from scdl_gpu.errors import DeviceError
from scdl_gpu.kernels.shards import ALIGNMENT

logger = logging.getLogger(__name__)

PIN_BYTES = 32 << 30
"""Page-locked at one go: drivers since r580 refuse 512 GiB, and 64 GiB is known to work."""
PORTABLE, MAPPED = 1, 2
"""cudaHostRegisterPortable, cudaHostRegisterMapped."""
SHARED_BYTES = 2 << 20
"""Memory that other processes open is a multiple of this: the driver gives smaller pieces out of blocks that it shares as a whole."""
PEER_ACCESS = 1
"""cudaIpcMemLazyEnablePeerAccess."""


class Event(Protocol):
    """A point in the order of a stream."""

    def is_done(self) -> bool:
        """Tell whether all that was enqueued before is done, without waiting."""

    def wait(self) -> None:
        """Wait until it is; counted in `Device.waits`."""


class Device(Protocol):
    """What the cuda backend asks of a device. Nothing waits, but `memory`, `Event.wait` and giving memory back."""

    name: str
    torch_device: torch.device
    waits: int

    def memory(self) -> tuple[int, int]:
        """Return the free and the total bytes of the device's memory."""

    def empty(self, shape: int | Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Make a tensor on the device, not initialised; torch recycles it in stream order."""

    def allocate(self, size_bytes: int) -> torch.Tensor:
        """Make uint8 on the device, `size_bytes` rounded up to ALIGNMENT, and aligned to it. Raises DeviceError."""

    def staging(self, size_bytes: int) -> torch.Tensor:
        """Make (size_bytes,) uint8 in page-locked memory of the host, aligned to at least 64 bytes. Raises DeviceError."""

    def upload(self, host: torch.Tensor, device: torch.Tensor) -> None:
        """Copy page-locked memory to the device in stream order; `host` must not change before an event recorded after it."""

    def download(self, device: torch.Tensor, host: torch.Tensor) -> None:
        """Copy from the device to page-locked memory in stream order; it is there after an event recorded after it."""

    def pin(self, memory: torch.Tensor) -> int:
        """Page-lock `memory`, (n,) uint8 from a page's begin, and return the address kernels read it at. Raises DeviceError."""

    def unpin(self, memory: torch.Tensor) -> None:
        """Undo `pin`; no kernel may be reading."""

    def bus_id(self) -> str:
        """Name the device as every process of this node does."""

    def reaches(self, bus_id: str) -> bool:
        """Tell whether kernels here can read the memory of another device, as far as it can be known before."""

    def shareable(self, size_bytes: int) -> torch.Tensor:
        """Make at least `size_bytes` uint8 on the device, which other processes may open, aligned to ALIGNMENT. Raises DeviceError."""

    def share(self, memory: torch.Tensor) -> bytes:
        """Give the handle by which other processes open what `shareable` made. Raises DeviceError."""

    def open_shared(self, handle: bytes) -> int:
        """Return the address at which kernels here read memory that another process shares. Raises DeviceError."""

    def close_shared(self, address: int) -> None:
        """Undo `open_shared`; no kernel may be reading."""

    def launch(self, name: str, grid: Sequence[int], block: Sequence[int], args: Sequence[int | float], shared_bytes: int = 0) -> None:
        """Enqueue a kernel on torch's current stream; see kernels/gpu.py."""

    def record(self) -> Event:
        """Mark the present end of the current stream."""

    def aside(self) -> contextlib.AbstractContextManager[None]:
        """Let what this thread enqueues meanwhile go to a second stream, beside the batches."""


MEANT = 'expected "auto", "cpu", "cuda", "cuda:N" or the number N of a GPU'


def device_of(device: "str | int | torch.device | Device") -> "Device | None":
    """Return the device that is meant; None is the CPU. "auto" takes a GPU where torch finds one, and nothing else does.

    A number is that of a GPU, as for torch. Raises ValueError for another kind of device, TypeError for what is no device,
    DeviceError where a GPU is asked for and none is there.
    """
    if not isinstance(device, str | torch.device):
        if isinstance(getattr(device, "torch_device", None), torch.device):
            return cast(Device, device)
        try:
            return CudaDevice(whole("device", device, 0))
        except TypeError as error:
            raise TypeError(f"device is {shown(device)}, {MEANT}") from error
    if device == "auto":
        return CudaDevice() if torch.cuda.is_available() else None
    try:
        meant = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {str(device)!r} is unknown, {MEANT}") from error
    if meant.type == "cpu":
        return None
    if meant.type != "cuda":
        raise ValueError(f"device {str(device)!r} cannot make batches, {MEANT}")
    return CudaDevice(meant.index)


class CudaDevice:
    """A GPU. index: torch's number of it; None is torch's current one. Raises DeviceError where it or CuPy is missing."""

    def __init__(self, index: int | None = None) -> None:
        if not torch.cuda.is_available():
            raise DeviceError(f'torch {torch.__version__} finds no GPU; see `nvidia-smi`, or choose device="cpu"')
        self.index = torch.cuda.current_device() if index is None else index
        if not 0 <= self.index < torch.cuda.device_count():
            raise DeviceError(f"cuda:{self.index} is not there: torch finds {torch.cuda.device_count()} GPUs")
        self.torch_device = torch.device("cuda", self.index)
        self.name = f"{self.torch_device} ({torch.cuda.get_device_name(self.index)})"
        self.waits = 0
        self._aside: torch.cuda.Stream | None = None
        self._cupy = _cupy()
        self._launcher = importlib.import_module("scdl_gpu.kernels.gpu").GpuLauncher()

    def memory(self) -> tuple[int, int]:
        """Return free and total bytes, after torch has given back what it keeps unused."""
        with torch.cuda.device(self.index):
            torch.cuda.empty_cache()  # waits
        free, total = torch.cuda.mem_get_info(self.index)
        return int(free), int(total)

    def empty(self, shape: int | Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Make a tensor by torch's caching allocator, which aligns to 512 bytes."""
        return torch.empty(shape, dtype=dtype, device=self.torch_device)

    def allocate(self, size_bytes: int) -> torch.Tensor:
        """Make memory by torch's caching allocator."""
        try:
            return self.empty(padded(size_bytes), torch.uint8)
        except torch.OutOfMemoryError as error:
            free, total = torch.cuda.mem_get_info(self.index)
            raise DeviceError(
                f"{self.name} has {size_words(free)} of {size_words(total)} free, {size_words(size_bytes)} were asked for; "
                f'free some, or choose placement="pinned" or "host"'
            ) from error

    def staging(self, size_bytes: int) -> torch.Tensor:
        """Make page-locked memory by torch's allocator of it, which rounds up to a power of two and recycles."""
        try:
            return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            raise DeviceError(f"the host could not page-lock {size_words(size_bytes)} for copies to {self.name}: {error}") from error

    def upload(self, host: torch.Tensor, device: torch.Tensor) -> None:
        """Enqueue the copy on the current stream."""
        device.copy_(host, non_blocking=True)

    def download(self, device: torch.Tensor, host: torch.Tensor) -> None:
        """Enqueue the copy on the current stream."""
        host.copy_(device, non_blocking=True)

    def pin(self, memory: torch.Tensor) -> int:
        """Register `memory` in pieces of PIN_BYTES; after a failure no piece is registered."""
        runtime, pinned = self._cupy.cuda.runtime, []
        with self._cupy.cuda.Device(self.index):
            try:
                for start, size_bytes in _pieces(memory):
                    runtime.hostRegister(start, size_bytes, PORTABLE | MAPPED)
                    pinned.append(start)
                addresses = [int(runtime.pointerGetAttributes(start).devicePointer) for start in pinned]
                _check_contiguous(addresses, pinned)
            except (runtime.CUDARuntimeError, DeviceError) as error:
                for start in pinned:
                    runtime.hostUnregister(start)
                raise DeviceError(
                    f"the host page-locked {size_words(len(pinned) * PIN_BYTES)} of {size_words(memory.numel())} for {self.name}, "
                    f'then failed: {error}; choose placement="host", or free memory of the host'
                ) from error
        return addresses[0]

    def unpin(self, memory: torch.Tensor) -> None:
        """Unregister every piece; a failure is logged, since the memory goes away all the same."""
        runtime = self._cupy.cuda.runtime
        with self._cupy.cuda.Device(self.index):
            for start, _ in _pieces(memory):
                try:
                    runtime.hostUnregister(start)
                except runtime.CUDARuntimeError as error:
                    logger.warning("%s: page-locked memory at %#x could not be released: %s", self.name, start, error)

    def bus_id(self) -> str:
        """Give the address on the PCI bus."""
        return str(self._cupy.cuda.runtime.deviceGetPCIBusId(self.index))

    def reaches(self, bus_id: str) -> bool:
        """Ask for peer access; a GPU that this process does not see is only found out about when its memory is opened."""
        runtime = self._cupy.cuda.runtime
        try:
            other = runtime.deviceGetByPCIBusId(bus_id)
        except runtime.CUDARuntimeError:
            return True
        return other == self.index or bool(runtime.deviceCanAccessPeer(self.index, other))

    def shareable(self, size_bytes: int) -> torch.Tensor:
        """Make memory by cudaMalloc itself: a handle leads to the begin of an allocation, and torch cuts tensors out of larger ones.

        It is no output, which torch would have to own, nor of a pool; it is freed, waiting for the device, with the last view of it.
        """
        size_bytes = max(1, -(-size_bytes // SHARED_BYTES)) * SHARED_BYTES
        self.memory()  # lets torch give back what it does not use
        return torch.as_tensor(_Allocation(self, size_bytes, self._cupy), device=self.torch_device)

    def share(self, memory: torch.Tensor) -> bytes:
        """Make a handle of CUDA IPC."""
        with self._ipc("shared"):
            return bytes(self._cupy.cuda.runtime.ipcGetMemHandle(memory.data_ptr()))

    def open_shared(self, handle: bytes) -> int:
        """Open a handle of CUDA IPC, with peer access where the memory is another GPU's."""
        with self._ipc("opened"):
            return int(self._cupy.cuda.runtime.ipcOpenMemHandle(handle, PEER_ACCESS))

    def close_shared(self, address: int) -> None:
        """Close a handle of CUDA IPC; a failure is logged, since the mapping ends with the process all the same."""
        runtime = self._cupy.cuda.runtime
        try:
            with self._cupy.cuda.Device(self.index):
                runtime.ipcCloseMemHandle(address)
        except runtime.CUDARuntimeError as error:
            logger.warning("%s: memory of another process at %#x could not be closed: %s", self.name, address, error)

    @contextlib.contextmanager
    def _ipc(self, what: str) -> Iterator[None]:
        """Make this the current device, and DeviceErrors of what CUDA IPC raises."""
        try:
            with self._cupy.cuda.Device(self.index):
                yield
        except self._cupy.cuda.runtime.CUDARuntimeError as error:
            raise DeviceError(
                f"memory could not be {what} by {self.name} through CUDA IPC: {error}; see `nvidia-smi topo -p2p r` for GPUs that reach "
                f'each other, let containers share IPC and PID namespaces, or choose placement="pinned"'
            ) from error

    def launch(self, name: str, grid: Sequence[int], block: Sequence[int], args: Sequence[int | float], shared_bytes: int = 0) -> None:
        """Enqueue a kernel on torch's current stream of this device; torch and CuPy each have a current device of their own."""
        with torch.cuda.device(self.index), self._cupy.cuda.Device(self.index):
            self._launcher.launch(name, grid, block, args, shared_bytes)

    def record(self) -> Event:
        """Record an event on torch's current stream of this device."""
        return _CudaEvent(self)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Make a second stream the current one of this thread; it is made once."""
        if self._aside is None:
            self._aside = torch.cuda.Stream(self.index)  # type: ignore[no-untyped-call]
        with torch.cuda.device(self.index), torch.cuda.stream(self._aside):
            yield


class _Allocation:
    """Memory of cudaMalloc, for torch to make a tensor of, which keeps this alive."""

    def __init__(self, device: CudaDevice, size_bytes: int, cupy: Any) -> None:
        runtime = cupy.cuda.runtime
        try:
            with cupy.cuda.Device(device.index):
                address = int(runtime.malloc(size_bytes))
        except runtime.CUDARuntimeError as error:
            free, total = torch.cuda.mem_get_info(device.index)
            raise DeviceError(
                f"{device.name} has {size_words(free)} of {size_words(total)} free, {size_words(size_bytes)} were asked for: {error}"
            ) from error
        self.__cuda_array_interface__ = {"shape": (size_bytes,), "typestr": "|u1", "data": (address, False), "version": 3}
        weakref.finalize(self, runtime.free, address).atexit = False  # the driver may be gone by then, and frees it itself


class _CudaEvent:
    def __init__(self, device: CudaDevice) -> None:
        self._device, self._event = device, torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record(torch.cuda.current_stream(device.index))

    def is_done(self) -> bool:
        return bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        self._device.waits += 1
        self._event.synchronize()  # waits


def cupy_version() -> str:
    """Return CuPy's version; raises DeviceError saying what to install where it cannot be imported."""
    return str(_cupy().__version__)


def padded(size_bytes: int) -> int:
    """Round up to a multiple of ALIGNMENT."""
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT


def size_words(size_bytes: int) -> str:
    """Write a size for people, such as 1.2 GiB."""
    for unit in ("bytes", "KiB", "MiB"):
        if size_bytes < 1024:
            return f"{size_bytes:,.{0 if unit == 'bytes' else 1}f} {unit}"
        size_bytes /= 1024  # type: ignore[assignment]
    return f"{size_bytes:,.1f} GiB"


def _pieces(memory: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Give address and size of what is registered at one go."""
    for start in range(0, memory.numel(), PIN_BYTES):
        yield memory.data_ptr() + start, min(PIN_BYTES, memory.numel() - start)


def _check_contiguous(addresses: list[int], pinned: list[int]) -> None:
    """Raise DeviceError unless the device sees the pieces in one stretch, as every machine with unified addresses does."""
    if any(address - addresses[0] != start - pinned[0] for address, start in zip(addresses, pinned, strict=True)):
        raise DeviceError("the device sees the pieces of page-locked memory apart from each other")


def _cupy() -> Any:
    """Import CuPy. Raises DeviceError saying what to install."""
    with contextlib.suppress(ImportError):
        return importlib.import_module("cupy")
    extra = f"cuda{(torch.version.cuda or '13').split('.')[0]}"
    raise DeviceError(f'CuPy cannot be imported: pip install ".[{extra}]" in a checkout')
