"""Rows divided over the memory of the devices of one node, each process of which reads all of them.

Knows shares of the rows and who holds them, not batches. A process holds one stretch of rows, so that the table of shards has as
many entries more as there are processes; a kernel follows addresses, and does not see whose memory it reads. All processes decide
and place together. The price: where a batch is shuffled, all but one row in as many as there are devices come from a peer.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch

from scdl_gpu.archive.cuts import divided
from scdl_gpu.archive.parts import Part
from scdl_gpu.device import Device, size_words
from scdl_gpu.errors import DeviceError
from scdl_gpu.kernels.packed import SLACK_BYTES
from scdl_gpu.kernels.shards import ALIGNMENT
from scdl_gpu.peers import Lent, Peers
from scdl_gpu.slab import Bounced, Layout, PackedPlot, Progress, RawPlot, fill


class Division(NamedTuple):
    """How the processes of this node may divide the rows, the same for all. shares: bytes for each, none where it is not possible; why.

    is_needed: some device does not hold all rows alone, and each process has a device of its own.
    """

    shares: tuple[int, ...]
    why: str
    is_needed: bool = False


class Spot(NamedTuple):
    """Where rows lie: their plot in a slab that kernels see at `base`."""

    part: Part
    plot: RawPlot | PackedPlot
    base: int
    is_sorted: bool


class _Told(NamedTuple):
    """What a process tells the others: its device, what is free there for rows, and what its rows are named."""

    bus_id: str
    limit: int
    name: str


def divide(peers: Peers, layout: Layout, device: Device | None, limit: Callable[[Device], int]) -> Division:
    """Ask all processes of this node what they have room for, and divide the rows: equally, but for devices with too little room.

    limit: gives the bytes that rows may take on a device, which processes that share one divide. Raises what it raises for one of
    them, in all.
    """

    def tell() -> _Told:
        if device is None:
            raise ValueError('placement="node" needs a GPU for each rank')
        return _Told(device.bus_id(), limit(device), layout.name())

    found: list[_Told] = peers.gather("say what it has room for", tell)
    far = peers.gather("look for its peers", lambda: [] if device is None else [o.bus_id for o in found if not device.reaches(o.bus_id)])
    for rank, told, beyond in zip(peers.ranks, found, far, strict=True):
        if told.name != found[0].name:
            return Division((), f"rank {rank} has other rows than rank {peers.ranks[0]}")
        if beyond:
            return Division((), f"the device of rank {rank}, {told.bus_id}, has no peer access to {', '.join(sorted(set(beyond)))}")
    devices = [told.bus_id for told in found]
    limits = [told.limit // devices.count(told.bus_id) for told in found]
    shares = _shares(layout, limits)
    words = f"the budgets of {len(limits)} ranks on this node, {', '.join(size_words(limit) for limit in limits)}"
    layouts = _layouts(_pieces(layout.parts, shares), len(limits))
    if any(own.size_bytes > limit for own, limit in zip(layouts, limits, strict=True)):
        return Division((), f"{size_words(layout.size_bytes)} of rows exceed {words}")
    is_needed = len(set(devices)) == len(devices) > 1 and min(limits) < layout.size_bytes
    return Division(tuple(shares), f"{size_words(layout.size_bytes)} of rows fit {words}", is_needed)


def _shares(layout: Layout, limits: Sequence[int]) -> list[int]:
    """Divide the bytes of a slab: each holder the same, or what it has room for beside what fills up its pieces, where that is less."""
    left, shares = layout.size_bytes, [0] * len(limits)
    beside = SLACK_BYTES + 4 * ALIGNMENT * (len(layout.plots) + 1)
    for k, holder in enumerate(sorted(range(len(limits)), key=limits.__getitem__)):
        shares[holder] = min(max(0, limits[holder] - beside), -(-left // (len(limits) - k)))
        left -= shares[holder]
    return shares


def place_divided(
    layout: Layout, shares: Sequence[int], device: Device, peers: Peers, *, stack: ExitStack, progress: Progress
) -> tuple[list[Spot], list[tuple[int, Part]]]:
    """Copy this process's share into memory of its device, checking every row, and open what the others hold: all do, or all raise.

    Returns where each piece of the parts lies, and the pieces: the number of the part, and its rows. `stack` gives all back; it first
    waits for the device, and then for the others, see `Lent`.
    """
    dealt = _pieces(layout.parts, shares)
    layouts = _layouts(dealt, len(shares))
    memory: list[torch.Tensor] = []
    stack.callback(memory.clear)  # an error of another process would keep it as long as its traceback

    def fill_own() -> list[bool]:
        own = layouts[peers.own]
        sink = Bounced(device, device.shareable(own.size_bytes))
        stack.callback(sink.clear)
        stack.callback(_wait, device)
        is_sorted = fill(own, sink, progress)
        _wait(device)  # waits, once: whoever reads later finds the rows
        memory.append(sink.slab)
        return is_sorted

    is_sorted = peers.gather("place its share of the rows", fill_own)
    lent = Lent(peers, device, memory.pop())
    stack.callback(lent.close)
    stack.callback(_wait, device)
    spots = [iter(spots_of(*one)) for one in zip(layouts, lent.addresses, is_sorted, strict=True)]
    return [next(spots[holder]) for holder, _, _ in dealt], [(number, piece) for _, number, piece in dealt]


def spots_of(layout: Layout, base: int, is_sorted: Sequence[bool]) -> list[Spot]:
    """Tell for each part of a slab where it lies. is_sorted: of each plot. Raises DeviceError for a base that kernels cannot read from."""
    if base % ALIGNMENT:
        raise DeviceError(f"memory begins at {base:#x}, expected a multiple of {ALIGNMENT}")
    return [Spot(part, layout.plots[number], base, is_sorted[number]) for part, number in zip(layout.parts, layout.numbers, strict=True)]


def _pieces(parts: Sequence[Part], shares: Sequence[int]) -> list[tuple[int, int, Part]]:
    """Give the pieces of all parts, in their order: holder, number of the part, rows."""
    return [(holder, number, piece) for number, pieces in enumerate(divided(parts, shares)) for holder, piece in pieces]


def _layouts(dealt: Sequence[tuple[int, int, Part]], n_holders: int) -> list[Layout]:
    """Lay out what each holder has."""
    held: list[list[Any]] = [[] for _ in range(n_holders)]
    for holder, _, piece in dealt:
        held[holder].append(piece)
    return [Layout(pieces) for pieces in held]


def _wait(device: Device) -> None:
    """Wait for all that is enqueued, before memory goes away that it may use."""
    device.record().wait()  # waits
