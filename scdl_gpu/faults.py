"""What kernels on a device find wrong, on its way to the host.

Knows codes and batches by their rows, not what a fault means. Asking with every batch would cost as much of the host's time as
the launch does.
"""

from collections import deque

import numpy as np
import torch
from numpy.typing import NDArray

from scdl_gpu.device import Device, Event
from scdl_gpu.kernels.shards import FAULTS, NO_FAULT

Ints = NDArray[np.int64]
ASK_EVERY = 16
"""Batches after which the device is asked for faults."""


class Faults:
    """What kernels report: on the device until asked for, then on the host, without a wait.

    codes: (FAULTS,) int32 on the device, what kernels take as `out_fault`.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        size_bytes = 4 * FAULTS
        self._clean, self._report = device.staging(size_bytes), device.staging(size_bytes)
        self._clean.numpy().view(np.int32)[:] = NO_FAULT
        self._there = device.allocate(size_bytes)[:size_bytes]
        self.codes = self._there.view(torch.int32)
        self._unchecked: deque[Ints] = deque()
        self._reported: Event | None = None
        self._n_reported = 0
        self.reset()

    @property
    def n_unchecked(self) -> int:
        """How many batches the host knows nothing of."""
        return len(self._unchecked)

    def reset(self) -> None:
        """Enqueue the clearing, and forget all batches."""
        self._device.upload(self._clean, self._there)
        self._unchecked.clear()
        self._reported = None

    def clear(self) -> None:
        """Let the memory on the device go; nothing may be under way."""
        self._unchecked.clear()
        self._reported = None
        self._there = self.codes = torch.empty(0, dtype=torch.int32)

    def made(self, rows: Ints) -> None:
        """Count a batch whose gather is enqueued, and ask from time to time."""
        self._unchecked.append(rows)
        if len(self._unchecked) >= ASK_EVERY:
            self.ask()

    def ask(self) -> None:
        """Let the faults come to the host, unless an answer is on its way."""
        if self._reported is None:
            self._device.download(self._there, self._report)
            self._reported, self._n_reported = self._device.record(), len(self._unchecked)

    def answer(self, *, wait: bool) -> tuple[int, list[Ints]] | None:
        """Return the least faulty position and the batches that it may be of, if there is one in an answer that came back.

        wait: for the answer, if one is on its way.
        """
        if self._reported is None:
            return None
        if wait:
            self._reported.wait()  # waits, at the end of an epoch
        elif not self._reported.is_done():
            return None
        self._reported = None
        suspects = [self._unchecked.popleft() for _ in range(self._n_reported)]
        position = int(self._report.numpy().view(np.int32).min())
        return None if position == NO_FAULT else (position, suspects)
