"""CudaDevice asks torch and CuPy for the right things; on a GPU also: it gets them.

Without a GPU the few calls that reach CUDA are fakes that note what they were asked for.
"""

import ctypes
import importlib.util
import inspect
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from emulator.device import EmulatedDevice, EmulatedEvent

from scdl_gpu import device
from scdl_gpu.arena import Arena
from scdl_gpu.device import CudaDevice, Device, Event, _CudaEvent
from scdl_gpu.errors import DeviceError

PAGE = 4096


class FakeRuntimeError(RuntimeError):
    """What CuPy raises for an error of CUDA."""


class FakeRuntime:
    """The calls of cupy.cuda.runtime that register and share memory; `room` bytes can be had, the device sees them `shift` higher.

    peers: which device reaches which; shared: handles that were opened, by address.
    """

    CUDARuntimeError = FakeRuntimeError

    def __init__(self) -> None:
        self.registered: dict[int, tuple[int, int]] = {}
        self.room, self.shift, self.gap = 1 << 40, 0, 0
        self.allocated: dict[int, int] = {}
        self.shared: dict[int, tuple[bytes, int]] = {}
        self.peers = {(0, 1)}

    def hostRegister(self, ptr: int, size: int, flags: int) -> None:  # noqa: N802
        """Register, or fail as CUDA does."""
        if sum(size for size, _ in self.registered.values()) + size > self.room or ptr in self.registered:
            raise FakeRuntimeError("cudaErrorMemoryAllocation: out of memory")
        self.registered[ptr] = (size, flags)

    def hostUnregister(self, ptr: int) -> None:  # noqa: N802
        """Unregister, or fail as CUDA does."""
        if self.registered.pop(ptr, None) is None:
            raise FakeRuntimeError("cudaErrorHostMemoryNotRegistered")

    def pointerGetAttributes(self, ptr: int) -> Any:  # noqa: N802
        """Say where the device sees what was registered."""
        later = sum(other < ptr for other in self.registered)
        return SimpleNamespace(devicePointer=ptr + self.shift + later * self.gap)

    def malloc(self, size: int) -> int:
        """Allocate, or fail as CUDA does."""
        if sum(self.allocated.values()) + size > self.room:
            raise FakeRuntimeError("cudaErrorMemoryAllocation: out of memory")
        self.allocated[address := (1 << 40) + (len(self.allocated) << 30)] = size
        return address

    def free(self, ptr: int) -> None:
        """Free; KeyError for what was not allocated."""
        del self.allocated[ptr]

    def ipcGetMemHandle(self, ptr: int) -> bytes:  # noqa: N802
        """Make a handle of the begin of an allocation."""
        if ptr not in self.allocated:
            raise FakeRuntimeError("cudaErrorInvalidValue")
        return f"handle of {ptr}".encode()

    def ipcOpenMemHandle(self, handle: bytes, flags: int) -> int:  # noqa: N802
        """Open a handle, or fail as CUDA does."""
        if not handle.startswith(b"handle of "):
            raise FakeRuntimeError("cudaErrorMapBufferObjectFailed")
        self.shared[address := (2 << 40) + (len(self.shared) << 30)] = (handle, flags)
        return address

    def ipcCloseMemHandle(self, ptr: int) -> None:  # noqa: N802
        """Close it, or fail as CUDA does."""
        if self.shared.pop(ptr, None) is None:
            raise FakeRuntimeError("cudaErrorInvalidValue")

    def deviceGetPCIBusId(self, index: int) -> str:  # noqa: N802
        """Name a device."""
        return f"0000:0{index}:00.0"

    def deviceGetByPCIBusId(self, bus_id: str) -> int:  # noqa: N802
        """Find a device by its name, among the two that this process sees."""
        if bus_id not in ("0000:00:00.0", "0000:01:00.0"):
            raise FakeRuntimeError("cudaErrorInvalidDevice")
        return int(bus_id[6])

    def deviceCanAccessPeer(self, index: int, other: int) -> int:  # noqa: N802
        """Tell whether one device reaches another."""
        return int((index, other) in self.peers)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    """Put two GPUs in place of CUDA: what torch, CuPy and the launcher would say of them."""
    runtime, cupy, gpu = FakeRuntime(), ModuleType("cupy"), ModuleType("scdl_gpu.kernels.gpu")
    vars(cupy).update(cuda=SimpleNamespace(runtime=runtime, Device=nullcontext))
    vars(gpu).update(GpuLauncher=FakeLauncher)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "scdl_gpu.kernels.gpu", gpu)
    for name, value in {
        "is_available": lambda: True,
        "current_device": lambda: 1,
        "device_count": lambda: 2,
        "get_device_name": lambda index: f"GPU {index}",
        "mem_get_info": lambda index: (3 << 30, 5 << 30),
        "empty_cache": lambda: None,
        "current_stream": lambda index: f"stream of {index}",
        "device": current_gpu,
        "Event": FakeEvent,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return runtime


class FakeLauncher:
    """Notes what is launched, and on which GPU."""

    launched: list[tuple[Any, ...]] = []  # noqa: RUF012

    def launch(self, *call: Any) -> None:
        """Note it."""
        self.launched.append((*GPU, *call))


class FakeEvent:
    """An event that is done when somebody waited for it."""

    def record(self, stream: str) -> None:
        """Note the stream."""
        self.stream, self.done = stream, False

    def query(self) -> bool:
        """Tell whether it is done."""
        return self.done

    def synchronize(self) -> None:
        """Wait."""
        self.done = True


GPU: list[int] = []


@contextmanager
def current_gpu(index: int) -> Iterator[None]:
    """Make a GPU the current one, as torch.cuda.device does."""
    GPU.append(index)
    yield
    GPU.pop()


def test_devices_follow_the_protocol() -> None:
    """The GPU, the emulated device and their events have every method of the protocols, with the same parameters."""
    for protocol, made in ((Device, CudaDevice), (Device, EmulatedDevice), (Event, _CudaEvent), (Event, EmulatedEvent)):
        methods = {name: function for name, function in vars(protocol).items() if inspect.isfunction(function) and name[0] != "_"}
        wanted = {name: list(inspect.signature(function).parameters) for name, function in methods.items()}

        found = {name: list(inspect.signature(getattr(made, name)).parameters) for name in wanted}

        assert found == wanted


def test_a_gpu_is_the_current_or_the_named_one(runtime: FakeRuntime) -> None:
    """Without an index torch's current GPU is taken; the free memory is torch's after it gave back what it does not use."""
    current, first = CudaDevice(), CudaDevice(0)

    assert (current.index, current.name, current.torch_device) == (1, "cuda:1 (GPU 1)", torch.device("cuda:1"))
    assert (first.index, first.waits) == (0, 0)
    assert first.memory() == (3 << 30, 5 << 30)


def test_what_is_missing_is_named(runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """No such GPU, no CuPy and no GPU at all are three errors that say what to do."""
    with pytest.raises(DeviceError, match="cuda:2 is not there: torch finds 2 GPUs"):
        CudaDevice(2)
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(DeviceError, match=r'CuPy cannot be imported: pip install "\.\[cuda1\d\]"'):
        CudaDevice()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=r'finds no GPU; .* device="cpu"'):
        CudaDevice()


def test_memory_is_torchs(runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Allocations are torch's, padded, on this GPU; staging is page-locked."""
    asked: list[tuple[Any, Any, dict[str, Any]]] = []
    monkeypatch.setattr(torch, "empty", lambda shape, *, dtype, **options: asked.append((shape, dtype, options)))
    made = CudaDevice(0)

    made.empty((2, 3), torch.float32)
    made.allocate(129)
    made.staging(5)

    assert asked == [
        ((2, 3), torch.float32, {"device": torch.device("cuda:0")}),
        (256, torch.uint8, {"device": torch.device("cuda:0")}),
        (5, torch.uint8, {"pin_memory": True}),
    ]


def test_memory_that_is_not_there_is_named(runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of torch's allocators become errors with the sizes."""

    def fail(*_: object, pin_memory: bool = False, **__: object) -> None:
        raise RuntimeError("CUDA error") if pin_memory else torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", fail)

    with pytest.raises(DeviceError, match=r"cuda:1 \(GPU 1\) has 3\.0 GiB of 5\.0 GiB free, 4\.0 GiB were asked for"):
        CudaDevice().allocate(4 << 30)
    with pytest.raises(DeviceError, match=r"the host could not page-lock 1\.0 KiB for copies to cuda:1"):
        CudaDevice().staging(1024)


def test_copies_are_enqueued(runtime: FakeRuntime) -> None:
    """Copies go from host to device and back, without a wait."""
    made, host, there = CudaDevice(), torch.arange(4, dtype=torch.uint8), torch.zeros(4, dtype=torch.uint8)

    made.upload(host, there)
    made.download(there, back := torch.zeros(4, dtype=torch.uint8))

    assert back.tolist() == [0, 1, 2, 3]
    assert made.waits == 0


@pytest.mark.parametrize(("pages", "pieces"), [(1, [1]), (2, [2]), (5, [2, 2, 1])])
def test_memory_is_registered_in_pieces(pages: int, pieces: list[int], runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Page-locking goes piece by piece, portable and mapped, gives the device's address, and is undone piece by piece."""
    monkeypatch.setattr(device, "PIN_BYTES", 2 * PAGE)
    made, arena = CudaDevice(), Arena(pages * PAGE)
    runtime.shift = 1 << 20
    base = arena.memory.data_ptr()

    address = made.pin(arena.memory)
    registered = dict(runtime.registered)
    made.unpin(arena.memory)

    assert address == base + (1 << 20)
    assert registered == {base + 2 * PAGE * k: (n * PAGE, 1 | 2) for k, n in enumerate(pieces)}
    assert runtime.registered == {}
    arena.close()


def test_nothing_stays_registered_after_a_failure(runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a piece cannot be page-locked, or the device sees pieces apart, all are released, and sizes are in the error."""
    monkeypatch.setattr(device, "PIN_BYTES", 2 * PAGE)
    made, arena = CudaDevice(), Arena(5 * PAGE)

    runtime.room = 4 * PAGE
    with pytest.raises(DeviceError, match=r"page-locked 16\.0 KiB of 20\.0 KiB for cuda:1 .*out of memory.*placement=\"host\""):
        made.pin(arena.memory)
    after_memory = dict(runtime.registered)
    runtime.room, runtime.gap = 1 << 40, PAGE
    with pytest.raises(DeviceError, match="the device sees the pieces of page-locked memory apart"):
        made.pin(arena.memory)

    assert (after_memory, runtime.registered) == ({}, {})
    arena.close()


def test_a_failing_release_is_logged(runtime: FakeRuntime, caplog: pytest.LogCaptureFixture) -> None:
    """Memory that cannot be released is going away anyway: that is a warning."""
    arena = Arena(PAGE)

    with caplog.at_level(logging.WARNING, "scdl_gpu"):
        CudaDevice().unpin(arena.memory)

    assert "could not be released: cudaErrorHostMemoryNotRegistered" in caplog.text
    arena.close()


def test_memory_is_shared_by_handles(runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shareable memory is an allocation of its own, in whole blocks of 2 MiB, which lives as long as what torch makes of it."""
    made: list[Any] = []
    monkeypatch.setattr(torch, "as_tensor", lambda memory, device: made.append((memory, device)) or made[-1])  # type: ignore[func-returns-value]
    gpu = CudaDevice(0)

    gpu.shareable((2 << 20) + 1)
    (memory, where), sizes = made.pop(), list(runtime.allocated.values())
    address = memory.__cuda_array_interface__["data"][0]
    handle = gpu.share(SimpleNamespace(data_ptr=lambda: address))  # type: ignore[arg-type]
    opened = gpu.open_shared(handle)
    shared = dict(runtime.shared)
    gpu.close_shared(opened)
    interface = memory.__cuda_array_interface__
    del memory

    assert (sizes, where) == ([4 << 20], torch.device("cuda:0"))
    assert interface == {"shape": (4 << 20,), "typestr": "|u1", "data": (1 << 40, False), "version": 3}
    assert shared == {opened: (f"handle of {1 << 40}".encode(), 1)}
    assert (runtime.shared, runtime.allocated) == ({}, {})


def test_what_cannot_be_shared_is_named(runtime: FakeRuntime, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full memory and what CUDA IPC refuses are errors with the way out; what cannot be closed is a warning."""
    monkeypatch.setattr(torch, "as_tensor", lambda memory, device: memory)
    gpu = CudaDevice(1)
    runtime.room = 1 << 20

    with pytest.raises(DeviceError, match=r"cuda:1 .* has 3\.0 GiB of 5\.0 GiB free, 2\.0 MiB were asked for: .*out of memory"):
        gpu.shareable(5)
    with pytest.raises(DeviceError, match=r"memory could not be shared by cuda:1 .*nvidia-smi topo.*placement=\"pinned\""):
        gpu.share(torch.zeros(4, dtype=torch.uint8))
    with pytest.raises(DeviceError, match=r"memory could not be opened by cuda:1 .*MapBufferObjectFailed"):
        gpu.open_shared(b"rubbish")
    with caplog.at_level(logging.WARNING, "scdl_gpu"):
        gpu.close_shared(5)

    assert "memory of another process at 0x5 could not be closed" in caplog.text


def test_gpus_that_reach_each_other(runtime: FakeRuntime) -> None:
    """A GPU reaches itself, and others that the driver says it does; one that this process does not see it may reach."""
    first, second = CudaDevice(0), CudaDevice(1)
    names = [first.bus_id(), second.bus_id(), "0000:07:00.0"]

    assert [first.reaches(name) for name in names] == [True, True, True]
    assert [second.reaches(name) for name in names] == [False, True, True]


def test_launches_go_to_the_gpu(runtime: FakeRuntime) -> None:
    """A launch is the launcher's, with this GPU as the current one."""
    FakeLauncher.launched.clear()

    CudaDevice(0).launch("gather", (1, 2), (32,), (5, 2.5), 1024)

    assert FakeLauncher.launched == [(0, "gather", (1, 2), (32,), (5, 2.5), 1024)]


def test_waits_are_counted(runtime: FakeRuntime) -> None:
    """Asking an event is no wait, waiting is; events are recorded on the current stream of the GPU."""
    made = CudaDevice()
    event = made.record()

    before = event.is_done(), made.waits
    event.wait()

    assert before == (False, 0)
    assert (event.is_done(), made.waits) == (True, 1)
    assert event._event.stream == "stream of 1"  # type: ignore[attr-defined]


def test_cupy_has_the_calls_that_are_used() -> None:
    """The real CuPy has the calls that the fakes stand for, and without a driver they raise its CUDARuntimeError."""
    if importlib.util.find_spec("cupy") is None:
        pytest.skip("CuPy is not installed; it is 70 MB, and only an environment for a GPU has it")
    runtime = pytest.importorskip("cupy").cuda.runtime

    named = [runtime.hostRegister, runtime.hostUnregister, runtime.pointerGetAttributes, runtime.CUDARuntimeError]
    named += [runtime.malloc, runtime.free, runtime.ipcGetMemHandle, runtime.ipcOpenMemHandle, runtime.ipcCloseMemHandle]
    named += [runtime.deviceGetPCIBusId, runtime.deviceGetByPCIBusId, runtime.deviceCanAccessPeer]

    assert all(callable(one) for one in named)
    assert issubclass(runtime.CUDARuntimeError, RuntimeError)
    if not torch.cuda.is_available():
        with pytest.raises(runtime.CUDARuntimeError):
            runtime.hostRegister(PAGE, PAGE, device.PORTABLE | device.MAPPED)


@pytest.mark.gpu
def test_a_gpu_copies_both_ways() -> None:
    """What is uploaded and downloaded is there when an event says so."""
    made = CudaDevice()
    host, there, back = made.staging(1 << 20), made.allocate(1 << 20), made.staging(1 << 20)
    host.numpy()[:] = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8)

    made.upload(host, there)
    made.download(there, back)
    made.record().wait()

    assert torch.equal(host, back)
    assert there.data_ptr() % 128 == 0
    assert made.waits == 1


@pytest.mark.gpu
def test_a_gpu_reads_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared memory that was registered in pieces is read by the device at the address that `pin` gives, across their border."""
    import cupy

    monkeypatch.setattr(device, "PIN_BYTES", 1 << 20)
    made, arena = CudaDevice(), Arena(3 << 20)
    arena.memory.numpy()[:] = np.random.default_rng(0).integers(0, 256, 3 << 20, np.uint8)

    address = made.pin(arena.memory)
    seen = cupy.ndarray((3 << 20,), cupy.uint8, cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(address, 3 << 20, arena), 0)).get()
    made.unpin(arena.memory)

    assert bytes(seen) == ctypes.string_at(arena.memory.data_ptr(), 3 << 20)
    arena.close()


@pytest.mark.gpu
def test_a_full_gpu_is_named() -> None:
    """More memory than the GPU has is refused with the sizes, and nothing is kept."""
    made = CudaDevice()
    free, total = made.memory()

    with pytest.raises(DeviceError, match="were asked for"):
        made.allocate(total + 1)

    assert abs(made.memory()[0] - free) < 64 << 20
