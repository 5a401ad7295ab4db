"""Joining datasets, in place and elsewhere; expected rows come from SciPy, features from literal tables."""

import itertools
import re
import shutil
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from scdl_gpu import SingleCellMemMapDataset, convert_h5ad
from scdl_gpu.archive.commit import Staging
from scdl_gpu.archive.constants import FLOAT_ORDER, INT_ORDER


def counts(n_rows: int, n_vars: int, seed: int = 0) -> scipy.sparse.csr_matrix:
    """Make counts 1 to 9, half of the places filled."""
    random = np.random.default_rng(seed)
    dense = random.integers(1, 10, (n_rows, n_vars)) * (random.random((n_rows, n_vars)) < 0.5)
    return scipy.sparse.csr_matrix(dense.astype(np.float32))


def adata(n_rows: int, n_vars: int = 4, seed: int = 0, **obs: Any) -> anndata.AnnData:
    """Make an AnnData with the obs columns given, rows named by the seed."""
    names = [f"cell{seed}-{row}" for row in range(n_rows)]
    var = pd.DataFrame({"gene": [f"g{gene}" for gene in range(n_vars)]}, index=[f"G{gene}" for gene in range(n_vars)])
    return anndata.AnnData(X=counts(n_rows, n_vars, seed), obs=pd.DataFrame(obs, index=names), var=var)


def opened(path: Path, source: Any, dtype: str = "float32") -> SingleCellMemMapDataset:
    """Convert a source and open the archive."""
    return SingleCellMemMapDataset(convert_h5ad(source, path, data_dtype=dtype))


def dense(ds: SingleCellMemMapDataset) -> list[list[float]]:
    """List all rows."""
    return [ds.get_row_padded(row)[0].tolist() for row in range(len(ds))]


@pytest.fixture
def three(tmp_path: Path) -> list[SingleCellMemMapDataset]:
    """Give archives a, b, c of 3, 2 and 1 rows of the same 4 genes."""
    return [opened(tmp_path / name, adata(n, seed=n, line=[name] * n)) for name, n in (("a", 3), ("b", 2), ("c", 1))]


JOINED = [row for n in (3, 2, 1) for row in counts(n, 4, n).toarray().tolist()]


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("at_once", [False, True])
def test_rows_follow_each_other(three: list[SingleCellMemMapDataset], tmp_path: Path, elsewhere: bool, at_once: bool) -> None:
    """One by one or as a list, in place or elsewhere, for this object and whoever opens the archive; the others stay as they were."""
    a, b, c = three
    output = tmp_path / "deep" / "joined" if elsewhere else None

    if at_once:
        a.concat([b, c], output_path=output)
    else:
        a.concat(b, output_path=output)
        a.concat(c)

    again = SingleCellMemMapDataset(output or tmp_path / "a")
    for found in (a, again):
        assert dense(found) == JOINED
        assert found.shape() == (6, [4])
        assert found.obs_column("line").tolist() == ["a", "a", "a", "b", "b", "c"]
        assert found.obs_names is not None
        assert found.obs_names.tolist() == [f"cell{n}-{row}" for n in (3, 2, 1) for row in range(n)]
        assert found.metadata["num_rows"] == 6
    assert a.data_path == (output or tmp_path / "a")
    assert dense(b) == dense(SingleCellMemMapDataset(tmp_path / "b")) == JOINED[3:5]
    assert not elsewhere or dense(SingleCellMemMapDataset(tmp_path / "a")) == JOINED[:3]


def test_a_dataset_joined_with_itself(three: list[SingleCellMemMapDataset], tmp_path: Path) -> None:
    """As one and as two objects; every row is there twice, or three times."""
    a = three[0]

    a.concat(a)
    a.concat([], extend_copy_size=1)
    SingleCellMemMapDataset(tmp_path / "b").concat([SingleCellMemMapDataset(tmp_path / "b"), three[1]])

    assert dense(a) == JOINED[:3] * 2
    assert dense(SingleCellMemMapDataset(tmp_path / "a")) == JOINED[:3] * 2
    assert dense(SingleCellMemMapDataset(tmp_path / "b")) == JOINED[3:5] * 3


@pytest.mark.parametrize("name", ["a", "b", "none"])
def test_an_output_that_exists_is_refused(three: list[SingleCellMemMapDataset], tmp_path: Path, name: str) -> None:
    """An input, another archive, or any file; nothing is changed, even with destroy_on_copy."""
    (tmp_path / "none").write_text("a file")

    with pytest.raises(FileExistsError, match=f"{name} exists already"):
        three[0].concat(three[1], output_path=tmp_path / name, destroy_on_copy=True)

    assert dense(three[0]) == dense(SingleCellMemMapDataset(tmp_path / "a")) == JOINED[:3]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b", "c", "none"]


@pytest.mark.parametrize("inside", ["a", "b"])
def test_an_output_inside_an_input_is_refused(three: list[SingleCellMemMapDataset], tmp_path: Path, inside: str) -> None:
    """destroy_on_copy would remove it with the input."""
    with pytest.raises(ValueError, match=r"lies inside .* one of the inputs"):
        three[0].concat(three[1], output_path=tmp_path / inside / "joined", destroy_on_copy=True)

    assert dense(SingleCellMemMapDataset(tmp_path / inside)) == (JOINED[:3] if inside == "a" else JOINED[3:5])
    assert not (tmp_path / inside / "joined").exists()


@pytest.mark.parametrize("elsewhere", [False, True])
def test_inputs_are_destroyed_when_asked(three: list[SingleCellMemMapDataset], tmp_path: Path, elsewhere: bool) -> None:
    """Whole archives, once the result is there; in place this one stays, and objects that have them open go on reading."""
    a, b, c = three

    a.concat([b, c, b, a], output_path=tmp_path / "joined" if elsewhere else None, destroy_on_copy=True)

    assert sorted(file.name for file in tmp_path.iterdir()) == (["joined"] if elsewhere else ["a"])
    assert dense(SingleCellMemMapDataset(tmp_path / ("joined" if elsewhere else "a"))) == [*JOINED, *JOINED[3:5], *JOINED[:3]]
    assert dense(b) == JOINED[3:5]


@pytest.mark.parametrize("other", [None, "path", (), {}, 3, [None], [[]]])
def test_anything_else_is_refused(three: list[SingleCellMemMapDataset], other: Any) -> None:
    """The message says what was given."""
    with pytest.raises(ValueError, match=r"Expecting either a .*SingleCellMemMapDataset.* or a list thereof\. Actually got: "):
        three[0].concat(other)


@pytest.mark.parametrize("family", [INT_ORDER, FLOAT_ORDER])
def test_values_take_the_widest_dtype(tmp_path: Path, family: list[str]) -> None:
    """Whichever comes first, also for reopened archives, whose header bionemo-scdl does not update."""
    for number, (first, second) in enumerate(itertools.product(family, repeat=2)):
        ours = opened(tmp_path / f"a{number}", counts(3, 4, 3), first)
        other = opened(tmp_path / f"b{number}", counts(2, 4, 2), second)

        ours.concat(other)

        again = SingleCellMemMapDataset(tmp_path / f"a{number}")
        widest = max(first, second, key=family.index)
        assert (ours.data.dtype, again.data.dtype, again.dtypes["data.npy"]) == (widest, widest, widest)
        assert dense(again) == JOINED[:5]


def test_columns_and_pointers_widen(tmp_path: Path) -> None:
    """From uint8 where the sum needs more; bionemo-scdl cannot open such an archive again."""
    narrow, wide = counts(30, 12, 1), counts(30, 400, 2)
    ds = opened(tmp_path / "a", narrow)
    before = dict(ds.dtypes)

    ds.concat([opened(tmp_path / "b", wide), ds])

    again = SingleCellMemMapDataset(tmp_path / "a")
    assert (before["col_ptr.npy"], before["row_ptr.npy"]) == ("uint8", "uint8")
    assert (again.col_index.dtype, again.row_index.dtype) == (np.uint16, np.uint16)
    assert again.rows(slice(0, 30)).toarray().tolist() == again.rows(slice(60, 90)).toarray().tolist() == narrow.toarray().tolist()
    assert again.rows(slice(30, 60)).toarray().tolist() == wide.toarray().tolist()


def test_pointers_that_are_wider_than_needed_do_no_harm(tmp_path: Path) -> None:
    """Datasets made with num_rows have uint64 pointers; bionemo-scdl empties row_ptr.npy and raises."""
    made = SingleCellMemMapDataset(tmp_path / "made", num_rows=2, num_elements=2)
    made.row_index[:], made.col_index[:], made.data[:] = [0, 1, 2], [0, 3], [5, 6]
    made.var_features().append_features(2, {"gene": np.array([f"g{gene}" for gene in range(4)])})
    made.save()

    made.concat(opened(tmp_path / "other", counts(3, 4, 3)))

    assert made.row_index.dtype == np.uint8
    assert dense(SingleCellMemMapDataset(tmp_path / "made")) == [[5, 0, 0, 0], [0, 0, 0, 6], *JOINED[:3]]


@pytest.mark.parametrize("kind", [str, Path])
def test_integers_and_floats_are_not_mixed(tmp_path: Path, kind: Any) -> None:
    """Both datasets are named, whatever their paths are, and the cure, which works."""
    ints, floats = opened(tmp_path / "ints", counts(3, 4, 3), "uint8"), opened(tmp_path / "floats", counts(2, 4, 2))
    ints = SingleCellMemMapDataset(kind(tmp_path / "ints"))

    with pytest.raises(ValueError, match="Cannot merge datasets with a mix of int and float dtypes for data: ") as caught:
        ints.concat(floats)

    assert all(text in str(caught.value) for text in ("ints: uint8", "floats: float32", "cast_data_to_dtype", "--data-dtype"))
    ints.cast_data_to_dtype("float32")
    ints.concat(floats)
    assert dense(ints) == JOINED[:5]


def test_rows_without_features_are_not_joined(three: list[SingleCellMemMapDataset], tmp_path: Path) -> None:
    """Their genes would be anyone's guess."""
    made = SingleCellMemMapDataset(tmp_path / "made", num_rows=2, num_elements=2)
    made.save()

    for left, right in ((made, three[0]), (three[0], made)):
        with pytest.raises(ValueError, match="made has 2 rows and no features; append its features and save it first"):
            left.concat(right)


def test_features_that_describe_other_rows_are_refused(three: list[SingleCellMemMapDataset], tmp_path: Path) -> None:
    """Before anything is written: features appended to an opened archive may be wrong."""
    three[1].obs_features().append_features({"line": np.array(["x"])})

    with pytest.raises(ValueError, match="obs features describe 3 rows, row pointers 2"):
        three[0].concat(three[1])

    assert dense(SingleCellMemMapDataset(tmp_path / "a")) == JOINED[:3]


def test_different_genes_stay_apart(tmp_path: Path) -> None:
    """Twelve archives of other genes each: every row has the genes of its file, also when reopened, and equal neighbours share a block."""
    widths = [5, 5, 3, 5, 7, 2, 9, 4, 8, 6, 3, 10, 1]
    sets = [opened(tmp_path / f"{number:02d}", counts(2, width, number)) for number, width in enumerate(widths)]

    sets[0].concat(sets[1:])

    again = SingleCellMemMapDataset(tmp_path / "00")
    assert again.number_of_variables() == widths[1:]
    assert dense(again) == [row for number, width in enumerate(widths) for row in counts(2, width, number).toarray().tolist()]
    again.concat(SingleCellMemMapDataset(tmp_path / "03"))
    assert SingleCellMemMapDataset(tmp_path / "00").number_of_variables() == [*widths[1:], 5]


def test_obs_columns_keep_their_kinds(tmp_path: Path) -> None:
    """Categories are united, numbers stay numbers beside text, missing ones stay missing, where bionemo-scdl makes all of them strings."""
    left = adata(2, seed=1, line=pd.Categorical(["x", "y"]), mixed=[1, 2], count=pd.array([1, None], dtype="Int64"), flag=[True, False])
    right = adata(
        2, seed=2, line=pd.Categorical(["z", "x"]), mixed=["one", "two"], count=pd.array([3, 4], dtype="Int64"), flag=[True, True]
    )
    left.write_h5ad(tmp_path / "left.h5ad")
    right.write_h5ad(tmp_path / "right.h5ad")
    ds = opened(tmp_path / "a", tmp_path / "left.h5ad")

    ds.concat(opened(tmp_path / "b", tmp_path / "right.h5ad"))

    again = SingleCellMemMapDataset(tmp_path / "a")
    assert again.obs_column("line").tolist() == ["x", "y", "z", "x"]
    assert again.obs_column("line").cat.categories.tolist() == ["x", "y", "z"]
    assert again.obs_column("mixed").tolist() == [1, 2, "one", "two"]
    assert again.obs_column("count").dtype == "Int64"
    assert again.obs_column("count").tolist() == [1, pd.NA, 3, 4]
    assert again.obs_column("flag").dtype == bool
    assert [again.get_row(row, return_obs_features=True, obs_feature_names=["mixed"])[2] for row in (0, 3)] == [[1], ["two"]]


def test_columns_of_one_part_are_missing_in_the_other(tmp_path: Path) -> None:
    """The union of the columns over all rows; a row knows those of its own block."""
    ds = opened(tmp_path / "a", adata(2, seed=1, line=["x", "y"]))

    ds.concat(opened(tmp_path / "b", adata(1, seed=2, depth=[1.5])))

    assert ds.obs_features().columns == ["line", "depth"]
    assert ds.obs_column("line").tolist() == ["x", "y", None]
    assert np.array_equal(ds.obs_column("depth").to_numpy(float), [np.nan, np.nan, 1.5], equal_nan=True)
    assert [ds.get_row(row, return_obs_features=True)[2] for row in range(3)] == [["x"], ["y"], [1.5]]


@pytest.mark.parametrize("first", [True, False])
def test_rows_of_an_archive_without_obs_keep_their_place(tmp_path: Path, first: bool) -> None:
    """The oldest archives have no obs: the rows of the others must not move up to theirs."""
    made = SingleCellMemMapDataset(tmp_path / "made", num_rows=2, num_elements=2)
    made.row_index[:], made.col_index[:], made.data[:] = [0, 1, 2], [0, 3], [5, 6]
    made.var_features().append_features(2, {"gene": np.array([f"g{gene}" for gene in range(4)])})
    made.save()
    described = opened(tmp_path / "described", adata(3, seed=3, line=["x", "y", "z"], depth=[1, 2, 3]))

    (described if first else made).concat(made if first else described)

    joined = SingleCellMemMapDataset(tmp_path / ("described" if first else "made"))
    line, depth = (["x", "y", "z", None, None], [1, 2, 3]) if first else ([None, None, "x", "y", "z"], [1, 2, 3])
    assert joined.obs_column("line").tolist() == line
    assert joined.obs_column("depth").dropna().tolist() == depth
    assert [joined.get_row(row, True, None, True)[2] for row in range(5)][0 if first else 2] == ["x", 1]
    assert len(joined) == 5


def test_who_reads_an_archive_that_grows_goes_on_reading(three: list[SingleCellMemMapDataset], tmp_path: Path) -> None:
    """The old rows, and obs columns that are asked for only afterwards."""
    reader = SingleCellMemMapDataset(tmp_path / "a")

    three[0].concat(three[1:])

    assert len(three[0]) == 6
    assert dense(reader) == JOINED[:3]
    assert reader.obs_column("line").tolist() == ["a", "a", "a"]
    assert reader.obs_names is not None
    assert reader.obs_names[-1] == "cell3-2"


def test_paths_through_links_are_the_archive_itself(three: list[SingleCellMemMapDataset], tmp_path: Path) -> None:
    """destroy_on_copy through a symbolic link does not remove the archive that was appended to."""
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "other").symlink_to(tmp_path / "b")

    SingleCellMemMapDataset(tmp_path / "link").concat(
        [SingleCellMemMapDataset(tmp_path / "other"), SingleCellMemMapDataset(tmp_path / "a")], destroy_on_copy=True
    )

    assert dense(SingleCellMemMapDataset(tmp_path / "a")) == JOINED[:5] + JOINED[:3]
    assert not (tmp_path / "b").exists()
    assert (tmp_path / "link").is_symlink()


def test_the_canonical_mark_is_that_of_all_parts(tmp_path: Path) -> None:
    """One part with unsorted rows, and the whole is not canonical."""
    unsorted = scipy.sparse.csr_matrix((np.array([7, 9], np.float32), np.array([2, 0]), np.array([0, 2])), shape=(1, 4))
    other = SingleCellMemMapDataset(convert_h5ad(unsorted, tmp_path / "b", data_dtype="float32", canonical=False))
    marks = []

    for path, part in ((tmp_path / "a", opened(tmp_path / "c", counts(1, 4))), (tmp_path / "d", other)):
        ds = opened(path, counts(3, 4, 3))
        ds.concat(part)
        marks.append(SingleCellMemMapDataset(path).archive.canonical)

    assert marks == [True, False]


def test_a_part_whose_files_are_gone_can_be_joined(three: list[SingleCellMemMapDataset], tmp_path: Path) -> None:
    """An object that has it open still has its rows, features and names; nothing hidden is left beside the result."""
    shutil.rmtree(tmp_path / "b")

    three[0].concat(three[1])

    assert dense(SingleCellMemMapDataset(tmp_path / "a")) == JOINED[:5]
    assert not [file for file in tmp_path.iterdir() if re.match(r"\.", file.name)]


@pytest.mark.parametrize("elsewhere", [False, True])
def test_rows_that_were_not_copied_are_not_destroyed(three: list[SingleCellMemMapDataset], tmp_path: Path, elsewhere: bool) -> None:
    """An archive that another writer appended to after it was opened here is kept, all of its rows, with a warning; others go."""
    a, b, c = three
    SingleCellMemMapDataset(tmp_path / "b").concat(SingleCellMemMapDataset(tmp_path / "c"))

    with pytest.warns(UserWarning, match=re.escape(f"{tmp_path / 'b'} was copied and is kept") + ".*another writer") as warned:
        a.concat([b, c], output_path=tmp_path / "joined" if elsewhere else None, destroy_on_copy=True)

    assert Path(warned[0].filename).name == "test_concat.py"
    assert dense(a) == JOINED
    assert dense(SingleCellMemMapDataset(tmp_path / "b")) == JOINED[3:]
    assert {path.name for path in tmp_path.iterdir()} == ({"b", "joined"} if elsewhere else {"a", "b"})


def test_an_archive_with_a_writer_at_work_is_kept(three: list[SingleCellMemMapDataset], tmp_path: Path) -> None:
    """What that writer is about to add would be lost."""
    a, b, c = three

    with Staging.change(tmp_path / "b"), pytest.warns(UserWarning, match="b was copied and is kept.*another writer is at work"):
        a.concat([b, c], destroy_on_copy=True)

    assert dense(SingleCellMemMapDataset(tmp_path / "b")) == JOINED[3:5]
    assert not (tmp_path / "c").exists()


def test_inputs_are_destroyed_where_they_were_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path means what it meant then, whatever the working directory is now."""
    for name in ("x", "y"):
        opened(tmp_path / name / "a", adata(2))
    k = opened(tmp_path / "k", adata(1))
    monkeypatch.chdir(tmp_path / "x")
    e = SingleCellMemMapDataset("a")
    monkeypatch.chdir(tmp_path / "y")

    k.concat(e, destroy_on_copy=True)

    assert not (tmp_path / "x" / "a").exists()
    assert (tmp_path / "y" / "a").exists()
