"""Staging under SIGKILL, refusal and competition."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from scdl_gpu.archive import commit
from scdl_gpu.archive.commit import Staging, remove, rewrite, tidy
from scdl_gpu.errors import ArchiveError

OPERATIONS = ["staging create", "staging create below new parents", "staging change", "staging change odd name"]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_directory_is_old_or_new_when_writer_is_killed(laboratory, operation, points):
    """Killed before any call, a writer leaves the old directory or the new one, synced, and the next writer tidies up."""
    report = laboratory.ask("kill", operation, points=points)

    assert report.faults == [], report.text
    assert set(report.states) == {"old", "new"}


@pytest.mark.parametrize(("operation", "op"), [("staging create", "rename_noreplace"), ("staging change", "link")])
def test_directory_is_old_or_new_where_calls_are_lacking(laboratory, operation, op, points):
    """Without RENAME_NOREPLACE, and without hard links, the same holds."""
    report = laboratory.ask("kill_where_refused", operation, points=points, op=op, error=errno.ENOSYS)

    assert report.faults == [], report.text
    assert set(report.states) == {"old", "new"}


@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_change_is_refused_where_directories_cannot_be_exchanged(laboratory, error):
    """A file system without RENAME_EXCHANGE keeps its old directory, and the error names output_path."""
    report = laboratory.ask("refuse", "staging change", op="exchange", error=error)

    [fault] = report.errors
    assert report.faults == [], report.text
    assert report.states == ["old"]
    assert "ArchiveError" in fault.kinds
    assert "output_path" in fault.message
    assert f"{fault.directory}/archive" in fault.message


@pytest.mark.parametrize("operation", OPERATIONS)
def test_second_writer_is_turned_away(laboratory, operation):
    """While a writer is at work, another gets an ArchiveError that says so and changes nothing."""
    report = laboratory.ask("contend", operation, points=6)

    assert report.faults == [], report.text
    assert len(report.errors) == 6
    assert all("ArchiveError" in fault.kinds and "another writer" in fault.message for fault in report.errors)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_staging_is_undone_when_sync_fails(laboratory, operation):
    """An I/O error of fsync before the rename is raised, and nothing of the new directory is left."""
    report = laboratory.ask("fail", operation, points=6, mode=3, error=errno.EIO, ops=["fsync"])

    assert report.faults == [], report.text
    assert all("OSError" in fault.kinds for fault in report.errors)


def test_change_keeps_symbolic_links(tmp_path):
    """Links to files and to directories elsewhere are links, and lead there, after a change."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a").write_bytes(b"a")
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive" / "table").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "archive" / "file").symlink_to(tmp_path / "elsewhere" / "a")

    with Staging.change(tmp_path / "archive") as staging:
        (staging.directory / "b").write_bytes(b"b")

    assert (tmp_path / "archive" / "table").is_symlink()
    assert (tmp_path / "archive" / "table" / "a").read_bytes() == b"a"
    assert (tmp_path / "archive" / "file").is_symlink()
    assert (tmp_path / "archive" / "file").read_bytes() == b"a"
    assert (tmp_path / "archive" / "b").read_bytes() == b"b"


def test_change_refuses_directory_it_cannot_read(tmp_path, monkeypatch):
    """A directory that cannot be listed is an error; its files are not left out in silence."""
    (tmp_path / "archive" / "table").mkdir(parents=True)
    (tmp_path / "archive" / "table" / "a").write_bytes(b"a")
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("table"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refusing)
        with pytest.raises(PermissionError, match="table"), Staging.change(tmp_path / "archive"):
            pass

    assert (tmp_path / "archive" / "table" / "a").read_bytes() == b"a"
    assert list(tmp_path.iterdir()) == [tmp_path / "archive"]


def test_change_keeps_modes_of_directories(tmp_path):
    """A directory that a group shares is shared after a change, and so are those in it."""
    (tmp_path / "archive" / "table").mkdir(parents=True)
    (tmp_path / "archive").chmod(0o2775)
    (tmp_path / "archive" / "table").chmod(0o770)

    with Staging.change(tmp_path / "archive"):
        pass

    assert (tmp_path / "archive").stat().st_mode & 0o7777 == 0o2775
    assert (tmp_path / "archive" / "table").stat().st_mode & 0o7777 == 0o770


def test_removal_takes_what_killed_writers_left(tmp_path):
    """With a directory go the stagings that killed writers left beside it, and nothing of its neighbours'."""
    for name in ("archive", ".archive.staging-deaddead", ".archive2.staging-deaddead"):
        (tmp_path / name).mkdir()

    remove(tmp_path / "archive")

    assert list(tmp_path.iterdir()) == [tmp_path / ".archive2.staging-deaddead"]


def test_an_archive_may_be_named_like_a_staging(tmp_path):
    """Neither the staging nor the lock of `x.staging-1` is a leftover of `x`; nor is a file."""
    (tmp_path / ".x.staging-deaddead").mkdir()
    (tmp_path / ".x.staging-00000000").touch()
    with Staging.create(tmp_path / "x.staging-1") as other:
        (other.directory / "file").touch()

        with Staging.create(tmp_path / "x"):
            pass

        assert {path.name for path in tmp_path.iterdir()} == {
            "x", ".x.staging-00000000", ".x.staging-1.lock", other.directory.name,
        }  # fmt: skip
    assert (tmp_path / "x.staging-1" / "file").exists()


def test_new_files_keep_the_modes_of_those_they_replace(tmp_path):
    """Files that a group may write are its files after a change too; new ones have the mode that new files have."""
    (tmp_path / "archive" / "table").mkdir(parents=True)
    (tmp_path / "archive" / "table").chmod(0o770)
    for name in ("data", "table/a"):
        (tmp_path / "archive" / name).touch()
        (tmp_path / "archive" / name).chmod(0o660)

    with Staging.change(tmp_path / "archive", replaced=("data", "table")) as staging:
        (staging.directory / "table").mkdir()
        for name in ("data", "table/a"):
            (staging.directory / name).touch(mode=0o644)

    assert [(tmp_path / "archive" / name).stat().st_mode & 0o777 for name in ("data", "table", "table/a")] == [0o660, 0o770, 0o660]


def test_writers_of_a_small_file_wait_for_each_other(tmp_path):
    """Each reads what the other wrote: of forty additions by four writers none is lost."""
    file = tmp_path / "count"
    file.write_text("0")
    file.chmod(0o664)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(rewrite, file, lambda: str(int(file.read_text()) + 1)) for _ in range(40)]:
            done.result()

    assert file.read_text() == "40"
    assert file.stat().st_mode & 0o777 == 0o664
    assert list(tmp_path.iterdir()) == [file]


def test_a_small_file_is_not_waited_for_without_end(tmp_path, monkeypatch):
    """A writer that hangs is named."""
    monkeypatch.setattr(commit, "PATIENCE_S", 0.05)

    with Staging.create(tmp_path / "file"), pytest.raises(ArchiveError, match="another writer is at work"):
        rewrite(tmp_path / "file", str)


def test_tidying_takes_the_leftovers_and_leaves_writers_at_work(tmp_path):
    """Locks that nobody holds go with their stagings; files that are no locks of ours stay."""
    (tmp_path / ".dead.lock").touch()
    (tmp_path / ".dead.staging-deaddead").mkdir()
    (tmp_path / ".other.lock").write_text("pid 5")
    with Staging.create(tmp_path / "busy") as staging:
        tidy(tmp_path)

        assert {path.name for path in tmp_path.iterdir()} == {".busy.lock", staging.directory.name, ".other.lock"}
