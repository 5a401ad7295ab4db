"""What opening an archive does to it, and costs: nothing, and next to nothing."""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import scipy.sparse
import xxhash

from scdl_gpu import convert_h5ad
from scdl_gpu.archive import blocks, raw
from scdl_gpu.archive.raw import RawArchive, open_raw

Build = Callable[..., Path]
Holds = Callable[[RawArchive], None]


def state_of(path: Path) -> dict[str, tuple[int, int, int]]:
    """Return what any change of a file or directory would change."""
    found = {}
    for file in (path, *sorted(path.rglob("*"))):
        status = file.stat()
        found[str(file)] = (status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
    return found


@pytest.mark.parametrize("generation", ["B", "C", "D"])
def test_opening_writes_nothing(build: Build, generation: str) -> None:
    """No file or directory is touched, and no file is opened for writing."""
    path = build(generation)
    before = state_of(path)
    opened: list[str] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if opened and event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            opened.append(str(arguments[0]))

    sys.addaudithook(hook)
    opened.append("begin")
    archive = open_raw(path)
    archive.var.lookup(0)
    found = opened[1:]
    opened.clear()

    assert found == []
    assert state_of(path) == before
    assert not archive.data.flags.writeable


@pytest.fixture
def read_only(build: Build) -> Iterator[Path]:
    """Give an archive that nobody may write to, in a directory that everybody may enter."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        path = Path(directory, "archive")
        shutil.copytree(build(), path)
        directories = [path, path / "var_features", path / "obs_features"]
        for entry in (*path.rglob("*"), path):
            entry.chmod(0o555)
        yield path
        for entry in directories:
            entry.chmod(0o755)


@pytest.fixture
def somebody(read_only: Path) -> Iterator[None]:
    """Be somebody whom the rights of a file bind: root is nobody for a while, once `read_only` is made."""
    del read_only
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    os.seteuid(user)


@pytest.mark.usefixtures("somebody")
def test_a_read_only_archive_opens(read_only: Path, assert_holds: Holds) -> None:
    """Nothing need be writable: neither file nor directory."""
    with pytest.raises(PermissionError):
        (read_only / "try").touch()

    archive = open_raw(read_only)

    assert_holds(archive)
    assert archive.obs.column("depth")[5] == 6.5


def test_opening_reads_no_more_of_a_large_archive(
    tmp_path: Path, make_header: Callable[..., bytes], make_features: Callable[..., None]
) -> None:
    """A hundred million rows open with a few pages of the arrays resident in this process."""
    n, path = 100_000_000, tmp_path / "large"
    path.mkdir()
    for name, size in (("data.npy", 4 * n), ("col_ptr.npy", 2 * n), ("row_ptr.npy", 4 * (n + 1))):
        with (path / name).open("wb") as file:
            file.truncate(size)  # holes
    with (path / "row_ptr.npy").open("r+b") as file:
        file.seek(4 * n)
        file.write(n.to_bytes(4, "little"))
    (path / "metadata.json").write_text("{}")
    make_features(path / "var_features", [{"gene": ["a", "b"]}], [n], labels=["x"], kind="json")
    (path / "header.sch").write_bytes(make_header([("DATA", n, 6), ("ROWPTR", n + 1, 3), ("COLPTR", n, 2)], []))

    archive = open_raw(path)

    resident = resident_bytes(path)
    assert (archive.n_rows, archive.nnz) == (n, n)
    assert {"col_ptr.npy", "data.npy", "row_ptr.npy"} <= set(resident)
    assert sum(resident.values()) < 1 << 20


def resident_bytes(path: Path) -> dict[str, int]:
    """Return how much of each mapped file below `path` this process has touched."""
    found: dict[str, int] = {}
    current = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if not first.endswith(":"):
            current = Path(line.split()[-1]) if str(path) in line else None
        elif current is not None and first == "Rss:":
            found[current.name] = found.get(current.name, 0) + 1024 * int(line.split()[1])
    return found


def test_obs_columns_are_read_one_at_a_time(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening decodes no column; asking for one decodes that one, once."""
    from scdl_gpu.archive.blocks import MappedTable

    decoded: list[str] = []
    read = MappedTable.read
    monkeypatch.setattr(MappedTable, "read", lambda table, name: (decoded.append(name), read(table, name))[1])

    archive = open_raw(build())
    after_opening = list(decoded)
    first, second = archive.obs.column("depth")[0], archive.obs.column("depth")[1]

    assert after_opening == []
    assert (first, second) == (1.5, 2.5)
    assert decoded == ["depth"]


def test_an_archive_stays_readable_when_its_directory_is_gone(build: Build, assert_holds: Holds, expected: dict[str, Any]) -> None:
    """Everything is mapped at opening: an exchange of the directory does not touch a reader."""
    path = build()
    archive = open_raw(path)
    shutil.rmtree(path)

    assert_holds(archive)
    assert archive.obs.column("depth").to_numpy().tolist() == list(expected["depths"])


def test_an_exchange_during_opening_is_noticed(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of two states are never mixed: an archive that is exchanged while it is opened is opened anew."""
    path, other = build(name="archive"), build(name="other")
    np.full(9, 7, "float32").tofile(other / "data.npy")
    np.array([0, 9, 9, 9, 9, 9, 9], "uint8").tofile(other / "row_ptr.npy")
    map_array, exchanged = raw.map_array, []

    def exchanging(directory: Path, name: str, dtype: str, *, writable: bool = False) -> Any:
        mapped = map_array(directory, name, dtype, writable=writable)
        if name == "data.npy" and not exchanged:
            exchanged.append(path.rename(path.with_name("away")))
            other.rename(path)
        return mapped

    monkeypatch.setattr(raw, "map_array", exchanging)

    archive = open_raw(path)

    assert exchanged
    assert archive.data.tolist() == [7.0] * 9
    assert archive.indptr.tolist() == [0, 9, 9, 9, 9, 9, 9]


@pytest.mark.parametrize("is_exchanged", [True, False])
def test_what_is_odd_about_files_of_two_states_is_not_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_exchanged: bool
) -> None:
    """Names and graphs of another state seem not to fit while an archive is exchanged: no word of it. Where they do not fit, one."""
    archives = []
    for name, n in (("archive", 4), ("other", 6)):
        adata = anndata.AnnData(scipy.sparse.csr_matrix(np.eye(n, 5, dtype="float32")), obsm={"X_pca": np.zeros((n, 2))})
        adata.obs["depth"] = np.arange(n)
        archives.append(convert_h5ad(adata, tmp_path / name, obsm=("X_pca",)))
    path, other = archives
    mapped, opened = blocks.MappedTable.open, []

    def exchanging(file: Path) -> Any:
        if file.name == "names_0.names" and "obs" in file.parts[-2] and not opened:
            opened.append(file)
            if is_exchanged:
                path.rename(path.with_name("away"))
                other.rename(path)
            else:
                file.write_bytes((other / "obs_features" / file.name).read_bytes())
        return mapped(file)

    monkeypatch.setattr(blocks.MappedTable, "open", exchanging)

    archive = open_raw(path)

    assert opened
    assert archive.n_rows == (6 if is_exchanged else 4)
    said = [record.getMessage() for record in caplog.records]
    assert said == [] if is_exchanged else ("holds 6 names" in said[0] and len(said) == 2)


def test_only_a_mark_that_fits_says_canonical(build: Build) -> None:
    """The mark counts for the rows and values that it was made for."""
    path = build(data_dtype="float32")
    values = {"data_dtype": "float32", "data_head": xxhash.xxh3_64_hexdigest(np.arange(1, 10, dtype="float32").tobytes())}
    marks = [
        {"num_rows": 6, "nnz": 9, "canonical": True},
        {"num_rows": 5, "nnz": 9, "canonical": True},
        {"num_rows": 6, "nnz": 8, "canonical": True},
        {"num_rows": 6, "nnz": 9, "canonical": "true"},
        {"num_rows": 6, "canonical": True},
        {"num_rows": 6, "nnz": 9, "canonical": True, "data_head": "0123456789abcdef"},
        {"num_rows": 6, "nnz": 9, "canonical": True, "data_dtype": "uint32"},
    ]

    found = []
    for mark in marks:
        (path / "metadata.json").write_text(json.dumps(values | mark))
        found.append(open_raw(path).canonical)

    assert found == [True, False, False, False, False, False, False]
