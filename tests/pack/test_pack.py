"""Raw archives packed: the rows that come out are those of SciPy, decoded by a reader that shares no code with the package."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scdl_gpu.archive.packed import open_packed
from scdl_gpu.archive.raw import open_raw
from scdl_gpu.convert import convert_h5ad
from scdl_gpu.errors import SourceError
from scdl_gpu.pack import pack

DTYPES = ["uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64"]


def assert_rows(found, expected):
    """Compare pointers, columns and bits of values with a SciPy CSR."""
    np.testing.assert_array_equal(found.indptr, expected.indptr)
    np.testing.assert_array_equal(found.indices, expected.indices)
    assert found.data.tobytes() == expected.data.tobytes()


def flat(n_vars, *rows):
    """Make a CSR of rows given as (columns, values), stored as they are."""
    indptr = np.cumsum([0, *(len(columns) for columns, _ in rows)])
    columns = np.concatenate([np.array(columns, np.int64) for columns, _ in rows])
    return sp.csr_matrix((np.concatenate([values for _, values in rows]), columns, indptr), shape=(len(rows), n_vars))


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != "float16"])
def test_rows_come_back_in_every_stored_dtype(raw, counts, stored, tmp_path, dtype):
    """Every value of every dtype that raw archives have is packed exactly, one gene order for all rows."""
    matrix = counts(dtype=dtype)

    report = pack(raw(matrix), tmp_path / "packed")

    found = stored(tmp_path / "packed", dtype)
    assert_rows(found, matrix)
    assert (report.nnz, report.n_rows, report.n_vars, report.dtype) == (matrix.nnz, *matrix.shape, dtype)
    assert report.mended.rows == 0


def test_float16_and_odd_values_keep_their_bits(raw, stored, tmp_path):
    """Halves, fractions, NaN payloads, infinities and negative zeros come back bit for bit."""
    bits = np.array([0x3C00, 0x8000, 0x7E01, 0xFC00, 0x3555, 0x4900], np.uint16)
    singles = np.array([0x3F800000, 0x80000000, 0x7FC00123, 0xFF800000, 0x3EAAAAAB], np.uint32).view(np.float32)
    matrix = flat(9, ([0, 2, 3, 4, 6], singles))

    pack(raw(matrix, "singles"), tmp_path / "packed singles")
    pack(raw(bits.view(np.float16)[None], "halves"), tmp_path / "packed halves")

    assert_rows(stored(tmp_path / "packed singles", "float32"), matrix)
    assert stored(tmp_path / "packed halves", "uint16").data.tobytes() == bits.tobytes()


def test_rows_are_put_in_canonical_form_and_counted(raw, stored, tmp_path):
    """Columns are sorted, duplicates summed in the dtype they have and zeros dropped; the report counts rows and elements."""
    matrix = flat(
        6,
        ([4, 1, 4, 2], np.array([200, 7, 50, 0], "uint8")),
        ([0, 3], np.array([1, 2], "uint8")),
        ([2, 1], np.array([3, 4], "uint8")),
        ([0, 5], np.array([0, 9], "uint8")),
    )
    path = raw(matrix, canonical=False)

    report = pack(path, tmp_path / "packed")

    expected = flat(6, ([1, 4], [7, 250]), ([0, 3], [1, 2]), ([1, 2], [4, 3]), ([5], [9])).astype("uint8")
    assert_rows(stored(tmp_path / "packed", "uint8"), expected)
    assert (report.mended.rows, report.mended.duplicates, report.mended.zeros) == (3, 1, 2)
    assert "3 rows were put so: 1 duplicates summed, 2 zeros dropped" in report.words()["canonical"]


@pytest.mark.parametrize(("dtype", "values"), [("uint8", [200, 100]), ("uint16", [65535, 1]), ("float32", [3e38, 3e38])])
def test_sum_that_its_dtype_does_not_hold_is_refused(raw, tmp_path, dtype, values):
    """Duplicates that overflow the dtype they are stored in are named with row and column, and nothing is written."""
    path = raw(flat(6, ([1], np.array([1], dtype)), ([4, 4], np.array(values, dtype))), canonical=False)

    with pytest.raises(SourceError, match=rf"row 1, column 4 have a sum that {dtype} does not hold"):
        pack(path, tmp_path / "packed")

    assert not (tmp_path / "packed").exists()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["raw"]


def test_sums_of_floats_leave_other_values_as_they_are(raw, stored, tmp_path):
    """A signalling NaN beside duplicates keeps its bits; duplicates that cancel out are dropped."""
    odd = np.array([0x7F800001], np.uint32).view(np.float32)[0]
    matrix = flat(6, ([0, 3, 3, 5, 5], np.array([odd, 1.5, 2.25, 4, -4], np.float32)))

    report = pack(raw(matrix, canonical=False), tmp_path / "packed")

    found = stored(tmp_path / "packed", "uint32")
    assert found.indices.tolist() == [0, 3]
    assert found.data[0] == 0x7F800001
    assert found.data[1:].view(np.float32).tolist() == [3.75]
    assert (report.mended.duplicates, report.mended.zeros) == (2, 1)


def test_everything_beside_the_rows_is_kept(make_h5ad, tmp_path):
    """obs, var, names, neighbours, obsm, obsp and what metadata.json says of the source are those of the raw archive."""
    import anndata

    source = anndata.read_h5ad(make_h5ad("a.h5ad"))
    source.obsm["pca"] = np.arange(120.0).reshape(60, 2)
    source.obsp["near"] = sp.csr_matrix(np.eye(60) * np.pi)
    path = convert_h5ad(source, tmp_path / "raw", obsm=["pca"], obsp=["near"])

    pack(path, tmp_path / "packed")

    before, after = open_raw(path), open_packed(tmp_path / "packed")
    assert after.obs.columns == before.obs.columns
    assert after.obs.column("batch").equals(before.obs.column("batch"))
    assert list(after.obs.names) == list(before.obs.names)
    assert list(after.var.block_names(0)) == list(before.var.block_names(0))
    np.testing.assert_array_equal(after.obsm["pca"], source.obsm["pca"])
    for name in ("indptr", "indices", "data"):
        np.testing.assert_array_equal(getattr(after.neighbors, name), getattr(before.neighbors, name))
        np.testing.assert_array_equal(getattr(after.obsp["near"], name), getattr(before.obsp["near"], name))
    assert after.metadata["x"] == "X"
    assert after.metadata["neighbor_key"] == "near"
    assert "data_dtype" not in after.metadata


def test_shards_end_before_the_row_that_would_exceed_them(raw, counts, stored, tmp_path):
    """Rows of one archive go on from shard to shard, each as full as it may be; a row larger than a shard has one to itself."""
    matrix = counts(200, 400)

    report = pack(raw(matrix), tmp_path / "packed", shard_bytes=2000)
    single = pack(raw(matrix[:9], "few"), tmp_path / "single", shard_bytes=1)

    found = stored(tmp_path / "packed", "uint16")
    assert_rows(found, matrix)
    assert report.n_shards == len(found.rows_of_shards) > 5
    sizes = [4 * shard.n_words + 16 * shard.n_rows for shard in open_packed(tmp_path / "packed").shards]
    assert max(sizes) <= 2000
    assert min(sizes[:-1]) > 1700
    assert single.n_shards == 9
    assert_rows(stored(tmp_path / "single", "uint16"), matrix[:9])


def test_blocks_are_packed_in_order_by_threads(raw, counts, stored, tmp_path, monkeypatch):
    """Many small blocks, packed by several threads at once, follow each other as their rows do."""
    monkeypatch.setattr("scdl_gpu.convert.matrix.BLOCK_NNZ", 300)
    monkeypatch.setattr("scdl_gpu.pack.encode.os.sched_getaffinity", lambda _: range(5))
    matrix = counts(300, 100)

    pack(raw(matrix), tmp_path / "packed", shard_bytes=5000)

    assert_rows(stored(tmp_path / "packed", "uint16"), matrix)


@pytest.mark.parametrize("matrix", [sp.csr_matrix((0, 5), dtype="uint8"), sp.csr_matrix((4, 5), dtype="uint8")], ids=["rows", "elements"])
def test_archives_of_nothing_are_packed(raw, stored, tmp_path, matrix):
    """No rows, or no nonzeros, make one shard."""
    report = pack(raw(matrix), tmp_path / "packed")

    assert (report.n_shards, report.n_rows, report.nnz) == (1, matrix.shape[0], 0)
    assert stored(tmp_path / "packed", "uint8").rows_of_shards == [matrix.shape[0]]


def test_existing_path_is_refused(raw, counts, tmp_path):
    """Nothing is written over."""
    path = raw(counts())

    with pytest.raises(FileExistsError, match="exists already"):
        pack(path, path)


def test_packed_source_is_refused(raw, counts, tmp_path):
    """An archive that is packed already is told from a raw one."""
    pack(raw(counts()), tmp_path / "packed")

    with pytest.raises(SourceError, match=r"packed already.*scdl-gpu unpack"):
        pack(tmp_path / "packed", tmp_path / "again")


def test_blocks_of_different_genes_are_refused(counts, tmp_path):
    """An archive whose blocks have different numbers of genes cannot be packed as one."""
    path = convert_h5ad([counts(5, 30), counts(5, 40)], tmp_path / "raw")

    with pytest.raises(SourceError, match="blocks of 30, 40 genes"):
        pack(path, tmp_path / "packed")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard_bytes": 0}, "shard_bytes=0"),
        ({"group_by": "batch", "reorder_var": True}, "several"),
        ({"group_by": "nowhere"}, "nowhere"),
    ],
)
def test_wrong_options_are_refused(raw, counts, tmp_path, options, message):
    """Sizes, columns and combinations that mean nothing are named before anything is written."""
    path = raw(counts())

    with pytest.raises(ValueError, match=message):
        pack(path, tmp_path / "packed", **options)

    assert sorted(one.name for one in tmp_path.iterdir()) == ["raw"]


def test_finished_shards_are_taken_over(raw, counts, stored, dying, tmp_path):
    """A run after one that died keeps the finished shards as they are, and makes the same archive as an undisturbed one."""
    matrix = counts(200, 400)
    path = raw(matrix)
    dying(3, lambda: pack(path, tmp_path / "packed", shard_bytes=4000))
    [staging] = tmp_path.glob(".packed.staging-*")
    kept = {file.name: file.stat().st_ino for file in staging.glob("*.scdp")}

    report = pack(path, tmp_path / "packed", shard_bytes=4000)

    whole = pack(path, tmp_path / "whole", shard_bytes=4000)
    assert report.taken_over == 3
    assert {name: (tmp_path / "packed" / name).stat().st_ino for name in kept} == kept
    for number in range(whole.n_shards):
        name = f"shard-{number:05d}.scdp"
        assert (tmp_path / "packed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert_rows(stored(tmp_path / "packed", "uint16"), matrix)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["packed", "raw", "whole"]


@pytest.mark.parametrize("change", ["source", "options", "shard", "record"])
def test_other_work_is_not_taken_over(raw, counts, stored, dying, tmp_path, change):
    """What was begun for another source, with other options, or is damaged, is removed."""
    path = raw(counts(200, 400))
    dying(2, lambda: pack(path, tmp_path / "packed", shard_bytes=4000))
    [staging] = tmp_path.glob(".packed.staging-*")
    matrix, size = counts(200, 400), 4000
    if change == "source":
        path = raw(matrix := counts(200, 400, seed=1), "other")
        path = path.rename((tmp_path / "raw").rename(tmp_path / "old").with_name("raw"))
    elif change == "options":
        size = 5000
    elif change == "shard":
        with (staging / "shard-00001.scdp").open("r+b") as file:
            file.seek(40)
            file.write(b"\xff")
    else:
        (staging / "packing.json").write_text("{")

    report = pack(path, tmp_path / "packed", shard_bytes=size)

    assert report.taken_over == 0
    assert_rows(stored(tmp_path / "packed", "uint16"), matrix)
    assert not list(tmp_path.glob(".packed*"))


def test_reordered_var_needs_no_mapping(raw, stored, tmp_path):
    """With reorder_var genes stand in var as often as they are expressed, and every gene order is the identity."""
    dense = np.zeros((6, 5), "uint8")
    dense[:, 3], dense[:4, 1], dense[:2, 4], dense[0, 0] = 3, 2, 5, 9
    path = raw(sp.csr_matrix(dense))

    pack(path, tmp_path / "packed", reorder_var=True)

    found = stored(tmp_path / "packed", "uint8")
    after = open_packed(tmp_path / "packed")
    assert found.orders == [[None]]
    assert list(after.var.block_names(0)) == ["3", "1", "4", "0", "2"]
    assert_rows(found, sp.csr_matrix(dense[:, [3, 1, 4, 0, 2]]))


def test_groups_are_told_in_the_report(tmp_path):
    """A column of numbers groups rows as well; the report names what was tried and what it gains."""
    import anndata

    table = pd.DataFrame({"plate": np.arange(40) % 2}, index=[f"c{i}" for i in range(40)])
    counts = sp.random_array((40, 30), density=0.3, rng=0, format="csr", data_sampler=lambda size: np.ones(size))
    path = convert_h5ad(anndata.AnnData(sp.csr_matrix(counts), obs=table), tmp_path / "raw")

    report = pack(path, tmp_path / "packed", group_by="plate")

    assert [(gain.name, gain.rows, gain.is_kept) for gain in report.gains] == [("0", 20, False), ("1", 20, False)]
    assert report.n_orders == 1
    assert "one gene order for all" in report.words()["groups"]
