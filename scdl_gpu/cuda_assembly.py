"""Batches assembled on a GPU: from rows in its memory, in page-locked memory of the host, or made on the CPU and copied.

Knows one device and what is enqueued on it, not epochs. A batch costs one copy of its row numbers and row pointers to the
device, and one launch; the host waits for nothing. What a kernel finds wrong comes back with a later batch, before the
epoch ends.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from scdl_gpu.assembly import NO_SLOTS, Assembler, CpuAssembler, Ints, Made, Marks, Output, check_index
from scdl_gpu.backend import index_dtype
from scdl_gpu.device import Device, Event, device_of
from scdl_gpu.errors import DeviceError
from scdl_gpu.kernels.shards import FAULTS, NO_FAULT
from scdl_gpu.placement import Placed, Plan, choose, place
from scdl_gpu.shards import Extents, Shards

PART_ALIGNMENT = 16
"""Bytes that each array of a staging begins at a multiple of."""


class Staged(NamedTuple):
    """A batch on its way: its arrays, one after the other in page-locked memory; `places` tells where each begins."""

    host: torch.Tensor
    places: dict[str, tuple[int, np.dtype[Any], int]]
    rows: Ints
    nnz: int


class _Stagings:
    """Page-locked buffers in turn: one is free again when the copy from it is done. Safe for threads."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._free: list[torch.Tensor] = []
        self._copying: deque[tuple[Event, torch.Tensor]] = deque()
        self._lock = threading.Lock()

    def take(self, size_bytes: int) -> torch.Tensor:
        """Return a buffer of at least `size_bytes`."""
        with self._lock:
            while self._copying and self._copying[0][0].is_done():
                self._free.append(self._copying.popleft()[1])
            self._free = [buffer for buffer in self._free if buffer.numel() >= size_bytes]
            return self._free.pop() if self._free else self._device.staging(size_bytes + size_bytes // 4)

    def give(self, buffer: torch.Tensor, copied: Event) -> None:
        """Take a buffer back, from which a copy is enqueued that ends before `copied`."""
        with self._lock:
            self._copying.append((copied, buffer))


class CudaAssembler:
    """Makes batches by kernels/*.cu from rows that are placed in memory which the device reads."""

    is_cuda = True
    threads = 1

    def __init__(self, shards: Shards, output: Output, device: Device, placed: Placed, *, batch_size: int) -> None:
        from scdl_gpu.kernels.gpu import Table

        self._shards, self._output, self._device, self._placed = shards, output, device, placed
        self.torch_device = device.torch_device
        self._index = index_dtype(batch_size, shards.n_vars, 0)
        self._sorts = placed.kind == "pinned"
        if placed.table is None:
            raise ValueError(f"rows placed on the {placed.kind} are not read by kernels")
        self._table = Table(placed.entries, int(placed.table.data_ptr()))
        self._stagings = _Stagings(device)
        self._lut = self._uploaded(NO_SLOTS if output.lut is None else output.lut)
        self._fault = self._uploaded(np.full(FAULTS, NO_FAULT, np.int32))
        self._report = device.staging(4 * FAULTS)
        self._reported: Event | None = None
        self._unchecked: deque[Ints] = deque()
        self._in_report = 0

    def _uploaded(self, array: NDArray[Any]) -> torch.Tensor:
        """Copy a small array to the device, once."""
        host = self._device.staging(max(1, array.nbytes))
        host[: array.nbytes].numpy()[:] = array.view(np.uint8)
        target = self._device.allocate(max(1, array.nbytes))[: max(1, array.nbytes)]
        self._device.upload(host, target)
        self._device.record().wait()  # waits, once
        return target[: array.nbytes].view(torch.int32)

    def prepare(self, rows: Ints, is_padding: Marks) -> Staged:
        """Find where rows lie, and lay that out for one copy to the device; rows in page-locked memory in order of address."""
        extents = self._shards.extents(rows)
        nnz = int(extents.indptr[-1])
        check_index(nnz, self._index)
        arrays = {"rows": rows, "indptr": extents.indptr.astype(self._index), "is_padding": is_padding.view(np.uint8)}
        arrays |= self._reading_order(extents)
        places, total = {}, 0
        for name, array in arrays.items():
            places[name] = (total, array.dtype, array.size)
            total += -(-array.nbytes // PART_ALIGNMENT) * PART_ALIGNMENT
        host = self._stagings.take(total)[:total] if total else self._stagings.take(1)[:0]
        bytes_ = host.numpy()
        for name, array in arrays.items():
            start = places[name][0]
            bytes_[start : start + array.nbytes] = array.view(np.uint8)
        return Staged(host, places, rows, nnz)

    def _reading_order(self, extents: Extents) -> dict[str, NDArray[Any]]:
        """Arrange shard and start of each row in the order of reading, with the slot of each where that is not its place.

        Sorted addresses are worth four times the speed over the bus (shared reference, 3b).
        """
        shard, starts, indptr = extents
        dtype = self._index if self._output.kind == "csr" else np.dtype(np.int64)
        if not self._sorts:
            read = {} if self._output.kind == "csr" else {"read_indptr": indptr}
            return {"shard": shard, "starts": starts, **read}
        order = np.lexsort((starts, shard)) if shard.size else np.argsort(starts, kind="stable")
        read_indptr = np.zeros(indptr.size, dtype)
        np.cumsum(np.diff(indptr)[order], out=read_indptr[1:])
        return {
            "shard": shard[order] if shard.size else shard,
            "starts": starts[order],
            "slots": order.astype(np.int32),
            "read_indptr": read_indptr,
        }

    def make(self, prepared: Staged) -> Made:
        """Enqueue the copy of the staging and the gather; waits for nothing. Raises what an earlier batch met."""
        self._raise_reported(wait=False)
        device, output = self._device, self._output
        scratch = device.empty(prepared.host.numel(), torch.uint8)
        device.upload(prepared.host, scratch)
        self._stagings.give(prepared.host, device.record())

        def part(name: str) -> torch.Tensor:
            if name not in prepared.places:
                return torch.empty(0, dtype=torch.int32, device=self.torch_device)
            start, dtype, size = prepared.places[name]
            return scratch[start : start + size * dtype.itemsize].view(getattr(torch, dtype.name))

        make = self._csr if output.kind == "csr" else self._dense
        x = make(part, prepared)
        self._unchecked.append(prepared.rows)
        self._ask()
        return Made(x, part("rows"), part("is_padding").view(torch.bool))

    def _csr(self, part: Callable[[str], torch.Tensor], prepared: Staged) -> torch.Tensor:
        from scdl_gpu.kernels import gpu
        from scdl_gpu.kernels.shards import kind_of

        n_rows, width, kind = prepared.rows.size, self._shards.n_vars, kind_of(str(self._output.dtype).removeprefix("torch."))
        indptr = part("indptr")
        read_indptr = part("read_indptr") if "read_indptr" in prepared.places else indptr
        indices = self._device.empty(prepared.nnz, indptr.dtype)
        values = self._device.empty(prepared.nnz, self._output.dtype)
        gpu.gather_csr(
            self._device.launch, self._table, part("shard"), part("starts"), part("slots"), read_indptr, width, indptr, kind,
            indices, values, self._fault,
        )  # fmt: skip
        return torch.sparse_csr_tensor(indptr, indices, values, (n_rows, width), check_invariants=False)

    def _dense(self, part: Callable[[str], torch.Tensor], prepared: Staged) -> torch.Tensor:
        from scdl_gpu.kernels import gpu
        from scdl_gpu.kernels.shards import kind_of

        output, kind = self._output, kind_of(str(self._output.dtype).removeprefix("torch."))
        out = self._device.empty((prepared.rows.size, output.width), output.dtype)
        gpu.gather_dense(
            self._device.launch, self._table, part("shard"), part("starts"), part("slots"), part("read_indptr"), self._shards.n_vars,
            self._lut, output.target, output.log1p, kind, out, self._fault,
        )  # fmt: skip
        return out

    def _ask(self) -> None:
        """Let the faults come to the host, unless an answer is on its way."""
        if self._reported is None:
            self._device.download(self._fault.view(torch.uint8), self._report)
            self._reported, self._in_report = self._device.record(), len(self._unchecked)

    def _raise_reported(self, *, wait: bool) -> None:
        """Look at the faults that came back, if they did; `wait` for them at the end of an epoch."""
        if self._reported is None:
            return
        if wait:
            self._reported.wait()  # waits, once an epoch
        elif not self._reported.is_done():
            return
        self._reported = None
        faults = self._report.numpy().view(np.int32)
        suspects = [self._unchecked.popleft() for _ in range(self._in_report)]
        if (faults != NO_FAULT).any():
            self._raise_fault(faults, suspects)

    def _raise_fault(self, faults: NDArray[np.int32], suspects: list[Ints]) -> None:
        """Find the faulty row among the batches since the last answer, by making the rows at its position on the CPU."""
        position = int(faults.min())
        cpu = CpuAssembler(self._shards, self._output, batch_size=1)
        for rows in suspects:
            cpu.gather(rows[position : position + 1])
        raise DeviceError(
            f"{self._device.name} met a faulty row at position {position} of a batch, but the files are whole: "
            f"the copy in its memory is not what was placed; close the loader and make it anew"
        )

    def check(self) -> None:
        """Raise ArchiveError if any batch met a damaged row; waits for the last answer."""
        while self._unchecked:
            self._ask()
            self._raise_reported(wait=True)

    def close(self) -> None:
        """Give the memory of the rows back."""
        self._placed.close()

    def __repr__(self) -> str:
        plan = self._placed.plan
        return f"on {self._device.name}, placement {plan.kind}: {plan.size_bytes:,} bytes; {plan.why}"


class HostAssembler:
    """Makes batches on the CPU, in page-locked memory, and copies them to the device."""

    is_cuda = True

    def __init__(self, shards: Shards, output: Output, device: Device, placed: Placed, *, batch_size: int) -> None:
        self._cpu = CpuAssembler(shards, output, batch_size=batch_size, empty=self._staging)
        self._device, self._placed = device, placed
        self.torch_device = device.torch_device

    @property
    def threads(self) -> int:
        """As many as torch uses."""
        return self._cpu.threads

    def _staging(self, n: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        return self._device.staging(n * dtype.itemsize).numpy().view(dtype)

    def prepare(self, rows: Ints, is_padding: Marks) -> Made:
        """Gather the rows on the CPU."""
        return self._cpu.prepare(rows, is_padding)

    def make(self, prepared: Made) -> Made:
        """Enqueue the copies to the device."""
        x = prepared.x
        if x.layout == torch.sparse_csr:
            indptr, indices, values = (self._sent(part) for part in (x.crow_indices(), x.col_indices(), x.values()))
            x = torch.sparse_csr_tensor(indptr, indices, values, tuple(x.shape), check_invariants=False)
        else:
            x = self._sent(x)
        return Made(x, self._sent(prepared.rows), self._sent(prepared.is_padding))

    def _sent(self, host: torch.Tensor) -> torch.Tensor:
        target = self._device.empty(tuple(host.shape), host.dtype)
        self._device.upload(host, target)
        return target

    def check(self) -> None:
        """Do nothing: every batch was checked when it was made."""

    def close(self) -> None:
        """Let the buffers go."""
        self._cpu.close()

    def __repr__(self) -> str:
        return (
            f"on {self._device.name}, placement host: batches are made by {self._cpu.threads} threads of the CPU; {self._placed.plan.why}"
        )


def assembler_for(
    shards: Shards,
    output: Output,
    *,
    device: str | torch.device | Device,
    placement: str,
    windows: bool | None,
    budgets: tuple[float | None, float | None],
    batch_size: int,
) -> Assembler:
    """Choose who makes batches, and bring the rows to where they are read from; a bar shows it after two seconds.

    budgets: of device memory and of host memory. Raises ValueError for arguments, DeviceError for what the machine lacks.
    """
    chosen = device_of(device)
    plan = choose(
        shards.archives,
        chosen,
        placement=placement,
        windows=windows,
        memory_budget=budgets[0],
        host_budget=budgets[1],
        output_bytes=_output_bytes(shards, output, batch_size),
    )
    if chosen is None:
        asked = "" if device != "auto" else "; torch finds no GPU"
        return CpuAssembler(shards, output, batch_size=batch_size, why=f"; {plan.why}{asked}")
    with _bar(plan) as progress:
        placed = place(shards.archives, plan, chosen, progress=progress)
    kind = HostAssembler if placed.kind == "host" else CudaAssembler
    return kind(shards, output, chosen, placed, batch_size=batch_size)


def _output_bytes(shards: Shards, output: Output, batch_size: int) -> int:
    """Bytes that two batches take on the device: dense ones exactly, sparse ones of mean length."""
    if output.kind == "dense":
        return 2 * batch_size * output.width * output.dtype.itemsize
    return 2 * int(batch_size * shards.nnz / max(1, shards.n_rows)) * (8 + output.dtype.itemsize)


@contextmanager
def _bar(plan: Plan) -> Iterator[Callable[[int], None]]:
    """Show what is placed, where there is a terminal."""
    from tqdm import tqdm

    with tqdm(total=plan.size_bytes, unit="B", unit_scale=True, desc=f"placing rows ({plan.kind})", delay=2, disable=None) as bar:
        yield lambda size_bytes: bar.update(size_bytes) and None
