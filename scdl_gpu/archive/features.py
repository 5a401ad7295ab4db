"""Feature indices: which block of obs or var columns each row of the dataset belongs to (bionemo-scdl's API).

Knows blocks, their labels and how many rows each stands for; not the matrix, nor how a column lies on disk.
A lookup costs a comparison with the block of the last one, else a binary search over the blocks; appending equal
or alike blocks joins them when a column is asked for, not before.
"""

import os
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from operator import index as as_integer
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scdl_gpu.archive.blocks import Block, JoinedBlock, MemoryBlock
from scdl_gpu.archive.columns import Column, Values
from scdl_gpu.archive.feature_files import StoredIndex, read_index, write_index
from scdl_gpu.version import __version__

__all__: Sequence[str] = ("ObservedFeatureIndex", "VariableFeatureIndex", "are_dicts_equal")


def are_dicts_equal(dict1: Mapping[str, Any], dict2: Mapping[str, Any]) -> bool:
    """Tell whether two dicts have the same keys, in any order, and equal arrays; NaN is not equal to itself here."""
    return dict1.keys() == dict2.keys() and all(np.array_equal(dict1[key], dict2[key]) for key in dict1)


class RowFeatureIndex(ABC):
    """Blocks of columns, each for a run of rows."""

    def __init__(self) -> None:
        self._restore(StoredIndex(np.array([-1], dtype=np.int64), [], [], __version__))

    def _restore(self, stored: StoredIndex) -> None:
        self._cumulative_sum_index = stored.cumulative
        self._blocks = stored.blocks
        self._labels = stored.labels
        self._version = stored.version
        self._num_entries_per_row = [self._width(block) for block in stored.blocks]
        self._last = (0, 0, 0)

    @abstractmethod
    def _width(self, block: Block) -> int:
        """Return what column_dims says of a block."""

    @abstractmethod
    def _merged(self, last: Block, new: Block) -> Block | None:
        """Return one block for both, or None where they stay apart."""

    @abstractmethod
    def concat(self, other_row_index: Any) -> "RowFeatureIndex":
        """Append the blocks of another index of the same class, in place; return self. TypeError for anything else."""

    @classmethod
    def load(cls, datapath: str | os.PathLike[str], *, pickled_paths: bool = False) -> Self:
        """Open an index that was saved by this package or by bionemo-scdl; columns are read when they are asked for.

        pickled_paths: admit labels that old archives hold as pickled paths (read as strings, the pickle is not run).
        The files are mapped: the directory may be replaced or removed afterwards.
        Raises MissingFileError (a FileNotFoundError) and ArchiveError, both naming the file.
        """
        instance = cls()
        instance._restore(read_index(Path(datapath), rows_are_entries=cls._rows_are_entries, pickled_paths=pickled_paths))
        return instance

    _rows_are_entries = False

    def save(self, datapath: str | os.PathLike[str], *, legacy_labels: bool = False) -> None:
        """Write the index into a directory, made if need be; files of an earlier save that are not replaced are removed.

        legacy_labels: also labels.npy, without which bionemo-scdl 0.1.3 cannot open it.
        Raises ValueError naming a column that holds what no file can. Not durable: syncing is the caller's part.
        """
        stored = StoredIndex(self._cumulative_sum_index, self._blocks, self._labels, self._version)
        write_index(Path(datapath), stored, legacy_labels=legacy_labels)

    def version(self) -> str:
        """Return the version of the package that made the index."""
        return self._version

    def __len__(self) -> int:
        return len(self._blocks)

    def __repr__(self) -> str:
        columns = dict.fromkeys(name for block in self._blocks for name in block.columns)
        shown = ", ".join([*list(columns)[:8], *(["..."] if len(columns) > 8 else [])]) or "none"
        return f"{type(self).__name__}({self.number_of_rows()} rows, {len(self)} block{'s' * (len(self) != 1)}, columns: {shown})"

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks, in row order."""
        return tuple(self._blocks)

    def named_blocks(self) -> list[int]:
        """Return the numbers of the blocks whose rows or variables have names."""
        return [number for number, block in enumerate(self._blocks) if block.has_names]

    def number_of_rows(self) -> int:
        """Return the number of rows that all blocks stand for."""
        return max(int(self._cumulative_sum_index[-1]), 0)

    def column_dims(self) -> list[int]:
        """Return a number per block: variables of a variable index, columns of an observed one."""
        return list(self._num_entries_per_row)

    def number_vars_at_row(self, row: int) -> int:
        """Return column_dims of the block that holds `row`."""
        return self._num_entries_per_row[self._locate(as_integer(row))[2]]

    def number_of_values(self) -> list[int]:
        """Return rows times column_dims for each block; [0] where there is none."""
        if not self._blocks:
            return [0]
        return [n_rows * width for n_rows, width in zip(self._rows_of_blocks(), self._num_entries_per_row, strict=True)]

    def block_of(self, rows: ArrayLike) -> NDArray[np.int64]:
        """Return the number of the block of each of `rows`; IndexError naming the first row out of range."""
        asked = np.asarray(rows)
        outside = (asked < 0) | (asked >= self.number_of_rows())
        if outside.any():
            self._locate(int(asked[outside][0]) if asked.ndim else int(asked))
        return np.searchsorted(self._cumulative_sum_index[1:], asked, side="right").astype(np.int64)

    def _rows_of_blocks(self) -> list[int]:
        ends = self._cumulative_sum_index.clip(min=0)
        return [int(n_rows) for n_rows in np.diff(ends)]

    def _locate(self, row: int) -> tuple[int, int, int]:
        """Return (first row, end, number) of the block that holds `row`."""
        last = self._last
        if last[0] <= row < last[1]:
            return last
        if row < 0:
            raise IndexError(f"Row index {row} is not valid. It must be non-negative.")
        if not self._blocks:
            raise IndexError("There are no features to lookup.")
        n_rows = self.number_of_rows()
        if row >= n_rows:
            raise IndexError(f"Row index {row} is larger than number of rows in FeatureIndex ({n_rows}).")
        number = int(np.searchsorted(self._cumulative_sum_index[1:], row, side="right"))
        start = max(int(self._cumulative_sum_index[number]), 0)
        self._last = (start, int(self._cumulative_sum_index[number + 1]), number)
        return self._last

    def _columns_of(self, block: Block, select_features: Iterable[str] | None) -> list[Column]:
        return [self._column_of(block, name) for name in (block.columns if select_features is None else select_features)]

    def _column_of(self, block: Block, name: str) -> Column:
        try:
            return block.column(name)
        except KeyError:
            raise _unknown(name, block.columns) from None

    def _new_block(self, features: Mapping[str, Any], names: Iterable[str] | None) -> MemoryBlock:
        """Check the arguments of append_features and make a block of them."""
        if not isinstance(features, dict):
            raise TypeError(f"{type(self).__name__}.append_features expects a dict of arrays, not {type(features).__name__}")
        lengths = {name: len(values) for name, values in features.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"All feature arrays must have the same length, not {lengths}")
        known = None if names is None else _names_column(names)
        if known is not None and features and len(known) not in lengths.values():
            raise ValueError(f"All feature arrays must have the same length: {len(known)} names for {set(lengths.values())} entries")
        return MemoryBlock({name: _feature_column(name, values) for name, values in features.items()}, names=known)

    def _append_block(self, block: Block, label: Any, n_rows: int) -> None:
        end = self.number_of_rows() + n_rows
        merged = self._merged(self._blocks[-1], block) if self._blocks else None
        self._last = (0, 0, 0)
        if merged is not None:
            self._blocks[-1] = merged
            self._cumulative_sum_index[-1] = end
            return
        self._cumulative_sum_index = np.append(self._cumulative_sum_index, end)
        self._blocks.append(block)
        self._labels.append(label)
        self._num_entries_per_row.append(self._width(block))

    def _append_all(self, other: "RowFeatureIndex") -> None:
        for block, label, n_rows in list(zip(other._blocks, other._labels, other._rows_of_blocks(), strict=True)):
            self._append_block(block, label, n_rows)


class VariableFeatureIndex(RowFeatureIndex):
    """Columns of .var: one entry a gene; the rows of a block share them."""

    def append_features(self, n_obs: int, features: dict[str, Any], label: Any = None, *, names: Iterable[str] | None = None) -> None:
        """Append `n_obs` rows whose variables are described by `features`, equally long arrays by name.

        Equal to the last block, names included, only its number of rows grows. names: of the variables (var_names).
        """
        block = self._new_block(features, names)
        if as_integer(n_obs) < 0:
            raise ValueError(f"n_obs is {n_obs}, expected a number of rows, 0 or more")
        self._append_block(block, label, as_integer(n_obs))

    def lookup(self, row: int, select_features: Iterable[str] | None = None) -> tuple[list[Values], Any]:
        """Return (arrays, label) of the block that holds `row`: whole columns, the same read-only arrays each time."""
        _, _, number = self._locate(as_integer(row))
        columns = self._columns_of(self._blocks[number], select_features)
        return [column.to_numpy() for column in columns], self._labels[number]

    def block_names(self, number: int) -> Values | None:
        """Return the names of the variables of a block, or None where they are not known. Raises IndexError."""
        names = self._block(number).names()
        return None if names is None else names.to_numpy()

    def block_column(self, number: int, name: str) -> Column:
        """Return a column of the variables of a block. Raises IndexError, and ValueError for an unknown name."""
        return self._column_of(self._block(number), name)

    def _block(self, number: int) -> Block:
        if not -len(self._blocks) <= as_integer(number) < len(self._blocks):
            raise IndexError(f"block {number} is out of range; the index has {len(self._blocks)}")
        return self._blocks[number]

    def concat(self, other_row_index: Any) -> "VariableFeatureIndex":
        """Append the blocks of another index, in place; return self. Equal neighbours become one block."""
        if not isinstance(other_row_index, VariableFeatureIndex):
            raise TypeError("Error: trying to concatenate something that's not a VariableFeatureIndex.")
        self._append_all(other_row_index)
        return self

    def taken(self, places: NDArray[Any]) -> "VariableFeatureIndex":
        """Return the same blocks, their variables in another order. places: the present place of each, for all blocks."""
        index = VariableFeatureIndex()
        for block, label, n_rows in zip(self._blocks, self._labels, self._rows_of_blocks(), strict=True):
            names = block.names()
            columns = {name: block.column(name).take(places) for name in block.columns}
            index._append_block(MemoryBlock(columns, names=None if names is None else names.take(places)), label, n_rows)
        return index

    def _width(self, block: Block) -> int:
        return block.n_rows

    def _merged(self, last: Block, new: Block) -> Block | None:
        if not last.equals(new):
            return None
        known, names = last.names(), new.names()
        if known is None and names is not None:
            return MemoryBlock({name: last.column(name) for name in last.columns}, names=names)
        return last if known is None or names is None or known.equals(names) else None


class ObservedFeatureIndex(RowFeatureIndex):
    """Columns of .obs: one entry a row."""

    _rows_are_entries = True

    def __init__(self) -> None:
        super().__init__()
        self._whole: dict[str, Column] = {}
        self._names: Column | None = None

    def append_features(self, features: dict[str, Any], label: Any = None, *, names: Iterable[str] | None = None) -> None:
        """Append rows, `features` being equally long arrays by name; nothing happens where they are empty.

        With the same set of names as the last block the columns are joined. names: of the rows (obs_names).
        """
        block = self._new_block(features, names)
        if block.n_rows:
            self._append_block(block, label, block.n_rows)

    def lookup(self, row: int, select_features: Iterable[str] | None = None) -> tuple[list[Any], Any]:
        """Return (values, label) of one row: a scalar per feature, missing text is None, a missing nullable number pandas.NA."""
        row = as_integer(row)
        start, _, number = self._locate(row)
        columns = self._columns_of(self._blocks[number], select_features)
        return [column[row - start] for column in columns], self._labels[number]

    def __getitem__(self, idx: int | slice) -> tuple[list[Any], Any]:
        """Return lookup(idx), or for a slice (one dict of arrays per block that it touches, their labels).

        Within a block rows ascend, whatever the step.
        """
        if isinstance(idx, int):
            return self.lookup(idx + self.number_of_rows() if idx < 0 else idx)
        if not isinstance(idx, slice):
            raise TypeError(f"Index must be int or slice, not {type(idx).__name__}")
        rows = range(*idx.indices(self.number_of_rows()))
        ascending = rows if rows.step > 0 else rows[::-1]
        tables, labels = [], []
        for number in self._blocks_between(ascending) if rows.step > 0 else reversed(self._blocks_between(ascending)):
            start, stop = max(int(self._cumulative_sum_index[number]), 0), int(self._cumulative_sum_index[number + 1])
            here = ascending[bisect_left(ascending, start) : bisect_left(ascending, stop)]
            if here:
                block, part = self._blocks[number], slice(here.start - start, here.stop - start, here.step)
                tables.append({name: block.column(name).take(part).to_numpy() for name in block.columns})
                labels.append(self._labels[number])
        return tables, labels

    def _blocks_between(self, ascending: range) -> range:
        if not ascending:
            return range(0)
        return range(self._locate(ascending[0])[2], self._locate(ascending[-1])[2] + 1)

    @property
    def columns(self) -> list[str]:
        """Names of the columns of all blocks, in order of first appearance."""
        return list(dict.fromkeys(name for block in self._blocks for name in block.columns))

    def column(self, name: str) -> Column:
        """Return a column over all rows, missing where a block lacks it; kept. ValueError for an unknown name."""
        if name not in self._whole:
            if name not in self.columns:
                raise _unknown(name, self.columns)
            parts = zip(self._blocks, self._rows_of_blocks(), strict=True)
            joined = [block.column(name) if name in block.columns else Column.missing(n_rows) for block, n_rows in parts]
            self._whole[name] = Column.concat(joined)
        return self._whole[name]

    def name_column(self) -> Column | None:
        """Return the names of all rows as a column, missing where a block has none, or None where no block has any; kept."""
        if self._names is None and any(block.has_names for block in self._blocks):
            parts = [(block.names(), n_rows) for block, n_rows in zip(self._blocks, self._rows_of_blocks(), strict=True)]
            self._names = Column.concat([Column.missing(n_rows) if names is None else names for names, n_rows in parts])
        return self._names

    @property
    def names(self) -> Values | None:
        """Names of all rows (obs_names) as objects, None where a row has none; None where no row has any."""
        names = self.name_column()
        return None if names is None else names.to_numpy()

    def concat(self, other_row_index: Any) -> "ObservedFeatureIndex":
        """Append the blocks of another index, in place; return self. Neighbours with the same set of columns are joined."""
        if not isinstance(other_row_index, ObservedFeatureIndex):
            raise TypeError("Error: trying to concatenate something that's not a ObservedFeatureIndex.")
        self._append_all(other_row_index)
        return self

    def _append_block(self, block: Block, label: Any, n_rows: int) -> None:
        super()._append_block(block, label, n_rows)
        self._whole, self._names = {}, None

    def _width(self, block: Block) -> int:
        return len(block.columns)

    def _merged(self, last: Block, new: Block) -> Block | None:
        if set(last.columns) != set(new.columns):
            return None
        return JoinedBlock([*(last.parts if isinstance(last, JoinedBlock) else [last]), new])


def _unknown(name: Any, columns: Iterable[str]) -> ValueError:
    there = ", ".join(map(repr, columns)) or "none"
    return ValueError(f"Provided feature column {name} in select_features not present in dataset. Its columns: {there}")


def _feature_column(name: Any, values: Any) -> Column:
    if not isinstance(name, str):
        raise TypeError(f"feature names are strings, not {name!r} ({type(name).__name__})")
    try:
        return Column.from_values(values)
    except TypeError as error:
        raise TypeError(f"feature {name!r}: {error}") from error
    except ValueError as error:
        raise ValueError(f"feature {name!r}: {error}") from error


def _names_column(names: Iterable[str]) -> Column:
    column = Column.from_values(names if hasattr(names, "__len__") else list(names))
    return column if column.kind == "string" else Column.from_values([str(name) for name in column.to_numpy()])
