"""The crash harness itself: it sees every way of writing, and it finds what is torn."""

from pathlib import Path

import pytest


def calls(report):
    """Map each file of a log to the calls that touched it."""
    found: dict[str, set[str]] = {}
    for entry in report.log:
        op, *paths = entry.split("\t")
        for path in paths:
            found.setdefault(path, set()).add(op)
    return found


@pytest.mark.parametrize(
    ("file", "ops"),
    [
        ("path.write_bytes", {"open", "write"}),
        ("ndarray.tofile", {"open", "fwrite", "fclose"}),
        ("np.save.npy", {"open", "write"}),
        ("np.memmap", {"open", "mmap"}),
        (".", {"msync"}),
        ("parquet", {"open", "write"}),
        ("shutil.copyfile", {"open", "write"}),
        ("h5py", {"open", "write"}),
        ("fallocate", {"open", "fallocate", "truncate", "link"}),
        ("renamed", {"rename"}),
        ("symlinked", {"symlink", "unlink"}),
        ("made", {"mkdir", "rmdir"}),
    ],
)
def test_calls_are_seen_whatever_writes(laboratory, file, ops):
    """Every way in which the package and its dependencies change files is counted."""
    report = laboratory.ask("shorten", "every route")

    assert ops <= calls(report)[file]


def test_torn_write_is_found(laboratory):
    """Writing over a directory file by file is reported as torn, and for earlier readers as changed."""
    report = laboratory.ask("kill", "torn: in place", points=0)

    faults = "\n".join(report.faults)
    assert "TornError: " in faults
    assert "mapped before, reads otherwise" in faults
    assert {"old", "new"} <= set(report.states)


def test_missing_sync_is_found(laboratory):
    """A rename of files that were not synced, and a rename whose directory was not, are reported."""
    report = laboratory.ask("kill", "torn: unsynced", points=1)

    assert any("hidden/big is not synced after write" in fault for fault in report.faults)
    assert any("at the end: . is not synced after rename archive" in fault for fault in report.faults)


def test_short_write_is_found(laboratory):
    """A writer that does not go on after a short write is reported."""
    report = laboratory.ask("shorten", "torn: short writes")

    assert report.faults


def test_first_last_and_renames_are_tried(laboratory):
    """A dozen points take in the first call, the last and each rename."""
    report = laboratory.ask("kill", "staging change", points=12)

    tried = {int(label.split("call ")[1].split(" ")[0]) for label in report.tried}
    renames = {n for n, entry in enumerate(report.log, 1) if entry.startswith(("rename", "exchange"))}
    assert len(tried) == 12
    assert {1, len(report.log)} | renames <= tried


def test_library_is_built_for_this_run(killer: Path):
    """The preloaded library is compiled from the source beside this test."""
    assert killer.exists()
