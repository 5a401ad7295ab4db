"""The abstract classes that bionemo-scdl's datasets and collections derive from.

Knows the names of the questions, not one answer but `sparsity`.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch.utils.data import Dataset


class SingleCellRowDatasetCore(ABC):
    """What datasets and collections of rows can be asked."""

    @abstractmethod
    def load_h5ad(self, h5ad_path: str) -> None:
        """Take in an h5ad file."""

    @abstractmethod
    def number_nonzero_values(self) -> int:
        """Count the stored elements, explicit zeros included."""

    @abstractmethod
    def number_of_values(self) -> int:
        """Count the elements of the dense matrix."""

    @abstractmethod
    def number_of_rows(self) -> int:
        """Count the rows."""

    @abstractmethod
    def shape(self) -> tuple[int, list[int]]:
        """Return the number of rows, and the number of variables of each block."""

    @abstractmethod
    def version(self) -> str:
        """Return the version of the installed package."""

    def sparsity(self) -> float:
        """Return the share of the dense matrix that is not stored; 0.0 where there is nothing."""
        total = int(self.number_of_values())
        return (total - self.number_nonzero_values()) / total if total else 0.0


class SingleCellRowDataset(SingleCellRowDatasetCore, Dataset[torch.Tensor]):
    """A torch Dataset of rows that can be opened and saved."""

    @abstractmethod
    def load(self, data_path: Any) -> None:
        """Open what is at `data_path`."""

    @abstractmethod
    def save(self, data_path: Any) -> bool:
        """Save, to `data_path` if given."""
