"""Every public name of bionemo-scdl, flat: code that moves over changes its imports and nothing else.

Knows names only. `from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset` becomes
`from scdl_gpu.compat import SingleCellMemMapDataset`, and so for every other module of the reference.
"""

from scdl_gpu.archive.codec import BinaryHeaderCodec, Endianness
from scdl_gpu.archive.constants import (
    FLOAT_ORDER,
    INT_ORDER,
    ArrayDType,
    Backend,
    FileNames,
    Mode,
    NeighborSamplingStrategy,
    determine_dtype,
    smallest_uint_dtype,
)
from scdl_gpu.archive.features import ObservedFeatureIndex, RowFeatureIndex, VariableFeatureIndex, are_dicts_equal
from scdl_gpu.archive.header import (
    ArrayInfo,
    FeatureIndexInfo,
    HeaderReader,
    SCDLHeader,
    create_header_from_arrays,
    merge_headers,
    validate_header_compatibility,
)
from scdl_gpu.archive.memmap import (
    _create_compressed_sparse_row_memmaps,
    _create_data_col_memmaps,
    _create_row_memmaps,
    _extract_features,
    _pad_sparse_array,
)
from scdl_gpu.archive.version import SCDL_MAGIC_NUMBER, CurrentSCDLVersion, SCDLVersion, Version
from scdl_gpu.collate import collate_neighbor_sparse_matrix_batch, collate_sparse_matrix_batch
from scdl_gpu.collection import SingleCellCollection
from scdl_gpu.dataset import SingleCellMemMapDataset
from scdl_gpu.errors import HeaderSerializationError
from scdl_gpu.row_dataset import SingleCellRowDataset, SingleCellRowDatasetCore

__all__ = [
    "FLOAT_ORDER",
    "INT_ORDER",
    "SCDL_MAGIC_NUMBER",
    "ArrayDType",
    "ArrayInfo",
    "Backend",
    "BinaryHeaderCodec",
    "CurrentSCDLVersion",
    "Endianness",
    "FeatureIndexInfo",
    "FileNames",
    "HeaderReader",
    "HeaderSerializationError",
    "Mode",
    "NeighborSamplingStrategy",
    "ObservedFeatureIndex",
    "RowFeatureIndex",
    "SCDLHeader",
    "SCDLVersion",
    "SingleCellCollection",
    "SingleCellMemMapDataset",
    "SingleCellRowDataset",
    "SingleCellRowDatasetCore",
    "VariableFeatureIndex",
    "Version",
    "_create_compressed_sparse_row_memmaps",
    "_create_data_col_memmaps",
    "_create_row_memmaps",
    "_extract_features",
    "_pad_sparse_array",
    "are_dicts_equal",
    "collate_neighbor_sparse_matrix_batch",
    "collate_sparse_matrix_batch",
    "create_header_from_arrays",
    "determine_dtype",
    "merge_headers",
    "smallest_uint_dtype",
    "validate_header_compatibility",
]
