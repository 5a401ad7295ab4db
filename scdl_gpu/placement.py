"""What fits where, and the memory that holds the rows.

Knows sizes and the table of shards that kernels read, not rows of a batch. Columns and values of every archive
lie in one slab, in their stored dtypes; row pointers stay on the host, where the lengths of a batch are needed before
its launch: 8 bytes a row that no GPU has to hold.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray

from scdl_gpu.archive.parts import Archive, Part
from scdl_gpu.archive.raw import RawArchive
from scdl_gpu.archive.remote import WAY_OUT
from scdl_gpu.arena import Arena
from scdl_gpu.arguments import truth
from scdl_gpu.budget import LEAST_WINDOW, Room, Suits, device_room, host_room
from scdl_gpu.device import Device, size_words
from scdl_gpu.division import Division, Spot, divide, place_divided, spots_of
from scdl_gpu.errors import DeviceError
from scdl_gpu.kernels.packed import PACKED
from scdl_gpu.kernels.shards import SHARD, kind_of
from scdl_gpu.peers import Peers
from scdl_gpu.slab import Bounced, InPlace, Layout, PackedPlot, Progress, RawPlot, fill
from scdl_gpu.window import upload

logger = logging.getLogger(__name__)

Kind = Literal["device", "node", "pinned", "host"]

PLACEMENTS = ("auto", "device", "node", "pinned", "host")
AS_ASKED, FAR = "as asked for", "rows behind a URL stream where the CPU makes batches"
"""Why rows stream that may fit."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Where rows of `size_bytes` are to lie, and why. window_bytes: of each of two windows that they stream through, 0: of none.

    shares: bytes of them for each process of the node, where they are divided.
    """

    kind: Kind
    size_bytes: int
    why: str
    window_bytes: int = 0
    shares: tuple[int, ...] = ()


def choose(
    archives: Sequence[Archive],
    device: Device | None,
    *,
    placement: str = "auto",
    windows: bool | None = None,
    memory_budget: float | None = None,
    host_budget: float | None = None,
    output_bytes: int = 0,
    may_stream: bool = True,
    table_bytes: int = 0,
    peers: Peers | None = None,
    suits: Suits = lambda _: True,
) -> Plan:
    """Choose the placement of `archives` for `device`, None being the CPU.

    peers: the processes of this node, which all call this at the same point; None where rows are not to be divided among them.
    memory_budget, host_budget: bytes as an int, or a fraction of what is free as a float; None: what is free on the device
    less 4 GiB, or less `output_bytes` (what batches need) if that is more, and half of what the host has available.
    windows: True demands windows, False rows that are all resident; None takes windows where nothing else fits. Two share the budget
    of their kind of memory; where none is given each has at most WINDOW_BYTES, and a power of two. A step down from the device is
    logged as a warning. may_stream: False where the order is not ours to choose.
    table_bytes: what lies on the device beside resident rows, tables of shards and gene orders; they have to fit together.
    suits: whether windows of so many bytes hold a batch; without a budget they are larger where it takes that, and what nobody asked to
    stream does not through others. Ranks of a node have windows of their own, and share the half of the host where no budget is given.
    Raises ValueError for arguments, DeviceError with the sizes where the rows do not fit.
    """
    windows = None if windows is None else truth("windows", windows, "True, False or None")
    asked = AS_ASKED if windows else FAR
    _check_asked(placement, device, windows=windows, may_stream=may_stream)
    if device is None or placement == "host":
        windows = _must_stream(archives, windows, may_stream=may_stream)
    layout = Layout(archives)
    size_bytes = layout.size_bytes
    limit = partial(_limit_of_rows, memory_budget, output_bytes, table_bytes)
    node = None if peers is None or windows else divide(peers, layout, device, limit)
    if placement == "node":
        return _node_plan(node, size_bytes)
    host = host_room(layout, host_budget, is_shared=device is not None and not windows)
    host = replace(host, suits=suits)
    if device is None:
        return _choose_host(size_bytes, host, windows, asked, may_stream=may_stream)
    room = replace(device_room(device, memory_budget, output_bytes), suits=suits)
    if windows:
        kind: Kind = "host" if placement == "host" else "pinned" if placement == "pinned" else "device"
        return _stream(size_bytes, kind, room if kind == "device" else host, asked)
    resident = room.less(table_bytes)
    if placement == "auto" and node is not None and node.is_needed:
        logger.warning("rows are divided over the memory of %d devices: %s", len(node.shares), node.why)
        return _node_plan(node, size_bytes)
    if placement == "device" or (placement == "auto" and resident.holds(size_bytes)):
        return Plan("device", size_bytes, resident.fit(size_bytes, 'placement="pinned", windows=True, or raise memory_budget'))
    if placement == "pinned":
        return Plan("pinned", size_bytes, host.fit(size_bytes, 'placement="host", windows=True, or raise host_budget'))
    if placement == "host":
        return _choose_host(size_bytes, host, windows, asked, may_stream=may_stream)
    return _step_down(archives, (resident, room, host), size_bytes, windows, may_stream=may_stream)


def _step_down(
    archives: Sequence[Archive], rooms: tuple[Room, Room, Room], size_bytes: int, windows: bool | None, *, may_stream: bool
) -> Plan:
    """Take what comes next where rows do not fit the device: page-locked memory, windows, batches of the CPU; each is logged.

    rooms: of resident rows on the device, of windows there, and of the host.
    """
    resident, room, host = rooms
    if host.holds(size_bytes):
        why = f"{resident.miss(size_bytes)}; {host.fit(size_bytes, '')}"
        logger.warning("rows are placed in page-locked memory of the host, and every batch comes over the bus: %s", why)
        return Plan("pinned", size_bytes, why)
    if windows is None and may_stream and room.has_windows:
        why = f"{resident.miss(size_bytes)}; {host.miss(size_bytes)}"
        logger.warning("rows stream through windows in memory of the device: %s", why)
        return _stream(size_bytes, "device", room, why)
    windows = _must_stream(archives, windows, may_stream=may_stream)
    logger.warning("batches are assembled on the CPU: %s", resident.miss(size_bytes))
    plan = _choose_host(size_bytes, host, windows, FAR, may_stream=may_stream)
    return replace(plan, why=f"{resident.miss(size_bytes)}; {plan.why}")


def _check_asked(placement: str, device: Device | None, *, windows: bool | None, may_stream: bool) -> None:
    """Raise ValueError for what nobody can have."""
    if placement not in PLACEMENTS:
        raise ValueError(f"placement {placement!r} is unknown, expected one of {', '.join(PLACEMENTS)}")
    if placement == "node" and windows:
        raise ValueError('placement="node" holds all rows in memory, windows=True streams them; choose one')
    if windows and not may_stream:
        raise ValueError("windows=True decides which rows come when, and excludes sampler and batch_sampler")
    if device is None and placement in ("device", "pinned"):
        raise ValueError(f'placement={placement!r} needs a GPU; on the CPU rows lie in the page cache: placement="host" or "auto"')


def _must_stream(archives: Sequence[Archive], windows: bool | None, *, may_stream: bool) -> bool | None:
    """Return `windows`, for batches that the CPU makes: True where rows are behind a URL, for it finds those in windows only.

    Raises ValueError where they may not stream.
    """
    far = [archive.place for archive in archives if archive.remote is not None]
    if far and (windows is False or not may_stream):
        what = "windows=False" if windows is False else "a sampler"
        raise ValueError(
            f"{far[0]} is not on this machine, and the CPU makes batches of its rows as they stream through windows: that excludes {what}; "
            f"leave it out, let the rows lie on a GPU, or {WAY_OUT}"
        )
    return True if far else windows


def _node_plan(node: Division | None, size_bytes: int) -> Plan:
    """Plan to divide the rows. Raises DeviceError where that is not possible."""
    if node is None or not node.shares:
        why = "there are no processes to divide rows among" if node is None else node.why
        raise DeviceError(f'{why}; choose placement="pinned", windows=True, or raise memory_budget')
    return Plan("node", size_bytes, node.why, shares=node.shares)


def _limit_of_rows(asked: float | None, output_bytes: int, table_bytes: int, device: Device) -> int:
    """Give the bytes that resident rows may take on a device."""
    return device_room(device, asked, output_bytes).less(table_bytes).limit


def _choose_host(size_bytes: int, host: Room, windows: bool | None, asked: str, *, may_stream: bool) -> Plan:
    """Let rows lie in the page cache, or stream through windows what does not fit; where neither may be, read it from the disk.

    asked: why windows are True, where they are.
    """
    if windows:
        return _stream(size_bytes, "host", host, asked)
    if host.holds(size_bytes) or windows is False:
        return Plan("host", size_bytes, host.fit(size_bytes, "windows=None to stream what the memory cannot keep"))
    if may_stream and host.has_windows:
        return _stream(size_bytes, "host", host, host.miss(size_bytes))
    logger.warning("%s: what the page cache cannot keep is read from the disk, and shuffled batches wait for it", host.miss(size_bytes))
    return Plan("host", size_bytes, f"{host.miss(size_bytes)}, the rest is read from the disk")


def _stream(size_bytes: int, kind: Kind, room: Room, why: str) -> Plan:
    """Plan two windows. Raises DeviceError where the budget has no room for them."""
    if not room.window_bytes:
        raise DeviceError(f"{room.words} has no room for two windows of {size_words(LEAST_WINDOW)}; raise it")
    return Plan(kind, size_bytes, why, room.window_bytes)


class Placed:
    """Rows in place, until closed.

    On a device, for kernels: entries, (n,) SHARD, and packed_entries, (n,) PACKED or none, one for each part of the archives;
    table and packed_table, copies of them there. pieces: rows of each entry, and the number of the part that they are of, where
    parts are in pieces.
    """

    def __init__(
        self,
        plan: Plan,
        entries: NDArray[Any],
        table: torch.Tensor | None,
        *,
        packed: tuple[NDArray[Any], torch.Tensor] | None = None,
        pieces: Sequence[tuple[int, Part]] = (),
        release: Callable[[], None] = lambda: None,
    ) -> None:
        self.plan, self.kind, self.entries, self.table = plan, plan.kind, entries, table
        self.packed_entries: NDArray[Any] = np.zeros(0, PACKED) if packed is None else packed[0]
        self.packed_table: torch.Tensor | None = None if packed is None else packed[1]
        self.pieces = tuple(pieces)
        self._release: Callable[[], None] | None = release

    def close(self) -> None:
        """Wait for what still reads the rows, and give their memory back; harmless when repeated."""
        release, self._release = self._release, None
        if release is not None:
            release()
        self.table = self.packed_table = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def place(
    archives: Sequence[Archive], plan: Plan, device: Device | None, *, peers: Peers | None = None, progress: Progress = lambda _: None
) -> Placed:
    """Bring `archives` to where `plan` says, checking every row; returns when they are there.

    peers: those that `plan` was chosen with. progress: called with bytes after each piece. Pinned rows are shared by the processes of
    a node: the first fills them. Divided rows are filled by all of them, and all raise what one of them raises.
    Raises ArchiveError at the first faulty row, DeviceError where memory runs out; then nothing is left in memory.
    """
    if plan.kind == "host" or plan.window_bytes or device is None:
        return Placed(plan, np.zeros(0, SHARD), None)
    layout = Layout(archives)
    with ExitStack() as stack:
        try:
            pieces: list[tuple[int, Part]] = []
            if plan.kind == "node" and peers is not None:
                spots, pieces = place_divided(layout, plan.shares, device, peers, stack=stack, progress=progress)
            else:
                way = _place_on_device if plan.kind == "device" else _place_pinned
                spots = spots_of(layout, *way(layout, device, stack, progress))
            entries, found = _entries(spots), _packed_entries(spots)
            table = upload(entries, device)
            packed = (found, upload(found, device)) if layout.has_packed else None
        except DeviceError as error:
            raise DeviceError(f"{size_words(layout.size_bytes)} of rows could not be placed ({plan.kind}): {error}") from error
        release = stack.pop_all().close
    return Placed(plan, entries, table, packed=packed, pieces=pieces, release=release)


def _place_on_device(layout: Layout, device: Device, stack: ExitStack, progress: Progress) -> tuple[int, list[bool]]:
    """Copy the rows into memory of the device; return its address, and for each archive whether its rows ascend."""
    sink = Bounced(device, device.allocate(layout.size_bytes))
    stack.callback(sink.clear)
    stack.callback(_wait, device)
    is_sorted = fill(layout, sink, progress)
    device.record().wait()  # waits, once: whatever stream launches later finds the rows
    return sink.slab.data_ptr(), is_sorted


def _place_pinned(layout: Layout, device: Device, stack: ExitStack, progress: Progress) -> tuple[int, list[bool]]:
    """Fill the arena of these archives, unless another process did, and page-lock it; processes do so one after the other."""
    try:
        arena = Arena(layout.arena_bytes, layout.name())
    except OSError as error:
        raise DeviceError(f'the host has no memory for it: {error}; choose placement="host"') from error
    stack.callback(arena.close)
    flags = arena.memory[layout.size_bytes :].numpy()
    with arena.locked():
        if arena.is_sealed:
            progress(layout.size_bytes)
        else:
            flags[:] = fill(layout, InPlace(arena.memory), progress)
            arena.seal()
        base = device.pin(arena.memory)
    stack.callback(device.unpin, arena.memory)
    stack.callback(_wait, device)
    return base, [bool(flag) for flag in flags]


def _wait(device: Device) -> None:
    """Wait for all that is enqueued, before memory goes away that it may use."""
    device.record().wait()  # waits


def _entries(spots: Sequence[Spot]) -> NDArray[Any]:
    """Make the table of shards: of raw parts, the others are empty."""
    entries = np.zeros(len(spots), SHARD)
    entries["is_sorted"] = True
    for entry, (part, plot, base, is_sorted) in zip(entries, spots, strict=True):
        archive = part.archive
        if isinstance(archive, RawArchive) and isinstance(plot, RawPlot):
            entry["indices"], entry["data"], entry["nnz"] = _address(base, plot.indices), _address(base, plot.data), part.limit
            entry["index_bytes"], entry["kind"], entry["is_sorted"] = archive.indices.itemsize, kind_of(archive.dtype), is_sorted
    return entries


def _packed_entries(spots: Sequence[Spot]) -> NDArray[Any]:
    """Make the table of packed shards; other parts are empty."""
    entries = np.zeros(len(spots), PACKED)
    for entry, (part, plot, base, _) in zip(entries, spots, strict=True):
        if part.shard is not None and isinstance(plot, PackedPlot):
            entry["payload"], entry["words"], entry["source"] = _address(base, plot.payload), part.limit, part.shard.source
    return entries


def _address(base: int, offset: int) -> int:
    """Add as kernels do: element 0 of a file may lie far before the memory that holds others of it."""
    return (base + offset) % (1 << 64)
