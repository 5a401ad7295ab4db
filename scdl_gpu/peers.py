"""The processes of one node that hold rows for each other: what they agree on, and whose memory is still read.

Knows processes of torch.distributed and memory of devices, not rows. Every step is taken by all of them together: where one
fails, all raise, and none waits for it. That memory is given back needs no such step: a reader holds a lock that the kernel lets
go where it dies. The price is that `Lent.close` waits for those that live, and after CLOSE_SECONDS keeps the memory.
"""

import logging
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from scdl_gpu import errors
from scdl_gpu.arena import Arena
from scdl_gpu.device import Device
from scdl_gpu.errors import DeviceError, ScdlError

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 60.0
"""That `Lent.close` waits for processes that live and still read."""
BOOT = Path("/proc/sys/kernel/random/boot_id")
_KEPT: list[torch.Tensor] = []
"""Memory that was still read when it was to be given back: it stays until the process ends."""


class _Said(NamedTuple):
    """What one process tells the others of a step: what came of it, or which error, and its text."""

    value: Any = None
    error: str = ""
    text: str = ""


class Peers:
    """The processes of this node. ranks: what torch.distributed calls them; own: the place of this one among them."""

    def __init__(self, ranks: Sequence[int], own: int, group: Any) -> None:
        self.ranks, self.own, self._group = tuple(ranks), own, group

    def gather(self, what: str, step: Callable[[], Any]) -> list[Any]:
        """Take a step, as the others do at the same time, and return what came of it for each; it is pickled. Waits for all of them.

        Where it fails for one, that one raises its error, and the others an error with its text, an ArchiveError for an ArchiveError.
        Raises DeviceError where one dies, or does not come within the timeout of torch.distributed, 30 minutes.
        """
        try:
            said = _Said(step())
        except BaseException as error:
            self._exchange(what, _Said(error=type(error).__name__, text=str(error)))
            raise
        found = self._exchange(what, said)
        for rank, other in zip(self.ranks, found, strict=True):
            if other.error:
                kind = getattr(errors, other.error, DeviceError)
                kind = kind if isinstance(kind, type) and issubclass(kind, ScdlError) else DeviceError
                raise kind(f"rank {rank} could not {what}: {other.error}: {other.text}")
        return [other.value for other in found]

    def _exchange(self, what: str, said: _Said) -> list[_Said]:
        found: list[Any] = [None] * len(self.ranks)
        try:
            dist.all_gather_object(found, said, group=self._group)
        except RuntimeError as error:
            raise DeviceError(
                f"the ranks {', '.join(map(str, self.ranks))} could not {what} together: one died, or makes no loader: {error}"
            ) from error
        return found


def peers_for(placement: str, *, may_meet: bool) -> Peers | None:
    """Meet the processes of this node where `placement` asks for it, or "auto" may: where there are others, and they `may_meet`."""
    if placement == "node":
        return meet()
    if placement == "auto" and may_meet and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return meet()
    return None


def meet() -> Peers:
    """Find the processes of torch.distributed on this node; all processes must, at the same point. Raises DeviceError without any."""
    if not (dist.is_available() and dist.is_initialized()):
        raise DeviceError(
            'placement="node" divides rows over the processes of torch.distributed: start them with torchrun and call '
            'torch.distributed.init_process_group, or choose placement="device"'
        )
    return _meet(dist.group.WORLD)


@lru_cache(maxsize=1)
def _meet(_: Any) -> Peers:
    """Meet once for each default group. The groups are gloo's: what is told is of the host, and the user's own stays out of it."""
    everybody = Peers(range(dist.get_world_size()), dist.get_rank(), dist.new_group(backend="gloo"))
    nodes = everybody.gather("find the ranks of its node", node)
    found = everybody
    for name in dict.fromkeys(nodes):  # all make all groups, as torch.distributed demands
        ranks = [rank for rank, other in enumerate(nodes) if other == name]
        group = dist.new_group(ranks, backend="gloo") if len(ranks) < len(nodes) else None
        if group is not None and dist.get_rank() in ranks:
            found = Peers(ranks, ranks.index(dist.get_rank()), group)
    return found


def node() -> str:
    """Name the machine, as long as it runs: containers on it have host names of their own."""
    return BOOT.read_text().strip()


class Lent:
    """Memory of this process that its peers read, and theirs that this one reads: `addresses`, of all of them, in the order of ranks.

    All of them must come here at the same point, when their memory is filled. Raises DeviceError, and then holds nothing.
    """

    def __init__(self, peers: Peers, device: Device, memory: torch.Tensor) -> None:
        self._memory = memory
        del memory  # an error would keep it as long as its traceback
        self.addresses: list[int] = []
        with ExitStack() as stack:
            told = peers.gather("lend its memory", partial(self._tell, device, stack))
            peers.gather("read its peers' memory", partial(self._open, told, peers.own, device, stack))
            self._close = stack.pop_all().close

    def _tell(self, device: Device, stack: ExitStack) -> tuple[str, bytes]:
        """Tell by which lock the memory is held, and how it is opened."""
        name = uuid.uuid4().hex
        arena = Arena(1, name)
        stack.callback(self._take_back, arena)
        arena.seal()
        return name, device.share(self._memory)

    def _open(self, told: Sequence[tuple[str, bytes]], own: int, device: Device, stack: ExitStack) -> None:
        """Open the memory of the others, and hold it."""
        for place, (name, handle) in enumerate(told):
            if place == own:
                self.addresses.append(self._memory.data_ptr())
                continue
            arena = Arena(1, name)
            stack.callback(arena.close)
            if not arena.is_sealed:
                raise DeviceError(f"the process of place {place} on this node is not seen in /proc: let containers share the PID namespace")
            stack.enter_context(arena.held())
            self.addresses.append(device.open_shared(handle))
            stack.callback(device.close_shared, self.addresses[-1])

    def _take_back(self, arena: Arena) -> None:
        """Wait until nobody reads the memory, and let it go; keep it where somebody does too long."""
        deadline = time.monotonic() + CLOSE_SECONDS
        while arena.is_held and time.monotonic() < deadline:
            time.sleep(0.005)
        if arena.is_held:
            logger.warning("another process still reads rows of this one after %.0f s: they stay until this one ends", CLOSE_SECONDS)
            _KEPT.append(self._memory)
        arena.close()
        self._memory = torch.empty(0, dtype=torch.uint8)

    def close(self) -> None:
        """Let go of the others' memory; then wait until they, or the kernel for those that died, let go of this one's."""
        self._close()
