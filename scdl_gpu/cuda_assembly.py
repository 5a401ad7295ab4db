"""Batches assembled on a GPU: from rows in its memory, in page-locked memory of the host, or made on the CPU and copied.

Knows one device and what is enqueued on it, not epochs. A batch costs one copy of its row numbers and row pointers to the
device, and one launch; the host waits for nothing. What a kernel finds wrong comes back with a later batch, at the latest
at the end of the epoch: asking for it with every batch would cost as much of the host's time as the launch.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from scdl_gpu.archive.parts import Extents, Parts, Share
from scdl_gpu.assembly import ALL_GENES, Assembler, CpuAssembler, Ints, Made, Output, Wanted, check_index
from scdl_gpu.backend import index_dtype
from scdl_gpu.buffers import Arrived, Courier, Parcel, Part
from scdl_gpu.device import Device, device_of, padded, size_words
from scdl_gpu.errors import DeviceError
from scdl_gpu.faults import Faults
from scdl_gpu.kernels.gpu import Table
from scdl_gpu.kernels.packed import ORDER
from scdl_gpu.kernels.packed import PACKED as PACKED_SHARD
from scdl_gpu.kernels.shards import FAULTS, SHARD, kind_of
from scdl_gpu.order import Order
from scdl_gpu.peers import peers_for
from scdl_gpu.placement import Placed, Plan, choose, place
from scdl_gpu.shards import Shards
from scdl_gpu.window import Window, upload
from scdl_gpu.window_order import check_ranks
from scdl_gpu.windows import Windows, holds_batches, one_row

OBS, PACKED = "obs ", "packed "
"""What the names of obs columns, and of all that tells where rows of packed shards lie, begin with in a parcel."""
STAYS = (
    "a loader on cuda cannot go to a worker process of a DataLoader, nor be pickled: iterate it directly, or use "
    "DataLoader(loader, batch_size=None, num_workers=0); it assembles ahead by itself"
)


class Prepared(NamedTuple):
    """A batch on its way: what the device needs to make it, and how many elements it has."""

    parcel: Parcel
    rows: Ints
    obs: tuple[str, ...]
    nnz: int
    window: Window


class CudaAssembler:
    """Makes batches by kernels/*.cu from rows in memory which the device reads: those that are placed there, or windows of them."""

    is_cuda = True
    threads = 1

    def __init__(self, shards: Shards, output: Output, device: Device, placed: Placed, *, batch_size: int) -> None:
        self._shards, self._output, self._device, self._placed = shards, output, device, placed
        self.torch_device = device.torch_device
        self._kind = kind_of(str(output.dtype).removeprefix("torch."))
        self._index = index_dtype(batch_size, shards.n_vars, 0)
        self._sorts = placed.kind == "pinned"
        self._resident = _resident(shards, placed)
        self._order_memory: list[torch.Tensor] = []
        self._orders = self._gene_orders()
        self._courier = Courier(device)
        self._faults = Faults(device)
        self._lut = upload(ALL_GENES if output.lut is None else output.lut, device).view(torch.int32)

    def _gene_orders(self) -> Table:
        """Copy the gene orders of packed parts to the device, and then the table of them, which says where they are."""
        orders = self._shards.parts.orders
        tables = [upload(np.empty(0, np.int32) if table is None else table, self._device) for table in orders.tables]
        entries = orders.table_at([table.data_ptr() if len(table) else 0 for table in tables])
        there = upload(entries, self._device)
        self._order_memory = [*tables, there]
        return Table(entries, there.data_ptr())

    def prepare(self, wanted: Wanted) -> Prepared:
        """Find where rows lie, and lay that out for one copy to the device; rows in page-locked memory in order of address."""
        self._shards.check(wanted.rows)
        window, numbers = wanted.located(self._resident)
        extents = window.parts.extents(numbers)
        nnz = int(extents.indptr[-1])
        check_index(nnz, self._index)
        arrays: dict[str, NDArray[Any]] = {"rows": wanted.rows, "is_padding": wanted.is_padding}
        arrays |= {OBS + name: values for name, values in wanted.obs.items()}
        if self._output.kind == "csr":
            arrays["indptr"] = extents.indptr.astype(self._index)
        arrays |= self._reading_order(window.parts, extents)
        return Prepared(self._courier.packed(arrays), wanted.rows, tuple(wanted.obs), nnz, window)

    def _reading_order(self, parts: Parts, extents: Extents) -> dict[str, NDArray[Any]]:
        """Lay out where the rows lie, those of raw and of packed parts apart."""
        raw, packed = parts.shares(extents)
        arrays = {} if raw is None else self._arranged(raw, raw.where)
        if packed is not None:
            arrays |= {PACKED + name: array for name, array in self._arranged(packed, packed.where["start"]).items()}
        return arrays

    def _arranged(self, share: Share, starts: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Arrange rows in the order of reading, with the slot of each where that is not its place.

        Sorted addresses are worth four times the speed over the bus (shared reference, 3b).
        """
        part, where, slots, indptr = share
        dtype = self._index if self._output.kind == "csr" else np.int64
        if not self._sorts:
            arrays = {"shard": part, "where": where, "slots": slots}
            return arrays if self._output.kind == "csr" and not slots.size else {**arrays, "read_indptr": indptr.astype(dtype, copy=False)}
        order = np.lexsort((starts, part)) if part.size else np.argsort(starts, kind="stable")
        read_indptr = np.zeros(indptr.size, dtype)
        np.cumsum(np.diff(indptr)[order], out=read_indptr[1:])
        return {
            "shard": part[order] if part.size else part,
            "where": where[order],
            "slots": slots[order] if slots.size else order.astype(np.int32),
            "read_indptr": read_indptr,
        }

    def make(self, prepared: Prepared) -> Made:
        """Enqueue the copy of the parcel and the gather; waits for nothing. Raises what an earlier batch met."""
        self._raise_answer(wait=False)
        arrived, _ = self._courier.bring(prepared.parcel)
        x = self._gather(arrived, prepared)
        self._faults.made(prepared.rows)
        obs = {name: arrived.tensor(OBS + name) for name in prepared.obs}
        return Made(x, arrived.tensor("rows"), obs, arrived.tensor("is_padding"))

    def _gather(self, arrived: Arrived, prepared: Prepared) -> torch.Tensor:
        return (self._csr if self._output.kind == "csr" else self._dense)(arrived, prepared)

    def _csr(self, arrived: Arrived, prepared: Prepared) -> torch.Tensor:
        from scdl_gpu.kernels import gpu

        indptr = arrived.tensor("indptr")
        indices = self._device.empty(prepared.nnz, indptr.dtype)
        values = self._device.empty(prepared.nnz, self._output.dtype)
        out = (self._shards.n_vars, arrived.part("indptr"), self._kind, indices, values, self._faults.codes)
        if "where" in arrived:
            gpu.gather_csr(self._device.launch, prepared.window.raw, *_where(arrived, "", "indptr"), *out)
        if f"{PACKED}where" in arrived:
            gpu.decode_csr(self._device.launch, prepared.window.packed, self._orders, *_where(arrived, PACKED, "indptr"), *out)
        size = (prepared.rows.size, self._shards.n_vars)
        return torch.sparse_csr_tensor(indptr, indices, values, size, check_invariants=False)

    def _dense(self, arrived: Arrived, prepared: Prepared) -> torch.Tensor:
        from scdl_gpu.kernels import gpu

        output = self._output
        made = self._device.empty((prepared.rows.size, output.width), output.dtype)
        out = (self._shards.n_vars, self._lut, output.target, output.log1p, self._kind, made, self._faults.codes)
        if "where" in arrived:
            gpu.gather_dense(self._device.launch, prepared.window.raw, *_where(arrived, "", "read_indptr"), *out)
        if f"{PACKED}where" in arrived:
            gpu.decode_dense(self._device.launch, prepared.window.packed, self._orders, *_where(arrived, PACKED, "read_indptr"), *out)
        return made

    def _raise_answer(self, *, wait: bool) -> None:
        """Look at the faults that came back, if they did; `wait` for them at the end of an epoch."""
        answer = self._faults.answer(wait=wait)
        if answer is not None:
            self._raise_fault(*answer)

    def _raise_fault(self, position: int, suspects: list[Ints]) -> NoReturn:
        """Find the faulty row among those at `position` of some batches, by making each alone. Waits; what follows begins clean.

        Rows of windows are made from their files: what they lay in may hold others by now.
        """
        try:
            for rows in suspects:
                if position < rows.size and (self._resident is None or self._is_faulty(rows[position : position + 1])):
                    self._make_on_host(int(rows[position]))
        finally:
            self._faults.reset()
        raise DeviceError(
            f"{self._device.name} reported a fault at position {position} of a batch, and finds none there now; "
            f"its memory is not to be relied on: see `nvidia-smi -q -d ECC`"
        )

    def _is_faulty(self, rows: Ints) -> bool:
        """Make rows alone, and tell whether the device reports a fault."""
        self._faults.reset()
        prepared = self.prepare(Wanted(rows, np.zeros(rows.size, bool), {}))
        self._gather(self._courier.bring(prepared.parcel)[0], prepared)
        self._faults.ask()
        return self._faults.answer(wait=True) is not None

    def _make_on_host(self, row: int) -> None:
        """Say what is wrong with a row that the device may have found faulty: its file, or else, where it did, the copy of it."""
        rows = np.array([row], np.int64)
        assembler, wanted = CpuAssembler(self._shards, self._output, batch_size=1), Wanted(rows, np.zeros(1, bool), {})
        if self._shards.parts.is_remote:
            with one_row(self._shards, row) as (window, number):
                assembler.gather(wanted._replace(window=window, numbers=number))
        else:
            assembler.gather(wanted)
        if self._resident is None:
            return
        raise DeviceError(
            f"{self._shards.parts.name(row)} is whole in the file, but not in the {self._placed.kind} memory that "
            f"{self._device.name} reads; something wrote over it: close the loader and make it anew"
        )

    def check(self) -> None:
        """Raise ArchiveError if any batch met a damaged row; waits for the last answer."""
        while self._faults.n_unchecked:
            self._faults.ask()
            self._raise_answer(wait=True)

    def close(self) -> None:
        """Give all memory back, once nothing reads it."""
        self._placed.close()
        self._courier.clear()
        self._faults.clear()
        self._order_memory.clear()
        self._resident = None
        self._lut = torch.empty(0, dtype=torch.int32)

    def __reduce__(self) -> NoReturn:
        raise RuntimeError(STAYS)

    def __repr__(self) -> str:
        plan = self._placed.plan
        return f"on {self._device.name}, placement {plan.kind}: {plan.size_bytes:,} bytes {_where_words(plan, self._device)}; {plan.why}"


def _resident(shards: Shards, placed: Placed) -> Window | None:
    """Give the window of all rows, where all are placed."""
    if placed.table is None:
        return None
    packed = 0 if placed.packed_table is None else placed.packed_table.data_ptr()
    parts = shards.parts
    if placed.pieces:
        parts = parts.in_pieces(placed.pieces)
    return Window(parts, Table(placed.entries, placed.table.data_ptr()), Table(placed.packed_entries, packed))


def _where(arrived: Arrived, prefix: str, pointers: str) -> tuple[Part, Part, Part, Part]:
    """Give what kernels take of rows of one kind: shard, where, slots, read_indptr; `pointers` where they lie as in the batch."""
    own = f"{prefix}read_indptr"
    shard, where, slots = (arrived.part(prefix + name) for name in ("shard", "where", "slots"))
    return shard, where, slots, arrived.part(own if own in arrived else pointers)


class HostAssembler:
    """Makes batches on the CPU, in page-locked memory, and copies them to the device."""

    is_cuda = True

    def __init__(self, shards: Shards, output: Output, device: Device, placed: Placed, *, batch_size: int) -> None:
        self._courier = Courier(device)
        self._cpu = CpuAssembler(shards, output, batch_size=batch_size, ring=self._courier.ring)
        self._device, self._placed = device, placed
        self.torch_device = device.torch_device

    @property
    def threads(self) -> int:
        """As many as torch uses."""
        return self._cpu.threads

    def prepare(self, wanted: Wanted) -> tuple[torch.Tensor, Parcel, tuple[str, ...]]:
        """Gather the rows on the CPU, and lay out what else goes to the device."""
        obs = {OBS + name: values for name, values in wanted.obs.items()}
        x = self._cpu.gather(wanted)
        return x, self._courier.packed({"rows": wanted.rows, "is_padding": wanted.is_padding, **obs}), tuple(wanted.obs)

    def make(self, prepared: tuple[torch.Tensor, Parcel, tuple[str, ...]]) -> Made:
        """Enqueue the copies to the device; their sources stay until those are done."""
        x, parcel, names = prepared
        if x.layout == torch.sparse_csr:
            arrived, (indptr, indices, values) = self._courier.bring(parcel, x.crow_indices(), x.col_indices(), x.values())
            there = torch.sparse_csr_tensor(indptr, indices, values, tuple(x.shape), check_invariants=False)
        else:
            arrived, (there,) = self._courier.bring(parcel, x)
        obs = {name: arrived.tensor(OBS + name) for name in names}
        return Made(there, arrived.tensor("rows"), obs, arrived.tensor("is_padding"))

    def check(self) -> None:
        """Do nothing: every batch was checked when it was made."""

    def close(self) -> None:
        """Let the buffers go, once nothing reads them."""
        self._device.record().wait()  # waits
        self._courier.clear()
        self._cpu.close()

    def __reduce__(self) -> NoReturn:
        raise RuntimeError(STAYS)

    def __repr__(self) -> str:
        plan = self._placed.plan
        return (
            f"on {self._device.name}, placement host: {plan.size_bytes:,} bytes {_where_words(plan, self._device)}, "
            f"batches made by {self.threads} threads of the CPU and copied; {plan.why}"
        )


def assembler_for(
    shards: Shards,
    output: Output,
    *,
    device: str | int | torch.device | Device,
    placement: str,
    windows: bool | None,
    budgets: tuple[float | None, float | None],
    order: Order,
    may_stream: bool,
    is_divided: bool,
) -> tuple[Assembler, Windows | None]:
    """Choose who makes batches, and bring the rows to where they are read from; a bar shows it after two seconds.

    budgets: of device memory and of host memory. may_stream: whether the order of rows is ours to choose; is_divided: whether the ranks
    of torch.distributed divide the epoch among them, and so all make this loader. Returns also the windows that rows stream through,
    None where all are resident. Raises ValueError for arguments, DeviceError for what the machine lacks; then nothing is left in memory.
    """
    chosen, batch_size = device_of(device), order.batch_size
    peers = peers_for(placement, may_meet=is_divided and chosen is not None and not windows)
    plan = choose(
        shards.archives,
        chosen,
        placement=placement,
        windows=windows,
        memory_budget=budgets[0],
        host_budget=budgets[1],
        output_bytes=_output_bytes(shards, output, batch_size),
        may_stream=may_stream,
        table_bytes=_table_bytes(shards, output),
        peers=peers,
        suits=partial(holds_batches, shards, order),
    )
    streamed = None
    if plan.window_bytes and plan.kind != "node":
        check_ranks(order, plan.window_bytes, budgets[plan.kind != "device"])
        streamed = Windows(shards, plan.kind, window_bytes=plan.window_bytes, stored_bytes=plan.size_bytes, device=chosen)
    if chosen is None:
        asked = "; torch finds no GPU" if isinstance(device, str) and device == "auto" else ""
        where = f"placement host: {plan.size_bytes:,} bytes {_where_words(plan, None)}; {plan.why}{asked}"
        return CpuAssembler(shards, output, batch_size=batch_size, where=where), streamed
    with ExitStack() as stack:
        with _bar(plan) as progress:
            placed = stack.enter_context(place(shards.archives, plan, chosen, peers=peers, progress=progress))
        kind = HostAssembler if placed.kind == "host" else CudaAssembler
        assembler = kind(shards, output, chosen, placed, batch_size=batch_size)
        stack.pop_all()
    return assembler, streamed


def _where_words(plan: Plan, device: Device | None) -> str:
    """Say where rows lie."""
    if plan.window_bytes:
        return f"through windows of {size_words(plan.window_bytes)}"
    if plan.kind == "device" and device is not None:
        return f"in memory of {device.name}"
    if plan.kind == "node":
        return f"divided over the memory of the devices of {len(plan.shares)} ranks"
    return "of page-locked host memory" if plan.kind == "pinned" else "in the page cache"


def _output_bytes(shards: Shards, output: Output, batch_size: int) -> int:
    """Bytes that two batches take on the device: dense ones exactly, sparse ones of mean length."""
    if output.kind == "dense":
        return 2 * batch_size * output.width * output.dtype.itemsize
    return 2 * int(batch_size * shards.nnz / max(1, shards.n_rows)) * (8 + output.dtype.itemsize)


def _table_bytes(shards: Shards, output: Output) -> int:
    """Bytes that a CudaAssembler has on the device beside rows: tables of parts and of gene orders, these orders, lut, faults."""
    parts = shards.parts
    counts = {SHARD: len(parts.parts), PACKED_SHARD: len(parts.parts) if parts.is_packed.any() else 0, ORDER: len(parts.orders.table)}
    sizes = [count * dtype.itemsize for dtype, count in counts.items()]
    sizes += [table.nbytes for table in parts.orders.tables if table is not None]
    return sum(map(padded, [*sizes, 4 * FAULTS, 0 if output.lut is None else output.lut.nbytes]))


@contextmanager
def _bar(plan: Plan) -> Iterator[Callable[[int], None]]:
    """Show what is placed, where there is a terminal."""
    from tqdm import tqdm

    size_bytes = max(plan.shares, default=plan.size_bytes)
    with tqdm(total=size_bytes, unit="B", unit_scale=True, desc=f"placing rows ({plan.kind})", delay=2, disable=None) as bar:
        yield lambda size_bytes: bar.update(size_bytes) and None
