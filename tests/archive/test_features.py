"""The two feature indices: bionemo-scdl's behaviour, side by side with it, and what its own tables lose."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from bionemo.scdl.index import row_feature_index as reference
from hypothesis import given
from hypothesis import strategies as st

from scdl_gpu.archive.features import ObservedFeatureIndex, RowFeatureIndex, VariableFeatureIndex, are_dicts_equal

NAN = float("nan")


def variable(index: Any, blocks: int = 3) -> Any:
    """Append blocks of growing width, two rows more each, to an index of either package."""
    for i in range(blocks):
        features = {"symbol": np.array([f"g{i}_{j}" for j in range(i + 1)]), "length": np.arange(i + 1) * 0.5}
        index.append_features(2 * i + 1, features, f"file{i}")
    return index


def observed(index: Any, blocks: int = 3) -> Any:
    """Append blocks with different columns to an index of either package."""
    for i in range(blocks):
        features = {"cell": np.array([f"c{i}_{j}" for j in range(i + 2)]), f"depth{i}": np.arange(i + 2), "x": np.full(i + 2, 0.5)}
        index.append_features(features, f"file{i}")
    return index


def plain(value: Any) -> Any:
    """Return what a lookup gives as plain Python objects."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def outcome(call: Any) -> Any:
    """Return what a call returns, plainly, or the type of what it raises."""
    try:
        return plain(call())
    except (IndexError, TypeError, ValueError) as error:
        return type(error)


def assert_same(ours: RowFeatureIndex, theirs: Any) -> None:
    """Compare everything that both packages can be asked."""
    for name in ("__len__", "number_of_rows", "column_dims", "number_of_values"):
        assert plain(getattr(ours, name)()) == plain(getattr(theirs, name)()), name
    for row in range(-2, theirs.number_of_rows() + 2):
        assert outcome(lambda row=row: ours.lookup(row)) == outcome(lambda row=row: theirs.lookup(row)), row
        assert outcome(lambda row=row: ours.number_vars_at_row(row)) == outcome(lambda row=row: theirs.number_vars_at_row(row)), row


KINDS = pytest.mark.parametrize(
    ("kind", "theirs", "fill"),
    [
        (VariableFeatureIndex, reference.VariableFeatureIndex, variable),
        (ObservedFeatureIndex, reference.ObservedFeatureIndex, observed),
    ],
    ids=["variable", "observed"],
)


@KINDS
@pytest.mark.parametrize("blocks", [0, 1, 3, 9, 10, 12])
def test_both_packages_open_what_either_saves(tmp_path: Path, kind: Any, theirs: Any, fill: Any, blocks: int) -> None:
    """An index of any number of blocks answers alike in memory, opened by bionemo-scdl, and opened from what it wrote."""
    ours, other = fill(kind(), blocks), fill(theirs(), blocks)

    ours.save(tmp_path / "ours", legacy_labels=True)
    other.save(str(tmp_path / "theirs"))

    assert_same(ours, other)
    assert_same(ours, theirs.load(str(tmp_path / "ours")))
    for directory in ("ours", "theirs"):
        assert_same(kind.load(tmp_path / directory), other)


@KINDS
def test_concat_is_the_references(kind: Any, theirs: Any, fill: Any) -> None:
    """Appending another index gives the blocks that bionemo-scdl makes of it."""
    ours, other = fill(kind()), fill(theirs())

    assert ours.concat(fill(kind(), 1)) is ours
    ours.concat(fill(kind(), 2)).concat(kind())
    other.concat(fill(theirs(), 1)).concat(fill(theirs(), 2)).concat(theirs())

    assert_same(ours, other)


@KINDS
def test_concat_with_itself_is_concat_with_a_copy(kind: Any, theirs: Any, fill: Any) -> None:
    """Appending an index to itself doubles its rows, also where its last block equals its first (bionemo-scdl counts one too many)."""
    index, other = fill(kind()).concat(fill(kind(), 1)), fill(theirs())

    index.concat(index)
    for blocks in (1, 3, 1):
        other.concat(fill(theirs(), blocks))

    assert_same(index, other)


@KINDS
def test_concat_of_another_class_is_refused(kind: Any, theirs: Any, fill: Any) -> None:
    """Only an index of the same class can be appended."""
    for other in (fill(theirs()), "index", ObservedFeatureIndex() if kind is VariableFeatureIndex else VariableFeatureIndex()):
        with pytest.raises(TypeError, match=f"Error: trying to concatenate something that's not a {kind.__name__}."):
            kind().concat(other)


@KINDS
def test_arguments_that_are_no_features_are_refused(kind: Any, theirs: Any, fill: Any) -> None:
    """Anything but a dict of equally long, one-dimensional arrays under strings is refused by name."""
    rows = [1] if kind is VariableFeatureIndex else []
    for features, error, message in (
        ([1], TypeError, f"{kind.__name__}.append_features expects a dict of arrays"),
        ({"a": [1], "b": [1, 2]}, ValueError, "All feature arrays must have the same length"),
        ({"a": np.zeros((2, 2))}, ValueError, "feature 'a'.*shape"),
        ({"a": np.zeros(2, complex)}, TypeError, "feature 'a'.*complex"),
        ({1: [1]}, TypeError, "feature names are strings"),
    ):
        with pytest.raises(error, match=message):
            kind().append_features(*rows, features)
    with pytest.raises(ValueError, match="2 names"):
        kind().append_features(*rows, {"a": [1]}, names=["x", "y"])


@KINDS
def test_lookups_out_of_range_and_unknown_names_are_refused(kind: Any, theirs: Any, fill: Any) -> None:
    """The texts are those that existing code matches."""
    index = fill(kind())
    n_rows = index.number_of_rows()

    with pytest.raises(IndexError, match=r"Row index -1 is not valid. It must be non-negative."):
        index.lookup(-1)
    with pytest.raises(IndexError, match=r"There are no features to lookup"):
        kind().lookup(0)
    with pytest.raises(IndexError, match=rf"Row index {n_rows} is larger than number of rows in FeatureIndex \({n_rows}\)\."):
        index.lookup(n_rows)
    with pytest.raises(ValueError, match=r"Provided feature column nope in select_features not present in dataset\."):
        index.lookup(0, ["nope"])
    with pytest.raises(TypeError):
        index.lookup(0.5)


@KINDS
def test_selected_features_come_in_the_order_asked(kind: Any, theirs: Any, fill: Any) -> None:
    """Names select and order, an empty list selects nothing."""
    index, other = fill(kind()), fill(theirs())
    names = list(index.blocks[-1].columns)[::-1]
    last = index.number_of_rows() - 1

    assert plain(index.lookup(last, names)) == plain(other.lookup(last, names))
    assert index.lookup(last, []) == ([], "file2")


@KINDS
def test_block_of_is_the_block_that_lookup_uses(kind: Any, theirs: Any, fill: Any) -> None:
    """Block numbers of many rows at once agree with the labels of single lookups; rows out of range are named."""
    index = fill(kind(), 12)
    rows = np.random.default_rng(0).integers(0, index.number_of_rows(), 200)

    blocks = index.block_of(rows)

    assert blocks.dtype == np.int64
    assert [f"file{block}" for block in blocks] == [index.lookup(row)[1] for row in rows]
    for outside in (-1, index.number_of_rows()):
        with pytest.raises(IndexError, match=str(outside)):
            index.block_of([0, outside])


def test_are_dicts_equal_is_the_references() -> None:
    """Keys in any order, arrays by value, NaN unequal."""
    for left, right in (
        ({"a": np.arange(2), "b": np.ones(1)}, {"b": np.ones(1), "a": np.arange(2)}),
        ({"a": np.arange(2)}, {"a": np.arange(3)}),
        ({"a": np.arange(2)}, {"b": np.arange(2)}),
        ({"a": np.array([NAN])}, {"a": np.array([NAN])}),
        ({}, {}),
    ):
        assert are_dicts_equal(left, right) == reference.are_dicts_equal(left, right)


def test_equal_variables_make_one_block() -> None:
    """Equal blocks grow in rows and keep the first label, NaN included; names keep blocks apart only where both are known."""
    features = {"a": np.array([1.0, NAN]), "b": np.array(["x", None], dtype=object)}
    index = VariableFeatureIndex()

    index.append_features(2, features, "first")
    index.append_features(3, dict(reversed(features.items())), "second", names=["g1", "g2"])
    index.append_features(4, features, "third", names=["g1", "g2"])
    index.append_features(5, features, "fourth", names=["g1", "g3"])

    assert index.number_of_values() == [18, 10]
    assert [index.lookup(0)[1], index.lookup(9)[1]] == ["first", "fourth"]
    assert plain(index.block_names(0)) == ["g1", "g2"]


def test_variable_arrays_are_one_object() -> None:
    """Lookups return the same array each time, not copies."""
    index = variable(VariableFeatureIndex())

    assert index.lookup(1)[0][0] is index.lookup(2)[0][0]


def test_a_block_without_columns_counts_its_rows(tmp_path: Path) -> None:
    """An empty dict makes a block of width 0, or of as many variables as it has names; a file keeps both."""
    index = VariableFeatureIndex()
    index.append_features(3, {})
    index.append_features(2, {}, names=["g1", "g2"])
    index.save(tmp_path, legacy_labels=True)

    stored = VariableFeatureIndex.load(tmp_path)

    assert index.column_dims() == stored.column_dims() == [0, 2]
    assert stored.number_of_rows() == 5
    assert reference.VariableFeatureIndex.load(str(tmp_path)).lookup(4) == ([], "")
    with pytest.raises(ValueError, match="n_obs is -1"):
        index.append_features(-1, {})


def test_empty_observations_are_ignored() -> None:
    """Neither an empty dict nor empty arrays make a block."""
    index = ObservedFeatureIndex()

    index.append_features({})
    index.append_features({"a": []})

    assert len(index) == 0


def test_alike_observations_are_joined_without_changing_values(tmp_path: Path) -> None:
    """Blocks with the same columns become one; categories, missing numbers, booleans and mixtures stay what they are."""
    first = pd.DataFrame(
        {
            "type": pd.Categorical(["b", None], categories=["z", "b"]),
            "count": pd.array([1, None], dtype="Int64"),
            "flag": [True, False],
            "plate": [1, 2],
            "note": ["x", None],
        }
    )
    second = first.assign(type=pd.Categorical(["c", "b"]), plate=["p", "q"])
    index = ObservedFeatureIndex()
    index.append_features(dict(first.items()), "one", names=["r1", "r2"])
    index.append_features(dict(second.items()), "two")

    index.save(tmp_path)

    for each in (index, ObservedFeatureIndex.load(tmp_path), pickle.loads(pickle.dumps(index))):
        assert len(each) == 1
        assert each.lookup(1) == ([None, pd.NA, np.False_, 2, None], "one")
        assert each.lookup(2) == (["c", 1, np.True_, "p", "x"], "one")
        pd.testing.assert_series_equal(
            each.column("type").to_pandas(), pd.Series(pd.Categorical(["b", None, "c", "b"], categories=["z", "b", "c"]))
        )
        assert each.column("count").to_pandas().dtype == "Int64"
        assert each.column("flag").to_numpy().dtype == bool
        assert plain(each.names) == ["r1", "r2", None, None]


def test_columns_over_all_rows_are_missing_where_a_block_lacks_them() -> None:
    """`columns` is the union in order of appearance; `column` spans all blocks; a new block shows in both."""
    index = observed(ObservedFeatureIndex(), 2)

    assert index.columns == ["cell", "depth0", "x", "depth1"]
    assert [None if value is pd.NA else value for value in index.column("depth1").to_numpy()] == [None, None, 0, 1, 2]
    assert index.names is None

    index.append_features({"cell": ["c"]}, names=["r"])

    assert len(index.column("depth1")) == 6
    assert plain(index.names) == [None] * 5 + ["r"]
    with pytest.raises(ValueError, match=r"Provided feature column nope in select_features not present in dataset\."):
        index.column("nope")


@given(st.integers(0, 5), st.lists(st.one_of(st.none(), st.integers(-25, 25)), min_size=3, max_size=3))
def test_slices_of_observations_are_the_references(blocks: int, bounds: list[int | None]) -> None:
    """Any slice gives the tables, and the errors, that bionemo-scdl gives."""
    ours, theirs = observed(ObservedFeatureIndex(), blocks), observed(reference.ObservedFeatureIndex(), blocks)
    rows = slice(*bounds)

    assert outcome(lambda: ours[rows]) == outcome(lambda: theirs[rows])


def test_single_observations_are_the_references() -> None:
    """Integers, negative ones too, are looked up; anything else but a slice is a TypeError."""
    ours, theirs = observed(ObservedFeatureIndex()), observed(reference.ObservedFeatureIndex())

    for idx in [*range(-12, 12), np.int64(1), "cell", 0.5, [0]]:
        assert outcome(lambda idx=idx: ours[idx]) == outcome(lambda idx=idx: theirs[idx]), idx
    with pytest.raises(TypeError, match="Index must be int or slice"):
        ours[np.int64(1)]


def test_names_come_back(tmp_path: Path) -> None:
    """Names of rows and of variables survive joining, saving and loading, in files that other readers ignore."""
    var, obs = VariableFeatureIndex(), ObservedFeatureIndex()
    for i in range(2):
        var.append_features(2, {"a": np.arange(2) + i}, names=pd.Index([f"g{i}", "h"]))
        obs.append_features({"a": np.arange(2)}, names=(f"c{i}{j}" for j in range(2)))
    obs.concat(obs)
    var.save(tmp_path / "var")
    obs.save(tmp_path / "obs")

    stored_var, stored_obs = VariableFeatureIndex.load(tmp_path / "var"), ObservedFeatureIndex.load(tmp_path / "obs")

    assert [plain(stored_var.block_names(i)) for i in range(2)] == [["g0", "h"], ["g1", "h"]]
    assert plain(stored_obs.names) == ["c00", "c01", "c10", "c11"] * 2
    assert {path.suffix for path in (tmp_path / "obs").glob("names*")} == {".names"}
