"""Conversions, changes and joins under SIGKILL, row by row; and two of them at once."""

import errno

import pytest

CREATIONS = ["construct", "construct in blocks", "convert csr", "convert csc", "convert dense", "fill by hand"]
PACKED = ["pack", "convert packed csr", "convert packed csc", "concat packed", "unpack"]
CHANGES = ["cast", "concat", "concat elsewhere", "save elsewhere"]
DESTRUCTIONS = ["concat destroying", "concat in place destroying", "flatten destroying"]
COLLECTIONS = ["collection load", "collection load many", "flatten"]


@pytest.mark.parametrize("operation", CREATIONS + PACKED + CHANGES + DESTRUCTIONS + COLLECTIONS)
def test_archive_is_old_or_new_when_writer_is_killed(laboratory, operation, points):
    """Killed before any call, an operation leaves whole archives, which earlier readers go on reading, and can be run again."""
    report = laboratory.ask("kill", operation, points=points)

    assert report.faults == [], report.text
    assert set(report.states) == {"old", "new"}


def test_archive_is_whole_when_save_that_changes_nothing_is_killed(laboratory, points):
    """Killed before any call, a save of what is saved already leaves the archive whole."""
    report = laboratory.ask("kill", "save again", points=points)

    assert report.faults == [], report.text
    assert set(report.states) == {"new"}


@pytest.mark.parametrize("operation", ["construct", "convert csr", "fill by hand", "cast", "concat", "concat elsewhere", "pack", "unpack"])
def test_second_writer_is_turned_away(laboratory, operation):
    """While one operation writes an archive, the same one in another process gets an ArchiveError that says so and changes nothing."""
    report = laboratory.ask("contend", operation, points=3)

    assert report.faults == [], report.text
    assert all("ArchiveError" in fault.kinds and "another writer is at work" in fault.message for fault in report.errors)


@pytest.mark.parametrize("operation", ["cast", "concat", "save again"])
def test_change_is_refused_where_directories_cannot_be_exchanged(laboratory, operation):
    """On a file system without RENAME_EXCHANGE changes in place leave the archive and name output_path."""
    report = laboratory.ask("refuse", operation, op="exchange", error=errno.EINVAL)

    [fault] = report.errors
    assert report.faults == [], report.text
    assert "ArchiveError" in fault.kinds
    assert "output_path" in fault.message


@pytest.mark.parametrize("operation", ["cast", "concat", "concat elsewhere", "save again", "concat packed"])
def test_operation_works_where_nothing_can_be_linked(laboratory, operation):
    """On a file system without hard links unchanged files are copied."""
    report = laboratory.ask("refuse", operation, op="link", error=errno.EPERM)

    [outcome] = report.errors
    assert report.faults == [], report.text
    assert outcome.code == 0
    assert report.states == ["new"]
