"""Columns are described as they are, from their tables' footers or from memory."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scdl_gpu.archive.blocks import FileBlock
from scdl_gpu.archive.features import ObservedFeatureIndex
from scdl_gpu.archive.kinds import kinds


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (np.array([1, 2], "uint16"), "uint16"),
        (np.array([1.5, np.nan], "float32"), "float32"),
        (np.array([True, False]), "bool"),
        (np.array(["2024-01-01", "2024-01-02"], "datetime64[ns]"), "datetime64[ns]"),
        (["a", "b"], "string"),
        ([1, "b"], "mixed"),
        (pd.Categorical(["a", "a"], categories=["a", "b"]), "categorical of 2"),
        (pd.Categorical([3, 1], ordered=True), "ordered categorical of 2"),
        (pd.array([1, None], dtype="Int16"), "nullable int16"),
        (pd.array([True, None], dtype="boolean"), "nullable bool"),
    ],
)
def test_kinds_are_the_same_in_memory_and_on_disk(tmp_path: Path, values: Any, kind: str) -> None:
    """Saving and opening an index changes no description, and decodes nothing."""
    index = ObservedFeatureIndex()
    index.append_features({"one": values})
    index.save(tmp_path / "index")
    opened = ObservedFeatureIndex.load(tmp_path / "index")

    described = kinds(index), kinds(opened)

    assert described == ({"one": kind}, {"one": kind})
    assert isinstance(opened.blocks[0], FileBlock)


def test_kinds_of_blocks_are_told_together() -> None:
    """What blocks differ in is told once each; categories are not counted over several blocks."""
    index = ObservedFeatureIndex()
    index.append_features({"one": pd.Categorical(["a"]), "two": [1]})
    index.append_features({"one": pd.Categorical(["b"]), "two": ["x"], "three": [0.5]})

    assert kinds(index) == {"one": "categorical", "two": "int64 / string", "three": "float64"}


@pytest.mark.parametrize(
    ("array", "metadata", "kind"),
    [
        (pa.array(["a"]), None, "string"),
        (pa.array([1, None], pa.int32()), None, "int32"),
        (pa.array([0.5]), b"no JSON", "double"),
        (pa.array([0.5]), b"[]", "double"),
        (pa.array([0.5]), b'{"kind": "plain", "numpy": "nonsense"}', "double"),
        (pa.array(["a"]), b'{"kind": "categorical", "categories": 3}', "categorical"),
    ],
)
def test_kinds_of_foreign_tables_are_those_of_their_files(tmp_path: Path, array: Any, metadata: bytes | None, kind: str) -> None:
    """A table of another writer, or one whose metadata makes no sense, is described by its types."""
    field = pa.field("one", array.type, metadata=None if metadata is None else {b"scdl_gpu": metadata})
    pq.write_table(pa.table([array], schema=pa.schema([field])), tmp_path / "table.parquet")
    index = ObservedFeatureIndex()
    index._append_block(FileBlock.open(tmp_path / "table.parquet", names_path=tmp_path / "none"), None, len(array))

    assert kinds(index) == {"one": kind}
