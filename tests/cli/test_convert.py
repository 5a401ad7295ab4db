"""`scdl-gpu convert`: h5ad files, directories and archives become one archive, and the summary says what was done."""

import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset as Reference

from scdl_gpu.archive.features import ObservedFeatureIndex, VariableFeatureIndex
from scdl_gpu.archive.raw import open_raw
from scdl_gpu.archive.writer import finish
from scdl_gpu.convert import convert_h5ad


def dense_file(path: Path, x: str = "X") -> np.ndarray:
    """Read a matrix of an h5ad with AnnData, as a dense array."""
    adata = anndata.read_h5ad(path)
    matrix = adata.raw.X if x == "raw" else adata.layers[x] if x != "X" else adata.X
    return matrix.toarray() if scipy.sparse.issparse(matrix) else np.asarray(matrix)


def facts_of(stdout: str) -> dict[str, str]:
    """Split a summary into names and facts; lines that go on are left out."""
    return dict(re.findall(r"^(\w+) +(.+)$", stdout, re.MULTILINE))


def test_summary_says_what_was_done(shell: Callable, make_h5ad: Callable[..., Path], dense_of: Callable, tmp_path: Path) -> None:
    """Which matrix was taken, rows, genes, nonzeros, dtype, bytes per nonzero and seconds are on stdout; stderr is empty."""
    source = make_h5ad("a.h5ad", 60, 40, raw=True)
    expected = dense_file(source, "raw")

    done = shell("scdl-gpu", "convert", source, tmp_path / "new" / "archive")
    facts = facts_of(done.stdout)

    assert (done.returncode, done.stderr) == (0, "")
    assert facts["matrix"] == f"raw of {source}"
    assert (facts["cells"], facts["genes"]) == ("60", "42")
    nnz = np.count_nonzero(expected)
    assert re.fullmatch(rf"{nnz:,} \(sparsity 0\.\d+\), as uint8", facts["nonzeros"])
    assert f"{(2 * nnz + 2 * 61) / nnz:.2f} bytes per nonzero" in facts["size"]
    assert float(facts["seconds"]) >= 0
    np.testing.assert_array_equal(dense_of(tmp_path / "new" / "archive", 42), expected)


@pytest.mark.parametrize(("x", "name"), [("X", "X"), ("raw", "raw"), ("auto", "raw")])
def test_the_matrix_asked_for_is_taken(
    run: Callable, make_h5ad: Callable[..., Path], dense_of: Callable, tmp_path: Path, x: str, name: str
) -> None:
    """--x chooses the matrix, and the summary names it."""
    source = make_h5ad("a.h5ad", 20, 10, raw=True)

    result = run("convert", source, tmp_path / "a", "--x", x)

    assert result.exit_code == 0, result.stderr
    assert facts_of(result.stdout)["matrix"].startswith(f"{name} of ")
    np.testing.assert_array_equal(dense_of(tmp_path / "a", 12 if name == "raw" else 10), dense_file(source, name))


def test_options_reach_the_conversion(run: Callable, tmp_path: Path) -> None:
    """Layers, dtype, tolerance, obsm, obsp and --no-obs do what they say."""
    adata = anndata.AnnData(scipy.sparse.csr_matrix(np.eye(4, 3)), obs=pd.DataFrame({"depth": range(4)}, index=list("abcd")))
    adata.layers["half"] = scipy.sparse.csr_matrix(np.eye(4, 3) * 2.25)
    adata.obsm["X_pca"] = np.arange(8.0).reshape(4, 2)
    adata.obsp["near"] = scipy.sparse.csr_matrix(np.eye(4)[::-1])
    adata.write_h5ad(tmp_path / "a.h5ad")
    options = ("--x", "layers/half", "--data_dtype", "uint8", "--tolerance", "0.25", "--obsm", "X_pca", "--obsp", "near", "--no-obs")

    result = run("convert", tmp_path / "a.h5ad", tmp_path / "a", *options)

    assert result.exit_code == 0, result.stderr
    archive = open_raw(tmp_path / "a")
    assert (archive.data.tolist(), archive.data.dtype) == ([2, 2, 2], np.uint8)
    assert (archive.metadata["x"], archive.metadata["neighbor_key"]) == ("layers/half", "near")
    assert archive.obsm["X_pca"].tolist() == adata.obsm["X_pca"].tolist()
    assert archive.neighbors is not None
    assert archive.neighbors.indices.tolist() == [3, 2, 1, 0]
    assert "depth" not in archive.obs.columns
    assert archive.obs.names is not None
    assert archive.obs.names.tolist() == list("abcd")


@pytest.mark.parametrize(("command", "workers"), [("run", ()), ("run", ("--workers", 1)), ("shell", ("--workers", 2))])
def test_directories_and_files_become_one(
    request: pytest.FixtureRequest,
    make_h5ad: Callable[..., Path],
    dense_of: Callable,
    tmp_path: Path,
    command: str,
    workers: tuple[object, ...],
) -> None:
    """Files of a directory are taken in order of their paths, sources in the order given, however many processes there are."""
    start = request.getfixturevalue(command)
    (tmp_path / "in" / "deep").mkdir(parents=True)
    files = [make_h5ad(name, 7, 5, seed=seed) for seed, name in enumerate(("z.h5ad", "in/b.h5ad", "in/deep/a.h5ad"))]

    done = start(*(["scdl-gpu"] if command == "shell" else []), "convert", files[0], tmp_path / "in", tmp_path / "a", *workers)

    assert done.stderr == ""
    np.testing.assert_array_equal(dense_of(tmp_path / "a", 5), np.concatenate([dense_file(file) for file in files]))
    assert open_raw(tmp_path / "a").metadata["source"] == [str(file) for file in files]


@pytest.mark.parametrize("kind", ["directory", "file", "link"])
def test_existing_paths_are_refused_first(run: Callable, tmp_path: Path, kind: str) -> None:
    """Whatever is at the output, it stays, and the sources are not even looked for."""
    output = tmp_path / "output"
    {"directory": output.mkdir, "file": output.touch, "link": lambda: output.symlink_to("nowhere")}[kind]()

    result = run("convert", tmp_path / "absent.h5ad", output)

    assert result.exit_code == 1
    assert result.stderr == f"error: {output} exists already; choose another path, or remove it first\n"


def test_failures_leave_nothing_behind(run: Callable, make_h5ad: Callable[..., Path], tmp_path: Path) -> None:
    """A value that does not fit ends with code 1, the value in one line, and a folder as it was."""
    source = make_h5ad("a.h5ad", 5, 4)
    damaged = tmp_path / "b.h5ad"
    damaged.write_bytes(source.read_bytes()[:1000])
    before = sorted(tmp_path.iterdir())

    results = [
        run("convert", source, tmp_path / "a", "--x", "layers/none"),
        run("convert", source, tmp_path / "a", "--obsm", "X_none"),
        run("convert", source, damaged, tmp_path / "a"),
        run("convert", tmp_path / "absent.h5ad", tmp_path / "a"),
    ]

    assert [result.exit_code for result in results] == [1, 1, 1, 1]
    assert [result.stderr.count("\n") for result in results] == [1, 1, 1, 1]
    assert "layers/none" in results[0].stderr
    assert "X_none" in results[1].stderr
    assert str(damaged) in results[2].stderr
    assert results[3].stderr.startswith("error: could not find")
    assert sorted(tmp_path.iterdir()) == before


def test_every_real_file_is_converted_and_verified(run: Callable, real_file: Path, tmp_path: Path) -> None:
    """What converts passes `verify`, and bionemo-scdl opens it; what does not is one clear line that names the file."""
    result = run("convert", real_file, tmp_path / "a")

    if result.exit_code:
        assert result.stderr.startswith(f"error: {real_file}")
        assert result.stderr.count("\n") == 1
        assert not (tmp_path / "a").exists()
    else:
        checked = run("verify", tmp_path / "a")
        assert checked.exit_code == 0, checked.stderr
        assert "rows all canonical" in checked.stdout
        assert f"{len(Reference(str(tmp_path / 'a'))):,}" == facts_of(result.stdout)["cells"]


# Archives as sources


def test_archives_become_canonical(run: Callable, messy: Path, dense_of: Callable, tmp_path: Path) -> None:
    """Columns are sorted, duplicates summed without wrapping, zeros dropped; the dtype grows with the sums."""
    result = run("convert", messy, tmp_path / "a", "--canonical")

    assert result.exit_code == 0, result.stderr
    archive = open_raw(tmp_path / "a")
    assert archive.indptr.tolist() == [0, 2, 2, 3]
    assert archive.indices.tolist() == [1, 4, 0]
    assert archive.data.tolist() == [7, 300, 9]
    assert (archive.data.dtype, archive.canonical) == (np.uint16, True)
    assert facts_of(result.stdout)["matrix"] == "X"
    np.testing.assert_array_equal(dense_of(tmp_path / "a", 6), dense_of(messy, 6))


def test_sums_that_do_not_fit_are_named(run: Callable, messy: Path, tmp_path: Path) -> None:
    """With the archive's own dtype the sum of duplicates would wrap: it is refused, with the place and the value."""
    result = run("convert", messy, tmp_path / "a", "--data-dtype", "uint8")

    assert result.exit_code == 1
    assert "the value 300 in row 0, column 4 cannot be stored as uint8" in result.stderr
    assert not (tmp_path / "a").exists()


def test_archives_can_be_written_as_stored(run: Callable, messy: Path, tmp_path: Path) -> None:
    """--as-stored keeps order, duplicates and zeros; only the dtype is another."""
    result = run("convert", messy, tmp_path / "a", "--as-stored", "--data-dtype", "float32")

    assert result.exit_code == 0, result.stderr
    archive = open_raw(tmp_path / "a")
    assert archive.indices.tolist() == [4, 1, 4, 2, 0]
    assert archive.data.tolist() == [200, 7, 100, 0, 9]
    assert (archive.data.dtype, archive.canonical) == (np.float32, False)


def test_archives_keep_all_they_have(run: Callable, tmp_path: Path) -> None:
    """Features of every block, categories, names, labels, neighbours, obsm and obsp are in the new archive."""
    parts = []
    for seed, n_vars in enumerate((4, 6)):
        random = np.random.default_rng(seed)
        adata = anndata.AnnData(scipy.sparse.csr_matrix(random.integers(0, 3, (5, n_vars)).astype(float)))
        adata.obs["batch"] = pd.Categorical(["x", "y", "x", None, "y"], categories=["y", "x", "unused"], ordered=True)
        adata.var["symbol"] = [f"s{k}" for k in range(n_vars)]
        adata.obsm["X_pca"] = random.random((5, 2))
        adata.obsp["near"] = scipy.sparse.csr_matrix(random.random((5, 5)))
        adata.obsp["far"] = scipy.sparse.csr_matrix(random.random((5, 5)))
        adata.write_h5ad(tmp_path / f"{seed}.h5ad")
        parts.append(tmp_path / f"{seed}.h5ad")
    before = open_raw(convert_h5ad(parts, tmp_path / "before", obsm=["X_pca"], obsp=["near", "far"]))

    result = run("convert", tmp_path / "before", tmp_path / "after")

    assert result.exit_code == 0, result.stderr
    after = open_raw(tmp_path / "after")
    assert after.var.column_dims() == [4, 6]
    for index in ("var", "obs"):
        for old, new in zip(getattr(before, index).blocks, getattr(after, index).blocks, strict=True):
            assert old.names().to_numpy().tolist() == new.names().to_numpy().tolist()
            assert old.columns == new.columns
            assert all(old.column(name).to_pandas().equals(new.column(name).to_pandas()) for name in old.columns)
    assert after.obs.column("batch").to_pandas().cat.categories.tolist() == ["y", "x", "unused"]
    assert [after.var.lookup(row)[1] for row in (0, 9)] == [str(part) for part in parts]
    assert before.neighbors is not None
    assert after.neighbors is not None
    for old, new in [(before.neighbors, after.neighbors), *((before.obsp[key], after.obsp[key]) for key in ("near", "far"))]:
        assert [part.tolist() for part in (old.indptr, old.indices, old.data)] == [
            part.tolist() for part in (new.indptr, new.indices, new.data)
        ]
    assert after.obsm["X_pca"].tolist() == before.obsm["X_pca"].tolist()
    assert after.metadata == before.metadata


def test_archives_of_bionemo_scdl_are_converted(run: Callable, make_h5ad: Callable[..., Path], dense_of: Callable, tmp_path: Path) -> None:
    """An archive that bionemo-scdl made comes out with the same values, features and labels."""
    source = make_h5ad("a.h5ad", 20, 10)
    Reference(str(tmp_path / "old"), h5ad_path=str(source), use_X_not_raw=True)

    result = run("convert", tmp_path / "old", tmp_path / "new")

    assert result.exit_code == 0, result.stderr
    np.testing.assert_array_equal(dense_of(tmp_path / "new", 10), dense_file(source))
    new = Reference(str(tmp_path / "new"))
    (symbols,), label = new.var_features().lookup(0)
    assert symbols.tolist() == [f"GENE_{k}" for k in range(10)]
    assert label == str(source)
    assert open_raw(tmp_path / "new").metadata["source"] == [str(tmp_path / "old")]


def test_archives_and_files_can_be_mixed(run: Callable, make_h5ad: Callable[..., Path], messy: Path, tmp_path: Path) -> None:
    """An archive and an h5ad become one, in the order given."""
    source = make_h5ad("a.h5ad", 4, 6)

    result = run("convert", messy, source, tmp_path / "a")

    assert result.exit_code == 0, result.stderr
    archive = open_raw(tmp_path / "a")
    assert archive.n_rows == 7
    assert archive.data[:3].tolist() == [7, 300, 9]
    assert archive.canonical


def test_the_matrix_of_an_archive_is_the_one_it_has(run: Callable, messy: Path, tmp_path: Path) -> None:
    """--x raw of an archive made of X is refused: there is no other matrix in it."""
    results = [run("convert", messy, tmp_path / "a", "--x", "raw"), run("convert", messy, tmp_path / "b", "--x", "X")]

    assert [result.exit_code for result in results] == [1, 0]
    assert "holds one matrix (X), not 'raw'" in results[0].stderr


def test_only_names_are_kept_of_an_archives_obs(run: Callable, make_h5ad: Callable[..., Path], tmp_path: Path) -> None:
    """--no-obs drops the columns of an archive as well, and the table still describes every row."""
    convert_h5ad(make_h5ad("a.h5ad", 4, 6), tmp_path / "old")

    result = run("convert", tmp_path / "old", tmp_path / "new", "--no-obs")

    assert result.exit_code == 0, result.stderr
    obs = open_raw(tmp_path / "new").obs
    assert (obs.number_of_rows(), obs.columns) == (4, ["obs_feature_id"])
    assert obs.names is not None
    assert obs.names.tolist() == [f"cell_{k}" for k in range(4)]


def test_stale_neighbours_are_left_out(run: Callable, messy: Path, tmp_path: Path) -> None:
    """A graph of fewer rows, which bionemo-scdl leaves behind when it appends, is left out with a warning."""
    np.zeros(2, np.uint64).tofile(messy / "neighbor_indptr.npy")
    for name in ("neighbor_indices.npy", "neighbor_values.npy"):
        (messy / name).touch()

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        result = run("convert", messy, tmp_path / "a")

    assert result.exit_code == 0
    assert result.stderr.startswith("warning: neighbours left out")
    assert open_raw(tmp_path / "a").neighbors is None


def test_damaged_archives_are_refused(run: Callable, make_h5ad: Callable[..., Path], tmp_path: Path) -> None:
    """Columns beyond the genes of their block, narrower than another block, are named; nothing is left behind."""
    ragged = convert_h5ad([make_h5ad("a.h5ad", 3, 4, density=1.0), make_h5ad("b.h5ad", 3, 6, density=1.0)], tmp_path / "ragged")
    columns = np.fromfile(ragged / "col_ptr.npy", np.uint8)
    columns[7] = 5
    columns.tofile(ragged / "col_ptr.npy")

    result = run("convert", ragged, tmp_path / "a")

    assert result.exit_code == 1
    assert "row 1 holds column 5, expected 0..3" in result.stderr
    assert not (tmp_path / "a").exists()


def test_values_of_archives_without_header_need_their_dtype(run: Callable, messy: Path, dense_of: Callable, tmp_path: Path) -> None:
    """Where nothing says of which dtype the values are, --stored-dtype does."""
    expected = dense_of(messy, 6)
    (messy / "header.sch").unlink()

    results = [run("convert", messy, tmp_path / "a"), run("convert", messy, tmp_path / "b", "--stored-dtype", "uint8")]

    assert [result.exit_code for result in results] == [1, 0]
    assert "data_dtype=" in results[0].stderr
    np.testing.assert_array_equal(dense_of(tmp_path / "b", 6), expected)


def test_archives_without_features_are_as_wide_as_their_columns(run: Callable, messy: Path, tmp_path: Path) -> None:
    """An archive whose var table is empty is converted all the same."""
    dtypes = open_raw(messy).dtypes
    shutil.rmtree(messy / "var_features")
    shutil.rmtree(messy / "obs_features")
    finish(messy, dtypes=dtypes, var=VariableFeatureIndex(), obs=ObservedFeatureIndex(), canonical=False)

    result = run("convert", messy, tmp_path / "a")

    assert result.exit_code == 0, result.stderr
    assert facts_of(result.stdout)["genes"].startswith("unknown")
    assert open_raw(tmp_path / "a").indices.tolist() == [1, 4, 0]
