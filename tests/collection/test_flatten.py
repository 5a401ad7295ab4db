"""Collections flattened into one archive: nothing is lost, and nothing overwritten."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse

from scdl_gpu import SingleCellMemMapDataset, convert_h5ad
from scdl_gpu.collection import SingleCellCollection
from scdl_gpu.errors import NotRawError

Make = Callable[..., scipy.sparse.csr_matrix]


def dense(dataset: SingleCellMemMapDataset) -> np.ndarray:
    """Read a dataset of one block row by row."""
    return np.stack([dataset.get_row_padded(row)[0] for row in range(len(dataset))])


def states(path: Path) -> dict[str, int]:
    """Return when each file and directory was changed."""
    return {str(file): file.stat().st_mtime_ns for file in (path, *path.rglob("*"))}


@pytest.fixture
def collection(make: Make, sources: Path, tmp_path: Path) -> SingleCellCollection:
    """Give a collection of three files of the same genes, with neighbours."""
    for name, n_rows in (("a", 3), ("b", 4), ("c", 5)):
        make(f"{name}.h5ad", n_rows)
    made = SingleCellCollection(tmp_path / "collection", load_neighbors=True)
    made.load_h5ad_multi(sources, use_X_not_raw=True)
    return made


def test_flattening_keeps_everything(collection: SingleCellCollection, tmp_path: Path) -> None:
    """Rows, names, categories, labels and neighbours, in the order of the collection."""
    rows = np.concatenate([dense(dataset) for dataset in collection.fname_to_mmap.values()])

    collection.flatten(tmp_path / "flat")

    flat = SingleCellMemMapDataset(tmp_path / "flat", load_neighbors=True)
    np.testing.assert_array_equal(dense(flat), rows)
    assert flat.obs_names is not None
    assert flat.obs_names.tolist() == [f"{name}.h5ad-{i}" for name, n in (("a", 3), ("b", 4), ("c", 5)) for i in range(n)]
    assert flat.var_names is not None
    assert flat.var_names.tolist() == [f"g{i}" for i in range(6)]
    assert flat.obs_column("batch").cat.categories.tolist() == ["a.h5ad", "b.h5ad", "c.h5ad"]
    assert [flat.get_neighbor_indices_for_cell(row).tolist() for row in range(12)] == [
        [1], [2], [0], [4], [5], [6], [3], [8], [9], [10], [11], [7],
    ]  # fmt: skip
    assert list(collection.fname_to_mmap) == [tmp_path / "collection" / name for name in "abc"]


def test_ragged_collections_keep_every_gene_of_every_block(make: Make, sources: Path, tmp_path: Path) -> None:
    """Eleven files of different genes: eleven blocks, and every row reads with its own, here and in bionemo-scdl."""
    for number in range(11):
        make(f"{number:02d}.h5ad", 2, genes=f"x{number}_", n_vars=3 + number)
    collection = SingleCellCollection(tmp_path / "collection")
    collection.load_h5ad_multi(sources, use_X_not_raw=True)

    collection.flatten(tmp_path / "flat")

    flat = SingleCellMemMapDataset(tmp_path / "flat")
    widths = [3 + number for number in range(11)]
    assert collection.shape() == flat.shape() == (22, widths)
    for number in range(11):
        [symbols] = flat.get_row(2 * number + 1, return_var_features=True, var_feature_names=["symbol"])[1]
        assert symbols.tolist() == [f"X{number}_{i}" for i in range(3 + number)]
        assert flat.var_features().block_names(number).tolist() == [f"x{number}_{i}" for i in range(3 + number)]
        assert flat.get_row_padded(2 * number)[0].shape == (3 + number,)
    bionemo = pytest.importorskip("bionemo.scdl.io.single_cell_memmap_dataset").SingleCellMemMapDataset
    assert bionemo(str(tmp_path / "flat")).number_of_variables() == widths


def test_flattening_onto_something_is_refused(collection: SingleCellCollection, tmp_path: Path) -> None:
    """The path that exists, and the collection, stay as they were."""
    (tmp_path / "flat").mkdir()
    before = states(tmp_path / "collection")

    with pytest.raises(FileExistsError, match="flat exists already"):
        collection.flatten(tmp_path / "flat", destroy_on_copy=True)

    assert list((tmp_path / "flat").iterdir()) == []
    assert states(tmp_path / "collection") == before


def test_destroy_on_copy_removes_the_collection(collection: SingleCellCollection, tmp_path: Path) -> None:
    """Once the flat archive is whole; the object is empty then."""
    collection.flatten(str(tmp_path / "flat"), destroy_on_copy=True, extend_copy_size=5)

    assert not (tmp_path / "collection").exists()
    assert collection.fname_to_mmap == {}
    assert collection.shape() == (0, [0])
    assert len(SingleCellMemMapDataset(tmp_path / "flat")) == 12


def test_destroy_on_copy_removes_only_what_was_joined(collection: SingleCellCollection, make: Make, sources: Path, tmp_path: Path) -> None:
    """Rows appended, archives and files added meanwhile by others stay where they are, and the warnings name them."""
    make("d.h5ad", 2)
    SingleCellCollection(tmp_path / "collection").load_h5ad(sources / "d.h5ad", use_X_not_raw=True)
    SingleCellMemMapDataset(tmp_path / "collection" / "b").concat(SingleCellMemMapDataset(tmp_path / "collection" / "d"))
    (tmp_path / "collection" / "notes.txt").write_text("mine")

    left = re.escape(f"{tmp_path / 'collection'} is kept: besides what was flattened it holds b, d, notes.txt;")
    with pytest.warns(UserWarning, match="b was copied and is kept"), pytest.warns(UserWarning, match=left):
        collection.flatten(tmp_path / "flat", destroy_on_copy=True)

    assert len(SingleCellMemMapDataset(tmp_path / "flat")) == 12
    again = SingleCellCollection(tmp_path / "collection")
    assert {path.name: len(dataset) for path, dataset in again.fname_to_mmap.items()} == {"b": 6, "d": 2}
    assert (tmp_path / "collection" / "notes.txt").read_text() == "mine"
    assert json.loads((tmp_path / "collection" / "metadata.json").read_text()) == {"archives": ["b", "d"]}


def test_files_of_others_keep_the_directory(collection: SingleCellCollection, tmp_path: Path) -> None:
    """The collection is gone, the file is not."""
    (tmp_path / "collection" / "notes.txt").write_text("mine")

    with pytest.warns(UserWarning, match="it holds notes.txt; move"):
        collection.flatten(tmp_path / "flat", destroy_on_copy=True)

    assert [path.name for path in (tmp_path / "collection").iterdir()] == ["notes.txt"]


def test_destroy_on_copy_does_not_remove_the_result(collection: SingleCellCollection, tmp_path: Path) -> None:
    """A path inside the collection would be removed with it."""
    before = states(tmp_path / "collection")

    with pytest.raises(ValueError, match="which destroy_on_copy removes; choose a path outside"):
        collection.flatten(tmp_path / "collection" / "flat", destroy_on_copy=True)

    assert states(tmp_path / "collection") == before


def test_an_empty_collection_is_not_flattened(tmp_path: Path) -> None:
    """There is nothing that an archive could be made of."""
    with pytest.raises(ValueError, match="holds no archives to flatten"):
        SingleCellCollection(tmp_path / "collection").flatten(tmp_path / "flat")

    assert not (tmp_path / "flat").exists()


def test_integers_and_floats_are_not_mixed(make: Make, sources: Path, tmp_path: Path) -> None:
    """The error names the archives and the cure, and the cure works."""
    make("a.h5ad")
    make("b.h5ad")
    collection = SingleCellCollection(tmp_path / "collection", data_dtype="uint8")
    collection.load_h5ad(sources / "a.h5ad", use_X_not_raw=True)
    collection.data_dtype = "float32"
    collection.load_h5ad(sources / "b.h5ad", use_X_not_raw=True)

    with pytest.raises(ValueError, match=r"mix of int and float dtypes for data: .*/a: uint8.*cast_data_to_dtype"):
        collection.flatten(tmp_path / "flat")
    collection.fname_to_mmap[tmp_path / "collection" / "a"].cast_data_to_dtype("float32")
    collection.flatten(tmp_path / "flat")

    assert SingleCellMemMapDataset(tmp_path / "flat").data.dtype == np.float32


@pytest.mark.parametrize(("dtypes", "widest"), [(("uint8", "uint32"), "uint32"), (("float16", "float64"), "float64")])
def test_flattened_values_have_the_widest_dtype(make: Make, sources: Path, tmp_path: Path, dtypes: tuple[str, str], widest: str) -> None:
    """Of one family."""
    matrices = [make("a.h5ad"), make("b.h5ad", 7)]
    collection = SingleCellCollection(tmp_path / "collection")
    for name, dtype in zip("ab", dtypes, strict=True):
        collection.data_dtype = dtype
        collection.load_h5ad(sources / f"{name}.h5ad", use_X_not_raw=True)

    collection.flatten(tmp_path / "flat")

    flat = SingleCellMemMapDataset(tmp_path / "flat")
    assert flat.data.dtype == widest
    np.testing.assert_array_equal(dense(flat), np.concatenate([matrix.toarray() for matrix in matrices]))


def test_a_collection_of_one_is_flattened(make: Make, sources: Path, tmp_path: Path) -> None:
    """Into an archive of its rows; the collection stays whole."""
    matrix = make("a.h5ad")
    collection = SingleCellCollection(tmp_path / "collection")
    collection.load_h5ad_multi(sources, use_X_not_raw=True)

    collection.flatten(tmp_path / "flat")

    np.testing.assert_array_equal(dense(SingleCellMemMapDataset(tmp_path / "flat")), matrix.toarray())
    assert SingleCellCollection(tmp_path / "collection").number_of_rows() == 5


def test_packed_archives_are_flattened_into_a_packed_one(make: Make, sources: Path, tmp_path: Path) -> None:
    """Their shards are linked, rows, names and neighbours follow each other; the collection can be destroyed then."""
    matrices = [make(f"{name}.h5ad", n_rows) for name, n_rows in (("a", 3), ("b", 4))]
    for name in "ab":
        convert_h5ad(sources / f"{name}.h5ad", tmp_path / "collection" / name, obsp=["next_cell_ids"], packed=True)
    collection = SingleCellCollection(tmp_path / "collection")
    inodes = [(tmp_path / "collection" / name / "shard-00000.scdp").stat().st_ino for name in "ab"]

    collection.flatten(tmp_path / "flat", destroy_on_copy=True)

    flat = SingleCellMemMapDataset(tmp_path / "flat", load_neighbors=True)
    np.testing.assert_array_equal(dense(flat), np.concatenate([matrix.toarray() for matrix in matrices]))
    assert [file.stat().st_ino for file in sorted((tmp_path / "flat").glob("*.scdp"))] == inodes
    assert flat.obs_names.tolist() == [f"{name}.h5ad-{i}" for name, n in (("a", 3), ("b", 4)) for i in range(n)]
    assert flat.get_neighbor_indices_for_cell(6).tolist() == [3]
    assert not (tmp_path / "collection").exists()


def test_packed_and_raw_archives_are_not_flattened_together(make: Make, sources: Path, tmp_path: Path) -> None:
    """The error names the packed one, and the way out."""
    make("a.h5ad")
    for name, packed in (("a", False), ("b", True)):
        convert_h5ad(sources / "a.h5ad", tmp_path / "collection" / name, packed=packed)

    with pytest.raises(NotRawError, match=r"collection/b is a packed archive: .*flatten together with raw ones; .*`scdl-gpu unpack`"):
        SingleCellCollection(tmp_path / "collection").flatten(tmp_path / "flat")

    assert not (tmp_path / "flat").exists()


@pytest.mark.parametrize("packed", [False, True])
def test_nothing_is_flattened_into_an_archive(make: Make, sources: Path, tmp_path: Path, packed: bool) -> None:
    """An archive of the collection holds nothing but its own files."""
    make("a.h5ad")
    convert_h5ad(sources / "a.h5ad", tmp_path / "collection" / "a", packed=packed)

    with pytest.raises(ValueError, match=r"a/flat lies inside .*/a, which is one of the inputs"):
        SingleCellCollection(tmp_path / "collection").flatten(tmp_path / "collection" / "a" / "flat")
