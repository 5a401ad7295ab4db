"""Single-cell batches assembled where they are needed: the public names, nothing else.

A name is imported when it is first used: `scdl-gpu --help` and the processes of a conversion need no torch, whose
import costs two seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from scdl_gpu.errors import (
    ArchiveError,
    DeviceError,
    HeaderSerializationError,
    MissingFileError,
    MissingMatrixError,
    ScdlError,
    SourceError,
)
from scdl_gpu.version import __version__

if TYPE_CHECKING:
    from scdl_gpu.batch import Batch
    from scdl_gpu.collate import collate_neighbor_sparse_matrix_batch, collate_sparse_matrix_batch
    from scdl_gpu.collection import SingleCellCollection
    from scdl_gpu.convert import convert_h5ad
    from scdl_gpu.dataset import SingleCellMemMapDataset
    from scdl_gpu.loader import GPUBatchLoader
    from scdl_gpu.order import RowSampler

__all__ = [
    "ArchiveError",
    "Batch",
    "DeviceError",
    "GPUBatchLoader",
    "HeaderSerializationError",
    "MissingFileError",
    "MissingMatrixError",
    "RowSampler",
    "ScdlError",
    "SingleCellCollection",
    "SingleCellMemMapDataset",
    "SourceError",
    "__version__",
    "collate_neighbor_sparse_matrix_batch",
    "collate_sparse_matrix_batch",
    "convert_h5ad",
]

_HOMES = {
    "Batch": "batch",
    "GPUBatchLoader": "loader",
    "RowSampler": "order",
    "SingleCellCollection": "collection",
    "SingleCellMemMapDataset": "dataset",
    "collate_neighbor_sparse_matrix_batch": "collate",
    "collate_sparse_matrix_batch": "collate",
    "convert_h5ad": "convert",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted({*globals(), *__all__})
