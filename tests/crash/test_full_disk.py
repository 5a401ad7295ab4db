"""Full disks: every call that takes space fails from some point on, or a small file system is really full."""

import contextlib
import errno
import itertools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import anndata
import numpy as np
import pytest
import scipy.sparse as sp

from scdl_gpu.archive.commit import Staging
from scdl_gpu.convert import convert_h5ad
from scdl_gpu.dataset import SingleCellMemMapDataset
from scdl_gpu.errors import ArchiveError

FULL = 4
TAKES_SPACE = ["open", "write", "fwrite", "fflush", "fclose", "fallocate", "mkdir", "link", "symlink"]
MIB = 2**20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 2 MiB."""
    directory = tmp_path / "small"
    directory.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(directory)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.strip()}")
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)


STAGINGS = ["staging create", "staging create below new parents", "staging change", "staging change odd name"]
CREATIONS = ["construct", "construct in blocks", "convert csr", "convert csc", "convert dense", "fill by hand"]
PACKED = ["pack", "convert packed csr", "concat packed", "unpack"]
CHANGES = ["cast", "concat", "concat elsewhere", "save elsewhere"]


@pytest.mark.parametrize(
    ("operation", "error"),
    [
        *itertools.product([*STAGINGS, *CREATIONS, *PACKED, *CHANGES], ["ENOSPC"]),
        *itertools.product(["staging create", "staging change"], ["EDQUOT", "EFBIG"]),
    ],
)
def test_operation_is_undone_when_disk_fills(laboratory, operation, error, points):
    """Full from any call on, a disk keeps the old state and nothing else; the error names path and bytes; later it works."""
    report = laboratory.ask("fail", operation, points=points // 2, mode=FULL, error=getattr(errno, error), ops=TAKES_SPACE)

    assert report.faults == [], report.text
    assert report.errors
    for fault in report.errors:
        assert "ArchiveError" in fault.kinds, fault
        assert fault.directory in fault.message
        assert re.search(r"[\d,]+ bytes", fault.message)


@pytest.mark.parametrize("operation", ["staging create", "staging change", *CREATIONS, *PACKED, *CHANGES])
def test_short_writes_are_continued(laboratory, operation):
    """Writes that take only half of what they are given lose nothing."""
    report = laboratory.ask("shorten", operation)

    assert report.faults == [], report.text


def test_staging_says_how_full_when_really_full(small_disk):
    """On a file system that is really full nothing is left of the new directory, and there is room again at once."""
    path = small_disk / "archive"

    with pytest.raises(ArchiveError, match=rf"{path}: no space left.*[\d,]+ bytes free"), Staging.create(path) as staging:
        (staging.directory / "data").write_bytes(bytes(3 * MIB))

    assert list(small_disk.iterdir()) == []
    with Staging.create(path) as staging:
        (staging.directory / "data").write_bytes(bytes(1 * MIB))
    assert (path / "data").stat().st_size == 1 * MIB


def test_change_keeps_old_directory_when_really_full(small_disk):
    """A change that does not fit leaves the old directory, and one that fits works afterwards."""
    path = small_disk / "archive"
    with Staging.create(path) as staging:
        (staging.directory / "data").write_bytes(b"1" * MIB)

    with pytest.raises(ArchiveError, match="no space left"), Staging.change(path, replaced=("data",)) as staging:
        (staging.directory / "data").write_bytes(b"2" * 2 * MIB)
    with Staging.change(path, replaced=("data",)) as staging:
        (staging.directory / "data").write_bytes(b"3" * 1000)

    assert (path / "data").read_bytes() == b"3" * 1000
    assert list(small_disk.iterdir()) == [path]


def test_archive_is_kept_when_concat_really_fills_the_disk(small_disk, tmp_path):
    """An archive that cannot grow for want of space is refused before anything is written, and is as it was."""
    counts = sp.random_array((1000, 100), density=0.9, rng=0, format="csr", dtype="float32")
    archive = convert_h5ad(counts, small_disk / "archive", data_dtype="float32")
    other = convert_h5ad(counts, tmp_path / "other", data_dtype="float32")
    names = sorted(path.name for path in small_disk.rglob("*"))

    with pytest.raises(ArchiveError, match=rf"{archive}: needs [\d,]+ bytes, .* has [\d,]+ free"):
        SingleCellMemMapDataset(archive).concat([SingleCellMemMapDataset(other)] * 9)

    assert sorted(path.name for path in small_disk.rglob("*")) == names
    np.testing.assert_array_equal(SingleCellMemMapDataset(archive).rows(slice(None)).toarray(), counts.toarray())


def test_conversion_is_undone_when_really_full(small_disk):
    """A conversion that does not fit leaves nothing on a file system that is really full."""
    counts = sp.random_array((10_000, 100), density=0.9, rng=0, format="csr", dtype="float32")

    with pytest.raises(ArchiveError, match=rf"{small_disk}/archive.* [\d,]+ bytes"):
        convert_h5ad(counts, small_disk / "archive", data_dtype="float32")

    assert list(small_disk.iterdir()) == []


def test_constructor_converts_nothing_that_does_not_fit(small_disk, tmp_path):
    """The dataset's own conversion, too, is refused before anything is written, naming needed and free bytes."""
    counts = sp.random_array((10_000, 100), density=0.9, rng=0, format="csr", dtype="float32")
    anndata.AnnData(sp.csr_matrix(counts)).write_h5ad(tmp_path / "large.h5ad")

    with pytest.raises(ArchiveError, match=rf"{small_disk}/archive: needs [\d,]+ bytes, .* has [\d,]+ free"):
        SingleCellMemMapDataset(small_disk / "archive", h5ad_path=tmp_path / "large.h5ad", use_X_not_raw=True)

    assert list(small_disk.iterdir()) == []


def test_empty_arrays_are_refused_when_they_cannot_be_filled(small_disk):
    """Arrays to be filled by hand have their space from the start: filling a map on a full disk would kill the process."""
    with pytest.raises(ArchiveError, match=rf"{small_disk}/archive.* [\d,]+ bytes"):
        SingleCellMemMapDataset(small_disk / "archive", num_elements=10_000_000, num_rows=10)

    assert list(small_disk.iterdir()) == []
    dataset = SingleCellMemMapDataset(small_disk / "archive", num_elements=10_000, num_rows=10)
    dataset.data[:] = 1
    assert dataset.data.sum() == 10_000


@pytest.mark.parametrize("begin", [Staging.create, Staging.change])
def test_staging_is_refused_when_need_is_known(tmp_path, begin):
    """What is known not to fit is refused before anything is written, naming needed and free bytes."""
    path = tmp_path / "archive"
    if begin == Staging.change:
        path.mkdir()
    before = sorted(tmp_path.iterdir())

    with pytest.raises(ArchiveError, match=rf"{path}: needs 1,000,000,000,000,000,000 bytes, .* has [\d,]+ free"):
        begin(path, needed_bytes=10**18)

    assert sorted(tmp_path.iterdir()) == before


def test_file_size_limit_is_a_full_disk(tmp_path):
    """A limit on file sizes (ulimit -f) is reported as a full disk is, and leaves nothing."""
    import resource
    import signal

    path = tmp_path / "archive"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, limits[1]))
    with contextlib.ExitStack() as undo:
        undo.callback(signal.signal, signal.SIGXFSZ, handler)
        undo.callback(resource.setrlimit, resource.RLIMIT_FSIZE, limits)

        with pytest.raises(ArchiveError, match="no space left"), Staging.create(path) as staging:
            (staging.directory / "data").write_bytes(bytes(2 * MIB))

    assert list(tmp_path.iterdir()) == []
