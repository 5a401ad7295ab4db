"""What the consumer of a loader gets: one batch.

Knows tensors, not where they came from. All of them lie on one device and belong to the same rows, in the same order.
"""

from dataclasses import dataclass, field
from typing import Any, Self

import torch


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch of b rows.

    x: (b, genes) sparse CSR, or (b, width) dense. rows: (b,) int64, global row numbers.
    obs: one tensor (b,) for each column asked for: int64 codes of categories and strings, -1 where missing; bool; or numbers.
    is_padding: (b,) bool, rows that only fill up the last batch of an epoch.
    """

    x: torch.Tensor
    rows: torch.Tensor
    obs: dict[str, torch.Tensor] = field(default_factory=dict)
    is_padding: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))

    def __len__(self) -> int:
        return int(self.rows.shape[0])

    def to(self, device: torch.device | str | int | None = None, dtype: torch.dtype | None = None, *, non_blocking: bool = False) -> Self:
        """Return the batch moved to `device`; `dtype` is that of x."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        obs = {name: move(column) for name, column in self.obs.items()}
        return type(self)(self.x.to(device, dtype, non_blocking=non_blocking), move(self.rows), obs, move(self.is_padding))

    def pin_memory(self, device: Any = None) -> Self:
        """Return the batch in page-locked memory; what a DataLoader with pin_memory=True calls."""
        obs = {name: column.pin_memory(device) for name, column in self.obs.items()}
        return type(self)(self.x.pin_memory(device), self.rows.pin_memory(device), obs, self.is_padding.pin_memory(device))
