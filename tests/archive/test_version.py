"""The magic number and the schema version."""

import pytest
from bionemo.scdl.schema import version as reference

from scdl_gpu.archive.version import SCDL_MAGIC_NUMBER, CurrentSCDLVersion, SCDLVersion, Version


def test_magic_is_four_letters() -> None:
    """The magic is the bytes 5343444c."""
    assert bytes.fromhex("5343444c") == SCDL_MAGIC_NUMBER


def test_current_version_is_the_references() -> None:
    """Raw archives carry schema 0.1.0, as the reference's do."""
    assert str(CurrentSCDLVersion()) == str(reference.CurrentSCDLVersion()) == "0.1.0"


def test_versions_compare_by_value_only() -> None:
    """Versions are equal or not by their numbers; they have no order and no hash."""
    version = SCDLVersion(0, 1, 0)

    assert version == CurrentSCDLVersion()
    assert version == Version(0, 1, 0)
    assert version != SCDLVersion(0, 1, 1)
    assert version != "0.1.0"
    with pytest.raises(TypeError):
        hash(version)
    with pytest.raises(TypeError):
        version < SCDLVersion(1)  # type: ignore[operator]  # noqa: B015


def test_version_prints_as_the_reference_does() -> None:
    """A version is "a.b.c" for people and its constructor for programmers; its numbers can be set."""
    version = SCDLVersion()
    version.major, version.minor, version.point = 1, 2, 3

    assert str(version) == "1.2.3"
    assert repr(version) == "SCDLVersion(major=1, minor=2, point=3)"
    assert repr(CurrentSCDLVersion()) == repr(reference.CurrentSCDLVersion())
