"""What the columns of a feature table are, in a word or two each.

Knows the footers of tables that are open, not their values: a table of 100 M rows is described in milliseconds. A
column that was written by bionemo-scdl is described by its type in the file, which is all there is.
"""

import json
from collections import Counter
from typing import Any

import numpy as np

from scdl_gpu.archive.blocks import Block, FileBlock, JoinedBlock
from scdl_gpu.archive.column_files import KEY
from scdl_gpu.archive.columns import CodedColumn, Column
from scdl_gpu.archive.features import RowFeatureIndex


def kinds(index: RowFeatureIndex) -> dict[str, str]:
    """Return what each column of an index is, by name, in order of first appearance; " / " between what blocks differ in.

    Categories are counted where there is one block: how many all blocks have together, their footers do not tell.
    """
    blocks = _blocks(index)
    found: dict[str, dict[str, None]] = {}
    for block in blocks:
        for name in block.columns:
            word = _of_field(block.field(name)) if isinstance(block, FileBlock) else _of_column(block.column(name))
            found.setdefault(name, {})[word if len(blocks) == 1 else word.split(" of ")[0]] = None
    return {name: " / ".join(words) for name, words in found.items()}


def partial(index: RowFeatureIndex) -> dict[str, int]:
    """Return the columns that only some blocks of an index have, and in how many of them."""
    blocks = _blocks(index)
    counts = Counter(name for block in blocks for name in block.columns)
    return {name: count for name, count in counts.items() if count < len(blocks)}


def _blocks(index: RowFeatureIndex) -> list[Block]:
    return [part for block in index.blocks for part in (block.parts if isinstance(block, JoinedBlock) else (block,))]


def _of_field(field: Any) -> str:
    """Describe a column by its field in the file: by our entry in the metadata, else by its arrow type."""
    try:
        entry = json.loads((field.metadata or {}).get(KEY, b"{}"))
        kind, listed = entry.get("kind"), entry.get("categories")
        if kind == "categorical":
            return _categorical(len(listed) if isinstance(listed, list) else None, ordered=entry.get("ordered") is True)
        if kind in ("string", "mixed"):
            return str(kind)
        if kind is None and str(field.type).endswith("string"):
            return "string"
        name = np.dtype(entry.get("numpy") or field.type.to_pandas_dtype()).name
        return f"nullable {name}" if kind == "nullable" else str(entry.get("dtype") or name)
    except (ValueError, TypeError, AttributeError, NotImplementedError):
        return str(field.type)


def _of_column(column: Column) -> str:
    if isinstance(column, CodedColumn) and column.kind == "categorical":
        return _categorical(len(column.categories), ordered=column.ordered)
    if column.kind in ("string", "mixed"):
        return column.kind
    values, _ = column.comparable()
    return f"nullable {values.dtype}" if column.kind == "nullable" else column.dtype or str(values.dtype)


def _categorical(count: int | None, *, ordered: bool) -> str:
    return f"{'ordered ' if ordered else ''}categorical" + ("" if count is None else f" of {count:,}")
