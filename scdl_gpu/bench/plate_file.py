"""One h5ad file on its way to disk, block by block.

Knows the layout of anndata's format, 0.1.0 of the file and 0.2.0 of tables, not what the rows mean. Arrays grow as rows come: nothing
is held but the block at hand.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np
from numpy.typing import NDArray

CHUNK = 1 << 18
NUMBERS = ("gene_count", "tscp_count")


class PlateFile:
    """A CSR matrix of counts as float32, with obs columns of categories, and of numbers as int64.

    categories: of each such column; is_long: gene numbers as int64, as SciPy has them where there are 2^31 nonzeros.
    """

    def __init__(self, path: Path, n_vars: int, categories: Mapping[str, Sequence[str]], *, is_long: bool, compression: str | None) -> None:
        self._file = h5py.File(path, "w")
        self._n_vars, self._compression = n_vars, compression
        self._file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        self._x = self._file.create_group("X")
        self._data = self._growing(self._x, "data", np.float32)
        self._indices = self._growing(self._x, "indices", np.int64 if is_long else np.int32)
        self._indptr = self._growing(self._x, "indptr", np.int64)
        self._indptr.resize((1,))
        self._obs: dict[str, Any] = {}
        obs = self._table("obs", [*categories, *NUMBERS])
        self._obs["_index"] = self._array(self._growing(obs, "_index", h5py.string_dtype()), "string-array")
        for name, words in categories.items():
            group = obs.create_group(name)
            group.attrs.update({"encoding-type": "categorical", "encoding-version": "0.2.0", "ordered": False})
            self._obs[name] = self._array(self._growing(group, "codes", np.int8 if len(words) < 128 else np.int16), "array")
            self._array(group.create_dataset("categories", data=list(words), dtype=h5py.string_dtype()), "string-array")
        for name in NUMBERS:
            self._obs[name] = self._array(self._growing(obs, name, np.int64), "array")
        self._write_var()

    def _write_var(self) -> None:
        var = self._table("var", ["gene_name"])
        for name, words in (("_index", "ENSG{:011d}"), ("gene_name", "GENE{}")):
            names = [words.format(gene) for gene in range(self._n_vars)]
            self._array(var.create_dataset(name, data=names, dtype=h5py.string_dtype()), "string-array")
        for name in ("layers", "obsm", "obsp", "varm", "varp", "uns"):
            self._file.create_group(name).attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})

    def _table(self, name: str, columns: list[str]) -> Any:
        group = self._file.create_group(name)
        group.attrs.update({"encoding-type": "dataframe", "encoding-version": "0.2.0", "_index": "_index"})
        group.attrs["column-order"] = np.array(columns, dtype=h5py.string_dtype())
        return group

    def _growing(self, group: Any, name: str, dtype: Any) -> Any:
        return group.create_dataset(name, (0,), dtype, maxshape=(None,), chunks=(CHUNK,), compression=self._compression)

    @staticmethod
    def _array(dataset: Any, kind: str) -> Any:
        dataset.attrs.update({"encoding-type": kind, "encoding-version": "0.2.0"})
        return dataset

    def append(self, lengths: NDArray[np.int64], genes: NDArray[Any], counts: NDArray[Any], obs: Mapping[str, Any]) -> None:
        """Add rows: nonzeros of each, their genes and counts one row after the other, and obs by column."""
        before = self._data.shape[0]
        _extend(self._data, counts)
        _extend(self._indices, genes)
        _extend(self._indptr, before + np.cumsum(lengths))
        for name, column in self._obs.items():
            _extend(column, obs[name])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        shape = np.array([self._indptr.shape[0] - 1, self._n_vars])
        self._x.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": shape})
        self._file.close()


def _extend(dataset: Any, values: Any) -> None:
    before = dataset.shape[0]
    dataset.resize((before + len(values),))
    dataset[before:] = values
