"""Where a packed archive, or what is made of one, may not go, and what cannot be packed: refused by name, before anything is written."""

from pathlib import Path

import pytest

from scdl_gpu.archive.packed import open_packed
from scdl_gpu.convert import convert_h5ad
from scdl_gpu.errors import SourceError
from scdl_gpu.pack import concat, pack, unpack


def files(path):
    """List all below a directory."""
    return sorted(file.relative_to(path) for file in path.rglob("*"))


@pytest.mark.parametrize("target", ["raw/packed", "raw/obs_features/deep/packed", "link/packed"])
def test_nothing_is_packed_into_its_source(raw, counts, tmp_path, target):
    """The archive that is packed, any directory of it, a link to it: it is as it was."""
    path = raw(counts(20, 30))
    (tmp_path / "link").symlink_to(path)
    before = files(tmp_path)

    with pytest.raises(ValueError, match=rf"{target} lies inside .*raw.*; choose a path outside"):
        pack(path, tmp_path / target)
    with pytest.raises(ValueError, match=r"lies in|lies inside"):
        convert_h5ad(path, tmp_path / target, packed=True)
    with pytest.raises(ValueError, match=r"lies in|lies inside"):
        convert_h5ad([counts(20, 30), path], tmp_path / target)

    assert files(tmp_path) == before


@pytest.mark.parametrize("target", ["packed/raw", "packed/var_features/raw"])
def test_nothing_is_unpacked_or_joined_into_its_source(raw, counts, tmp_path, target):
    """The packed archive is as it was."""
    pack(raw(counts(20, 30)), tmp_path / "packed")
    before = files(tmp_path)

    for act in (lambda path: unpack(tmp_path / "packed", path), lambda path: concat([tmp_path / "packed"] * 2, path)):
        with pytest.raises(ValueError, match=rf"{target} lies inside .*packed.*; choose a path outside"):
            act(tmp_path / target)

    assert files(tmp_path) == before
    assert open_packed(tmp_path / "packed").n_rows == 20


def test_an_archive_may_lie_beside_its_source(raw, counts, tmp_path):
    """A name that only begins like that of the source is outside."""
    path = raw(counts(20, 30))

    pack(path, Path(f"{path}-packed"))

    assert open_packed(Path(f"{path}-packed")).n_rows == 20


def test_what_is_no_raw_archive_is_not_packed(raw, counts, make_h5ad, tmp_path):
    """A path where nothing is, a file, a directory of something else, a packed archive: each is told for what it is."""
    packed = tmp_path / "packed"
    pack(raw(counts(20, 30)), packed)
    (tmp_path / "folder").mkdir()

    for source, message in (
        (tmp_path / "nowhere", "nowhere: no such directory; a raw archive is expected here"),
        (make_h5ad("a.h5ad"), "a.h5ad is a file, and no raw archive; .*convert --packed"),
        (tmp_path / "folder", "folder is a directory without header.sch, and no raw archive"),
        (packed, "packed is packed already.*scdl-gpu unpack"),
    ):
        with pytest.raises(SourceError, match=message):
            pack(source, tmp_path / "new")
    assert not (tmp_path / "new").exists()
