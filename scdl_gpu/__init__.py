"""Single-cell batches assembled where they are needed: the public names, nothing else."""

from scdl_gpu.collate import collate_neighbor_sparse_matrix_batch, collate_sparse_matrix_batch
from scdl_gpu.collection import SingleCellCollection
from scdl_gpu.convert import convert_h5ad
from scdl_gpu.dataset import SingleCellMemMapDataset
from scdl_gpu.errors import ArchiveError, HeaderSerializationError, MissingFileError, ScdlError, SourceError
from scdl_gpu.version import __version__

__all__ = [
    "ArchiveError",
    "HeaderSerializationError",
    "MissingFileError",
    "ScdlError",
    "SingleCellCollection",
    "SingleCellMemMapDataset",
    "SourceError",
    "__version__",
    "collate_neighbor_sparse_matrix_batch",
    "collate_sparse_matrix_batch",
    "convert_h5ad",
]
