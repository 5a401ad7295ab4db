"""Names of rows and genes that metadata.json records: what is gone is missed."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest

from scdl_gpu import ArchiveError, SingleCellMemMapDataset, convert_h5ad
from scdl_gpu.archive.check import check_archive
from scdl_gpu.archive.raw import open_raw


def part(n_vars: int = 2) -> anndata.AnnData:
    """Make two cells with names, of genes with names."""
    adata = anndata.AnnData(X=np.ones((2, n_vars), np.float32))
    adata.obs_names, adata.var_names = ["c0", "c1"], [f"g{gene}" for gene in range(n_vars)]
    return adata


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Give an archive of two blocks of genes and one of rows, all with names."""
    return convert_h5ad([part(2), part(3)], tmp_path / "archive")


def change(archive: Path, **entries: Any) -> None:
    """Write entries of metadata.json."""
    file = archive / "metadata.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def test_names_are_recorded(archive: Path) -> None:
    """By directory and number of block; a whole archive has no fault and makes no noise."""
    assert json.loads((archive / "metadata.json").read_text())["names"] == {"var_features": [0, 1], "obs_features": [0]}
    assert check_archive(open_raw(archive))


@pytest.mark.parametrize("name", ["var_features/names_1.names", "obs_features/names_0.names"])
def test_names_that_are_gone_are_missed(archive: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Opening warns in the log, a check is at fault; the rest can be read."""
    (archive / name).unlink()

    with caplog.at_level(logging.WARNING):
        opened = open_raw(archive)

    assert opened.n_rows == 4
    assert [f"{archive}/{name}: metadata.json records it" in record.getMessage() for record in caplog.records] == [True]
    with pytest.raises(ArchiveError, match=f"{name} is missing, or does not fit its table"):
        check_archive(opened)


def test_names_without_a_record_are_not_missed(archive: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Archives from before the record, and those whose rows bionemo-scdl has changed since, are whole without."""
    (archive / "obs_features" / "names_0.names").unlink()
    appended = shutil.copytree(archive, archive.parent / "appended")
    change(appended, num_rows=3)
    document = json.loads((archive / "metadata.json").read_text())
    (archive / "metadata.json").write_text(json.dumps({key: value for key, value in document.items() if key != "names"}))

    found = [open_raw(archive), open_raw(appended)]

    assert all(check_archive(one) is not None for one in found)
    assert caplog.records == []


@pytest.mark.parametrize("record", [5, [0], {"var_features": 1}, {"obs_features": ["0"]}])
def test_a_record_of_another_kind_is_refused(archive: Path, record: Any) -> None:
    """The message shows it."""
    change(archive, names=record)

    with pytest.raises(ArchiveError, match=r"metadata\.json: 'names' is .*, expected lists of block numbers"):
        open_raw(archive)


def test_a_change_records_the_names_that_are_left(archive: Path, tmp_path: Path) -> None:
    """What is lost is lost: a copy of what could be read is whole."""
    (archive / "obs_features" / "names_0.names").unlink()

    SingleCellMemMapDataset(archive).save(tmp_path / "copy")

    assert json.loads((tmp_path / "copy" / "metadata.json").read_text())["names"] == {"var_features": [0, 1], "obs_features": []}
    assert check_archive(open_raw(tmp_path / "copy"))


@pytest.mark.parametrize("action", ["save", "concat"])
def test_what_bionemo_scdl_changed_is_whole(tmp_path: Path, action: str) -> None:
    """It knows nothing of names: it keeps the files, or changes the number of rows."""
    bionemo = pytest.importorskip("bionemo.scdl.io.single_cell_memmap_dataset").SingleCellMemMapDataset
    archive, other = convert_h5ad(part(), tmp_path / "a"), convert_h5ad(part(), tmp_path / "b")

    theirs = bionemo(str(archive))
    if action == "concat":
        theirs.concat(bionemo(str(other)))
    theirs.save()

    assert check_archive(open_raw(archive)) is not None
