"""What the consumer of a loader gets: one batch.

Knows tensors, not where they came from. All of them lie on one device and belong to the same rows, in the same order.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import torch


@dataclass(slots=True, eq=False)
class Batch:
    """One batch of b rows.

    x: (b, genes) sparse CSR, or (b, width) dense. rows: (b,) int64, global row numbers.
    obs: one tensor (b,) for each column asked for: int64 codes of categories and strings, -1 where missing; bool; or numbers, NaN where
        missing: integers and bool are float64 then, in which integers above 2^53 are rounded.
    is_padding: (b,) bool, rows that only fill up the last batch of an epoch.
    """

    # Not frozen: Lightning's apply_to_collection copies a dataclass and sets its fields.
    x: torch.Tensor
    rows: torch.Tensor
    obs: dict[str, torch.Tensor] = field(default_factory=dict)
    is_padding: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))

    def __len__(self) -> int:
        return int(self.rows.shape[0])

    def to(
        self, device: torch.device | torch.dtype | str | int | None = None, dtype: torch.dtype | None = None, *, non_blocking: bool = False
    ) -> Self:
        """Return the batch moved to `device`; `dtype`, which may stand alone, is that of x."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        target = self.x.device if device is None else device
        moved = self._changed(lambda tensor: tensor.to(target, non_blocking=non_blocking))
        moved.x = moved.x.to(dtype=dtype) if dtype is not None else moved.x
        return moved

    def pin_memory(self, device: Any = None) -> Self:
        """Return the batch in page-locked memory; what a DataLoader with pin_memory=True calls."""
        return self._changed(_pinned)

    def _changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        obs = {name: change(column) for name, column in self.obs.items()}
        return type(self)(change(self.x), change(self.rows), obs, change(self.is_padding))


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.layout != torch.sparse_csr:
        return tensor.pin_memory()
    indptr, indices, values = (part.pin_memory() for part in (tensor.crow_indices(), tensor.col_indices(), tensor.values()))
    return torch.sparse_csr_tensor(indptr, indices, values, tuple(tensor.shape), check_invariants=False)
