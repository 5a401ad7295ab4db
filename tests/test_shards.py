"""Several archives are one dataset: where rows lie, which genes they must share, and what travels to another process."""

import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given
from hypothesis import strategies as st

from scdl_gpu import ArchiveError, GPUBatchLoader, convert_h5ad
from scdl_gpu.archive.raw import RawArchive, open_raw
from scdl_gpu.kernels.pointers import OK, shard_pointers
from scdl_gpu.shards import Shards

N_VARS = 6
Make = Callable[..., RawArchive]


def rows(n_rows: int, seed: int = 0, n_vars: int = N_VARS) -> sp.csr_matrix:
    """Make counts 1 to 9 at random places."""
    random = np.random.default_rng(seed)
    return sp.csr_matrix((random.integers(1, 10, (n_rows, n_vars)) * (random.random((n_rows, n_vars)) < 0.5)).astype(np.float32))


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Give the function that stores a matrix with a var table as an archive, and opens it; var_names None: an archive without."""

    def stored(x: sp.csr_matrix, var: pd.DataFrame | None = None, *, names: bool = True, **options: Any) -> RawArchive:
        path = tmp_path / f"archive{len(list(tmp_path.glob('archive*')))}"
        var = pd.DataFrame(index=[f"g{i}" for i in range(x.shape[1])]) if var is None else var
        convert_h5ad(anndata.AnnData(x, var=var), path, **options)
        if not names:
            for file in (path / "var_features").glob("*.names"):
                file.unlink()
        return open_raw(path)

    return stored


def test_rows_are_found_across_archives(make: Make) -> None:
    """Extents name the shard, the start there and the lengths of any rows, through archives of one row and of none, and repeats."""
    parts = [rows(5), rows(0), rows(1, 1), rows(9, 2)]
    archives = [make(part, data_dtype=dtype) for part, dtype in zip(parts, ["float32", "uint8", "uint16", "float64"], strict=True)]
    shards = Shards([*archives, archives[0]])
    whole = sp.vstack([*parts, parts[0]]).tocsr()
    wanted = np.array([0, 19, 4, 5, 5, 6, 14, 15, 3, 0])

    shard, starts, packed, indptr = shards.extents(wanted)

    assert (shards.n_rows, shards.n_vars, shards.nnz) == (20, N_VARS, whole.nnz)
    assert shard.tolist() == [0, 0, 0, 2, 2, 3, 3, 0, 0, 0]
    np.testing.assert_array_equal(np.diff(indptr), np.diff(whole.indptr)[wanted])
    for k, row in enumerate(wanted):
        archive = shards.archives[shard[k]]
        part = slice(starts[k], starts[k] + indptr[k + 1] - indptr[k])
        np.testing.assert_array_equal(archive.indices[part], whole[row].indices)
        part, number = shards.locate(int(row))
        assert (part.archive, number) == (archive, int(row) - (15 if row >= 15 else [0, 5, 5, 6][shard[k]]))
    assert packed.size == 0


@given(
    sizes=st.lists(st.lists(st.integers(0, 300), max_size=6), min_size=1, max_size=8).filter(lambda lists: any(lists)),
    widths=st.lists(st.sampled_from([1, 2, 4, 8]), min_size=8, max_size=8),
    listed=st.lists(st.integers(0, 7), max_size=20),
    draws=st.lists(st.integers(0, 10**6), max_size=20),
)
def test_any_shards_are_searched_right(sizes: list[list[int]], widths: list[int], listed: list[int], draws: list[int]) -> None:
    """Row pointers of every width, of shards of any number of rows, in any list of them, give what a walk over the list gives."""
    widths = [8 if sum(lengths) > 255 and width == 1 else width for lengths, width in zip(sizes, widths, strict=False)]
    indptrs = [np.cumsum([0, *lengths]).astype(f"u{width}") for lengths, width in zip(sizes, widths, strict=True)]
    listed = [*range(len(sizes)), *(number % len(sizes) for number in listed)]
    places = [(number, row) for number in listed for row in range(len(sizes[number]))]
    wanted = np.array([draw % len(places) for draw in draws], np.int64)
    ends = np.cumsum([len(sizes[number]) for number in listed])
    addresses = np.array([indptr.ctypes.data for indptr in indptrs], np.uint64)
    nnz = np.array([sum(lengths) for lengths in sizes])
    shard, starts, indptr = np.empty(wanted.size, np.int32), np.empty(wanted.size, np.int64), np.empty(wanted.size + 1, np.int64)

    found = shard_pointers(ends, np.array(listed, np.int32), addresses, np.array(widths, np.uint8), nnz, wanted, shard, starts, indptr)

    assert found == OK
    expected = [places[row] for row in wanted]
    assert shard.tolist() == [number for number, _ in expected]
    assert starts.tolist() == [sum(sizes[number][:row]) for number, row in expected]
    assert indptr.tolist() == [0, *np.cumsum([sizes[number][row] for number, row in expected]).tolist()]


@pytest.mark.parametrize("n_shards", [1, 3])
def test_rows_out_of_range_are_named(make: Make, n_shards: int) -> None:
    """A row beyond either end raises IndexError with its number and the rows there are."""
    shards = Shards([make(rows(4))] * n_shards)

    for row in (-1, 4 * n_shards, 10**12):
        with pytest.raises(IndexError, match=rf"row {row} is out of range: the dataset has {4 * n_shards} rows"):
            shards.extents(np.array([0, row]))


@pytest.mark.parametrize("n_shards", [1, 3])
def test_damaged_row_pointers_are_named(make: Make, n_shards: int) -> None:
    """A row whose pointers leave the data raises ArchiveError with archive, row and values; other rows are found."""
    archive = make(rows(4))
    path = archive.path / "row_ptr.npy"
    damaged = np.fromfile(path, archive.indptr.dtype)
    damaged[2] = 200
    damaged.tofile(path)
    shards = Shards([*[make(rows(4, 1))] * (n_shards - 1), open_raw(archive.path)])
    first = 4 * (n_shards - 1)

    with pytest.raises(ArchiveError, match=rf"{archive.path.name}: row 1 runs from {damaged[1]} to 200, expected 0 <= start <= stop"):
        shards.extents(np.array([0, first + 1]))
    assert shards.extents(np.array([first, first + 3])).indptr.size == 3


def table(**columns: Sequence[Any]) -> pd.DataFrame:
    """Make a var table with genes g0, g1, ..."""
    return pd.DataFrame(columns, index=[f"g{i}" for i in range(N_VARS)])


NAMES = list("abcdef")
OTHER = list("abcxef")


def test_genes_are_compared_by_name(make: Make) -> None:
    """Archives with the same names go together, whatever else differs; the first name that differs is told."""
    first = make(rows(2), table(mean=np.arange(6.0)))
    same = make(rows(3), table(mean=np.arange(6.0) + 1, symbol=NAMES))
    other = make(rows(2), pd.DataFrame(index=["g0", "g1", "g3", "g2", "g4", "g5"]))

    assert Shards([first, same]).n_rows == 5
    with pytest.raises(ValueError, match=rf"{other.path.name} has gene 2 'g3' where .*{first.path.name} has 'g2' \(var_names\)"):
        Shards([first, same, other])


def test_genes_without_names_are_compared_by_text(make: Make) -> None:
    """Where an archive has no names the text columns of both decide, not statistics; without any text, all columns."""
    first = make(rows(2), table(mean=np.arange(6.0), symbol=NAMES), names=False)
    same = make(rows(2), table(symbol=pd.Categorical(NAMES), mean=np.ones(6)))
    other = make(rows(2), table(symbol=OTHER), names=False)
    numbers = [make(rows(2), table(number=[1, 2, None, 4, 5, last]), names=False) for last in (6, 6, 7)]

    assert Shards([first, same]).n_rows == 4
    assert Shards(numbers[:2]).n_rows == 4
    with pytest.raises(ValueError, match=r"gene 3 'x' where .* has 'd' \(symbol\)"):
        Shards([first, other])
    with pytest.raises(ValueError, match=r"gene 5 .*7.* where .* has .*6"):
        Shards(numbers)


def test_genes_known_by_different_things(make: Make) -> None:
    """Names may lie in bionemo-scdl's var_feature_id; archives that tell genes apart by different things do not go together."""
    named = make(rows(2), table())
    theirs = make(rows(2), table(), names=False)
    symbols = make(rows(2), table(symbol=NAMES), names=False)

    assert theirs.var.blocks[0].columns == ("var_feature_id",)
    assert Shards([theirs, named]).n_rows == 4
    with pytest.raises(ValueError, match=r"told apart by var_names, .* by symbol; they cannot be compared"):
        Shards([named, symbols])
    with pytest.raises(ValueError, match=r"has 5 genes, .* has 6"):
        Shards([named, make(rows(2, n_vars=5))])
    with pytest.raises(ValueError, match="no dataset was given"):
        Shards([])


def test_genes_are_chosen_by_name_or_number(make: Make) -> None:
    """Names and whole numbers of any kind give columns in their order; what is unknown, ambiguous or no gene is named."""
    shards = Shards([make(rows(2))])
    with pytest.warns(UserWarning, match="names are not unique"):
        twice = Shards([make(rows(2), pd.DataFrame(index=["a", "b", "a", "c", "d", "e"]))])
    unnamed = Shards([make(rows(2), table(), names=False)])

    assert shards.gene_numbers(["g4", 0, np.int64(2), np.str_("g1")]).tolist() == [4, 0, 2, 1]
    assert shards.gene_numbers(np.array([5, 1])).tolist() == [5, 1]
    assert twice.gene_numbers(["b", 0]).tolist() == [1, 0]
    for genes, kind, message in (
        (["g4", 4], ValueError, "gene 4 is asked for twice"),
        ([-1], ValueError, "gene -1 is out of range"),
        (["g9"], ValueError, "gene 'g9' is not in var_names"),
        ([1.5], TypeError, "a gene of var is 1.5, expected a whole number"),
        ([], ValueError, "var is empty, expected at least one gene"),
        (5, TypeError, "var is 5, expected a list of genes"),
        ([True, False], TypeError, r"var holds True, expected names or numbers of genes; .*flatnonzero"),
        (np.array([True, False]), TypeError, r"var holds .*True.*, expected names or numbers of genes"),
        ("g1", ValueError, r"var is 'g1', expected a list of genes: var=\['g1'\]"),
    ):
        with pytest.raises(kind, match=message):
            shards.gene_numbers(genes)
    with pytest.raises(ValueError, match="'a' stands more than once"):
        twice.gene_numbers(["a"])
    with pytest.raises(ValueError, match="'g1' is not in var_names"):
        unnamed.gene_numbers(["g1"])


def test_dtypes_meet_in_one_that_holds_all(make: Make) -> None:
    """The dtype of a batch is that of its archives where torch computes in it, else the next that holds every value."""
    x = rows(3)
    expected = {
        ("uint8",): "uint8", ("uint16",): "int32", ("uint32",): "int64", ("uint64",): "int64", ("float16",): "float16",
        ("uint8", "uint16"): "int32", ("uint8", "float16"): "float16", ("uint16", "float32"): "float32", ("uint32", "float32"): "float64",
        ("float16", "float64"): "float64", ("uint8", "float32"): "float32", ("uint16", "uint64"): "int64", ("uint16", "float16"): "float32",
    }  # fmt: skip

    found = {names: Shards([make(x, data_dtype=name) for name in names]).dtype.name for names in expected}

    assert found == expected


@pytest.mark.parametrize("wide", ["float16", "float32", "float64"])
def test_integers_of_64_bits_and_floats_do_not_meet(make: Make, wide: str) -> None:
    """No dtype holds all values of both: sparse batches need a dtype= that says what to do; dense ones are float32, as ever."""
    archives = [make(rows(3), data_dtype=name) for name in ("uint64", wide)]
    paths = [archive.path for archive in archives]

    with pytest.raises(ValueError, match=rf"exactly \(.*{paths[0].name}: uint64, .*{paths[1].name}: {wide}\); .*dtype=torch.float64"):
        GPUBatchLoader(paths, 2, device="cpu")

    asked: dict[torch.dtype, dict[str, Any]] = {dtype: {"dtype": dtype} for dtype in (torch.float64, torch.int64)}
    for made, options in (asked | {torch.float32: {"output": "dense"}}).items():
        assert next(iter(GPUBatchLoader(paths, 2, device="cpu", **options))).x.dtype == made


def test_pickling_carries_paths(make: Make, tmp_path: Path) -> None:
    """Shards travel as paths, an archive that stands there a thousand times is opened once; one that was changed is refused."""
    archive = make(rows(4))
    shards = Shards([archive] * 1000)

    data = pickle.dumps(shards)
    copy = pickle.loads(data)

    assert len(data) < 20_000
    assert copy.n_rows == 4000
    assert len({id(one) for one in copy.archives}) == 1
    shutil.rmtree(archive.path)
    convert_h5ad(rows(5), archive.path)
    with pytest.raises(ArchiveError, match=rf"{archive.path} was changed or replaced .*n_rows 5, expected 4"):
        pickle.loads(data)


def test_pickles_are_of_one_state_of_each_archive(make: Make, tmp_path: Path) -> None:
    """An archive of as many rows and nonzeros in the place of the one that was opened is refused, and so is an older state."""
    kept, archive = make(rows(4)), make(rows(4))
    before = Shards([kept, archive])
    data = pickle.dumps(before)
    assert pickle.loads(data).n_rows == 8

    shutil.rmtree(archive.path)
    now = make(rows(4) * 2)

    assert (now.path, now.n_rows, now.nnz) == (archive.path, archive.n_rows, archive.nnz)
    assert pickle.loads(pickle.dumps(Shards([kept, now]))).n_rows == 8
    for changed in (data, pickle.dumps(before), pickle.dumps(Shards([now, archive]))):
        with pytest.raises(ArchiveError, match=rf"{archive.path} was changed or replaced .*other files"):
            pickle.loads(changed)


def test_pickles_know_the_dtype_that_no_header_does(make: Make) -> None:
    """Values whose dtype was given when the archive was opened have it in another process, too."""
    archive = make(rows(4), data_dtype="uint16")
    (archive.path / "header.sch").unlink()
    shards = Shards([open_raw(archive.path, data_dtype="uint16")])

    copy = pickle.loads(pickle.dumps(shards))

    assert copy.archives[0].dtype == np.uint16
    np.testing.assert_array_equal(copy.archives[0].data, archive.data)


def test_pickles_lead_to_where_the_archive_was_opened(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths are those of the directory of that time, and links led where they led then."""
    archive = make(rows(4))
    (tmp_path / "link").symlink_to(archive.path.name)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    shards = Shards([open_raw(Path(archive.path.name)), open_raw(Path("link"))])
    loader = GPUBatchLoader(archive.path.name, 2, device="cpu")

    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "link").unlink()

    assert pickle.loads(pickle.dumps(shards)).n_rows == 8
    assert len(list(pickle.loads(pickle.dumps(loader)))) == 2
