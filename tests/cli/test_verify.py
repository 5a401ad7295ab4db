"""`scdl-gpu verify`: whole archives are ok, and the first fault of any other is named."""

import json
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pytest
import scipy.sparse

from scdl_gpu.convert import convert_h5ad


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Give an archive of 40 rows and 30 genes with neighbours, obs and var."""
    random = np.random.default_rng(0)
    counts = random.integers(1, 9, (40, 30)) * (random.random((40, 30)) < 0.5)
    adata = anndata.AnnData(scipy.sparse.csr_matrix(counts.astype("float32")))
    adata.obs["depth"] = random.random(40)
    adata.var["symbol"] = [f"s{k}" for k in range(30)]
    adata.obsp["near"] = scipy.sparse.csr_matrix(np.eye(40, k=1))
    return convert_h5ad(adata, tmp_path / "archive", obsp=["near"])


def overwrite(file: Path, dtype: str, at: int, value: int) -> None:
    """Change one element of a flat file in place."""
    values = np.memmap(file, dtype, mode="r+")
    values[at] = value
    values.flush()


def test_whole_archives_are_ok(shell: Callable, archive: Path) -> None:
    """One line on stdout, nothing on stderr, code 0, and not a byte changed."""
    before = {file: file.read_bytes() for file in archive.rglob("*") if file.is_file()}

    done = shell("scdl-gpu", "verify", archive)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"ok {archive}: 40 cells, ")
    assert done.stdout.endswith("rows all canonical\n")
    assert {file: file.read_bytes() for file in archive.rglob("*") if file.is_file()} == before


def test_rows_that_are_not_canonical_are_no_fault(run: Callable, messy: Path) -> None:
    """Such rows are valid; the line says so, and how they are made canonical."""
    result = run("verify", messy)

    assert result.exit_code == 0
    assert "valid, not all canonical (`scdl-gpu convert`" in result.stdout


@pytest.mark.parametrize(
    ("name", "dtype", "at", "value", "expected"),
    [
        ("col_ptr.npy", "uint8", 100, 30, "holds column 30, expected 0..29"),
        ("row_ptr.npy", "uint16", 20, 0, "falls from"),
        ("row_ptr.npy", "uint16", 0, 1, "begins with 1, expected 0"),
        ("col_ptr.npy", "uint8", 1, 29, "says that all rows are canonical, but some are not"),
        ("data.npy", "uint8", 3, 0, "are not those that metadata.json records"),
        ("neighbor_indices.npy", "uint32", 5, 40, "row 40, expected 0..39"),
    ],
)
def test_changed_elements_are_named(run: Callable, archive: Path, name: str, dtype: str, at: int, value: int, expected: str) -> None:
    """A wrong column, row pointer, order, zero or neighbour ends with code 1 and one line that says what is wrong."""
    overwrite(archive / name, dtype, at, value)

    result = run("verify", archive)

    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1
    assert expected in result.stderr


@pytest.mark.parametrize(
    "name", ["data.npy", "col_ptr.npy", "row_ptr.npy", "header.sch", "metadata.json", "var_features/dataframe_0.parquet"]
)
def test_truncated_files_are_named(run: Callable, archive: Path, name: str) -> None:
    """A file cut in half ends with code 1, and the line names the file."""
    with (archive / name).open("r+b") as file:
        file.truncate((archive / name).stat().st_size // 2)

    result = run("verify", archive)

    assert result.exit_code == 1
    assert str(archive / name) in result.stderr


def test_flipped_bits_of_a_table_are_found(run: Callable, archive: Path) -> None:
    """A flipped bit in the pages of an obs column, which opening does not read, is found by its checksum."""
    table = archive / "obs_features" / "dataframe_0.parquet"
    content = bytearray(table.read_bytes())
    content[60] ^= 16
    table.write_bytes(content)

    opened, result = run("info", archive), run("verify", archive)

    assert opened.exit_code == 0
    assert result.exit_code == 1
    assert str(table) in result.stderr


def test_marks_of_other_writers_do_not_matter(run: Callable, archive: Path) -> None:
    """An archive of which another program changed the length is unmarked: rows out of order are then no fault."""
    metadata = json.loads((archive / "metadata.json").read_text())
    del metadata["nnz"]
    (archive / "metadata.json").write_text(json.dumps(metadata))
    overwrite(archive / "col_ptr.npy", "uint8", 1, 29)

    result = run("verify", archive)

    assert result.exit_code == 0
    assert "not all canonical" in result.stdout


def test_a_wrong_header_names_the_flag(run: Callable, shell: Callable, tmp_path: Path) -> None:
    """Where the dtype of the values is in doubt, what is to be done is said in the command's own words, --stored-dtype, and helps."""
    x = scipy.sparse.csr_matrix(np.full((30, 3), 3.0, "float32"))
    narrow, wide = (convert_h5ad(x, tmp_path / dtype, data_dtype=dtype) for dtype in ("float32", "float64"))
    np.full(90, 3, "uint32").tofile(narrow / "data.npy")
    np.full(90, 2**63, "uint64").tofile(wide / "data.npy")

    doubted, followed = run("info", narrow), run("info", narrow, "--stored-dtype", "uint32")
    unsure = shell("scdl-gpu", "info", wide, "--stored-dtype", "uint64")

    assert (doubted.exit_code, followed.exit_code, unsure.returncode) == (1, 0, 0)
    assert "Open it with data_dtype='uint32' (--stored-dtype)" in doubted.stderr
    assert followed.stderr == ""
    assert "its values are read as data_dtype='uint64' (--stored-dtype), as asked" in unsure.stderr
