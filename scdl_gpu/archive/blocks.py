"""Blocks of a feature index: equally long columns, in memory, in a parquet file, or several blocks end to end.

Knows one table and the names of its rows; not how many rows of the dataset it stands for. A file is mapped into
memory at opening, its descriptor closed, and only its footer parsed (1 to 6 ms for 100 M rows of 10 columns,
measured); a column is decoded when it is first asked for, then kept. Pages carry checksums: reading floats takes
a third longer with them, once a column.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from scdl_gpu.archive import remarks
from scdl_gpu.archive.column_files import Encoder, is_repetitive
from scdl_gpu.archive.columns import Column
from scdl_gpu.errors import ArchiveError, MissingFileError

logger = logging.getLogger(__name__)

ROWS_PER_GROUP = 1_000_000
"""Rows that are encoded at once when a table is written: what a write needs beyond the columns themselves."""

NAMES = "names"
"""The one column of a names file."""


class Block(ABC):
    """A table of `n_rows` rows. `columns` are its column names, in order."""

    columns: tuple[str, ...]
    n_rows: int

    @abstractmethod
    def column(self, name: str) -> Column:
        """Return a column, decoded once and kept. Raises KeyError for an unknown name, ArchiveError for damaged bytes."""

    @abstractmethod
    def names(self) -> Column | None:
        """Return the names of the rows as text, or None where they are not known."""

    def read(self, name: str) -> Column:
        """Return a column without keeping it."""
        return self.column(name)

    @property
    def has_names(self) -> bool:
        """Whether the rows have names."""
        return self.names() is not None

    def write(self, path: Path) -> None:
        """Write the table as a parquet file that bionemo-scdl reads too; `path` must not exist."""
        write_table(path, {name: self.column(name) for name in self.columns}, self.n_rows if self.columns else 0)

    def write_names(self, path: Path) -> None:
        """Write the names of the rows; `path` must not exist."""
        names = self.names()
        if names is not None:
            write_table(path, {NAMES: names}, len(names))

    def equals(self, other: "Block") -> bool:
        """Tell whether both have the same columns, in any order, with the same values."""
        if self is other:
            return True
        if set(self.columns) != set(other.columns) or self.n_rows != other.n_rows:
            return False
        return all(self.column(name).equals(other.column(name)) for name in self.columns)


class MemoryBlock(Block):
    """Columns in memory."""

    def __init__(self, columns: Mapping[str, Column], *, names: Column | None = None) -> None:
        self._columns = dict(columns)
        self._names = names
        self.columns = tuple(self._columns)
        sized = [*self._columns.values(), *([] if names is None else [names])]
        self.n_rows = len(sized[0]) if sized else 0

    def column(self, name: str) -> Column:
        """Return a column, KeyError for an unknown name."""
        return self._columns[name]

    def names(self) -> Column | None:
        """Return the names given, or None."""
        return self._names


class JoinedBlock(Block):
    """Blocks with the same set of columns, end to end; `columns` are in the order of the last one."""

    def __init__(self, parts: Sequence[Block]) -> None:
        self.parts = tuple(parts)
        self.columns = parts[-1].columns
        self.n_rows = sum(part.n_rows for part in parts)
        self._kept: dict[str, Column] = {}

    def column(self, name: str) -> Column:
        """Return a column of all parts, joined when first asked for."""
        kept = self._kept.get(name)
        if kept is None:
            kept = self._kept[name] = Column.concat([part.read(name) for part in self.parts])
        return kept

    def names(self) -> Column | None:
        """Return the names of all parts, missing where a part has none; None if no part has any."""
        if not self.has_names:
            return None
        names = [(part.names(), part.n_rows) for part in self.parts]
        return Column.concat([Column.missing(n_rows) if known is None else known for known, n_rows in names])

    @property
    def has_names(self) -> bool:
        """Whether any part has names."""
        return any(part.has_names for part in self.parts)


class FileBlock(Block):
    """A table in a parquet file, and the names of its rows in another, if there is one."""

    def __init__(self, table: "MappedTable", *, names: "MappedTable | None" = None) -> None:
        self._table = table
        self._names = names
        self._kept: dict[str, Column] = {}
        self.columns = table.columns
        self.n_rows = table.n_rows if table.columns or names is None else names.n_rows

    @classmethod
    def open(cls, path: Path, *, names_path: Path) -> "FileBlock":
        """Map a table and its names; names of another number of rows are left aside with a warning in the log."""
        table = MappedTable.open(path)
        if not names_path.exists():
            return cls(table)
        names = MappedTable.open(names_path)
        if names.columns != (NAMES,):
            raise ArchiveError(f"{names_path}: has the columns {names.columns}, expected {(NAMES,)}; copy the archive again")
        if table.columns and names.n_rows != table.n_rows:
            text = "%s holds %d names, %s holds %d rows: the names are left aside (another program changed the archive)"
            remarks.say(partial(logger.warning, text, names_path, names.n_rows, path.name, table.n_rows))
            return cls(table)
        return cls(table, names=names)

    def column(self, name: str) -> Column:
        """Return a column, decoded when first asked for; ArchiveError for damaged bytes."""
        kept = self._kept.get(name)
        if kept is None:
            kept = self._kept[name] = self._table.read(name)
        return kept

    def read(self, name: str) -> Column:
        """Return a column, decoded again unless it is kept already."""
        kept = self._kept.get(name)
        return self._table.read(name) if kept is None else kept

    def field(self, name: str) -> Any:
        """Return what the file says of a column, a pyarrow.Field; KeyError for an unknown name."""
        return self._table.field(name)

    def names(self) -> Column | None:
        """Return the names, read anew each time: they are as many as the rows."""
        return None if self._names is None else self._names.read(NAMES)

    @property
    def has_names(self) -> bool:
        """Whether there is a file of names."""
        return self._names is not None

    def write(self, path: Path) -> None:
        """Copy the file as it is."""
        self._table.copy(path)

    def equals(self, other: Block) -> bool:
        """Compare the bytes of two files first, then values."""
        if isinstance(other, FileBlock) and self._table.same_bytes(other._table):
            return True
        return super().equals(other)


class MappedTable:
    """A parquet file mapped into memory, its footer parsed. It outlives the file's name; pickled, it carries the bytes."""

    def __init__(self, path: str, buffer: Any) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path = path
        self._buffer = buffer
        try:
            reader = pq.ParquetFile(buffer)
            self._footer = reader.metadata
            self._schema = reader.schema_arrow
        except (pa.ArrowException, OSError, ValueError, TypeError) as error:
            raise self._damaged("its footer", error) from error
        self.columns = tuple(self._schema.names)
        self.n_rows = int(self._footer.num_rows)
        if self.n_rows < 0 or len(set(self.columns)) != len(self.columns):
            raise self._damaged("its footer", f"{self.n_rows} rows, columns {self.columns}")

    @classmethod
    def open(cls, path: Path) -> "MappedTable":
        """Map a file and close its descriptor; MissingFileError, or ArchiveError for what is no parquet file."""
        import pyarrow as pa

        try:
            with pa.memory_map(str(path)) as file:
                buffer = file.read_buffer()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MissingFileError(f"{path} is missing: the copy is incomplete; copy the archive again") from error
        except (pa.ArrowException, OSError) as error:
            raise ArchiveError(f"{path} cannot be mapped: {error}; check its permissions, or copy the archive again") from error
        return cls(str(path), buffer)

    def __reduce__(self) -> tuple[Any, ...]:
        return MappedTable, (self.path, self._buffer)

    def field(self, name: str) -> Any:
        """Return the pyarrow.Field of a column. KeyError for an unknown name."""
        return self._schema.field(name)

    def read(self, name: str) -> Column:
        """Decode one column and no other. KeyError for an unknown name."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if name not in self.columns:
            raise KeyError(name)
        try:
            field = self._schema.field(name)
            encoded = [name] if is_repetitive(field) else None
            reader = pq.ParquetFile(self._buffer, metadata=self._footer, read_dictionary=encoded, page_checksum_verification=True)
            array = reader.read(columns=[name], use_threads=False).column(name)
            if len(array) != self.n_rows:
                raise ValueError(f"{len(array):,} values, the footer promises {self.n_rows:,}")
            array.validate(full=True)  # Arrow hands out codes beyond a dictionary whose page header is damaged, and crashes at them later
            return Column.from_arrow(field, array)
        except (pa.ArrowException, OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            raise self._damaged(f"column {name!r}", error) from error

    def copy(self, path: Path) -> None:
        """Write the same bytes to another file."""
        path.write_bytes(self._buffer)

    def same_bytes(self, other: "MappedTable") -> bool:
        """Tell whether the two files are equal."""
        return bool(self._buffer.equals(other._buffer))

    def _damaged(self, what: str, why: object) -> ArchiveError:
        return ArchiveError(f"{self.path}: {what} cannot be read: {why}; copy the archive again, or convert the source anew")


def write_table(path: Path, columns: Mapping[str, Column], n_rows: int) -> None:
    """Write columns as parquet, a row group per ROWS_PER_GROUP rows; ValueError naming a column that cannot be stored."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    encoders = [Encoder(name, column) for name, column in columns.items()]
    schema = pa.schema([encoder.field for encoder in encoders])
    with pq.ParquetWriter(path, schema, write_page_checksum=True) as writer:
        for start in range(0, n_rows, ROWS_PER_GROUP):
            stop = min(start + ROWS_PER_GROUP, n_rows)
            writer.write_table(pa.table([encoder.array(start, stop) for encoder in encoders], schema=schema))
