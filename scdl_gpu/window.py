"""Rows in memory that batches are made of: a window of an epoch that streams, or all rows of a resident dataset, which are one window.

Knows tables of addresses and the memory behind them, not how it was filled.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scdl_gpu.archive.parts import Parts
from scdl_gpu.device import Device
from scdl_gpu.kernels.gpu import Table
from scdl_gpu.kernels.packed import PACKED


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """parts: where rows lie, by their numbers in the window. raw: SHARD, and packed: PACKED, an entry for each part, for kernels.

    there: copies of the tables on a device, where kernels there read them.
    """

    parts: Parts
    raw: Table
    packed: Table
    there: tuple[torch.Tensor, ...] = ()

    @classmethod
    def on_host(cls, parts: Parts, raw: NDArray[Any], packed: NDArray[Any]) -> "Window":
        """Tell kernels on the CPU of rows by tables of addresses."""
        return cls(parts, Table(raw, raw.ctypes.data), Table(packed, packed.ctypes.data))

    @classmethod
    def on_device(cls, parts: Parts, raw: NDArray[Any], packed: NDArray[Any], device: Device) -> "Window":
        """Tell kernels on a device, which need copies of the tables there; waits for them."""
        there = upload(raw, device), upload(packed, device)
        return cls(parts, Table(raw, there[0].data_ptr()), Table(packed, there[1].data_ptr()), there)


def mapped(parts: Parts) -> Window | None:
    """Make the window of all rows of archives, by addresses of their maps; None where some rows are behind a URL, and not in these."""
    if parts.is_remote:
        return None
    return Window.on_host(parts, parts.raw_table, parts.packed_table if parts.is_packed.any() else np.zeros(0, PACKED))


def upload(table: NDArray[Any], device: Device) -> torch.Tensor:
    """Copy an array to the device, as uint8; waits for it."""
    if table.nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    host, there = device.staging(table.nbytes), device.allocate(table.nbytes)[: table.nbytes]
    host.numpy()[:] = table.view(np.uint8).reshape(-1)
    device.upload(host, there)
    device.record().wait()  # waits, once
    return there
