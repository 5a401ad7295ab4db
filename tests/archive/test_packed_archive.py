"""Packed archives as directories: what opens, what is refused and by which words, and what writing one leaves behind."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from archive.packed_reader import read_archive
from archive.test_packed_golden import GOLDEN
from archives.write_packed import Case, example, write_case

from scdl_gpu.archive import raw
from scdl_gpu.archive.check import check_archive
from scdl_gpu.archive.commit import Staging
from scdl_gpu.archive.features import ObservedFeatureIndex, VariableFeatureIndex
from scdl_gpu.archive.packed import finish_packed, open_archive, open_packed
from scdl_gpu.archive.packed_shard import PackedShard
from scdl_gpu.archive.packed_writer import ShardRecord, shard_name
from scdl_gpu.archive.raw import check_identity, identity
from scdl_gpu.errors import ArchiveError, MissingFileError


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """Give a copy of the golden archive, to be damaged."""
    return Path(shutil.copytree(GOLDEN / "archive", tmp_path / "packed"))


def write(folder: Path, *shards: Case, widths: list[tuple[int, int]] | None = None) -> Path:
    """Write an archive of shards. widths: rows and genes of each table of var; by default one as the first shard has it."""
    folder.mkdir()
    records = [write_case(folder, shard_name(number), case) for number, case in enumerate(shards)]
    var, n_rows = VariableFeatureIndex(), sum(record.n_rows for record in records)
    for number, (rows, genes) in enumerate(widths if widths is not None else [(n_rows, shards[0].n_vars)]):
        var.append_features(rows, {"gene": np.array([f"g{number}_{k}" for k in range(genes)])}, label=str(number))
    finish_packed(folder, shards=records, var=var, obs=ObservedFeatureIndex(), extra={"x": "X", "nnz": -1})
    return folder


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Make a damage that changes metadata.json."""

    def damage(path: Path) -> None:
        file = path / "metadata.json"
        metadata = json.loads(file.read_text())
        change(metadata)
        file.write_text(json.dumps(metadata))

    return damage


def swap(path: Path) -> None:
    """Exchange the two shards of an archive."""
    (path / "shard-00000.scdp").rename(path / "x")
    (path / "shard-00001.scdp").rename(path / "shard-00000.scdp")
    (path / "x").rename(path / "shard-00001.scdp")


def first(metadata: dict[str, Any]) -> dict[str, Any]:
    """Give the entry of the first shard."""
    return metadata["packed"]["shards"][0]


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no list": (edited(lambda m: m.pop("packed")), "is a packed archive|lists no packed shards"),
    "no object": (edited(lambda m: m.update(packed=[1])), "lists no packed shards"),
    "a later version": (edited(lambda m: m["packed"].update(version=2)), "version 2, expected 1; upgrade"),
    "no version": (edited(lambda m: m["packed"].pop("version")), "version None, expected 1"),
    "no shards": (edited(lambda m: m["packed"].pop("shards")), "a shard is None"),
    "shards that are none": (edited(lambda m: m["packed"].update(shards=["shard-00000.scdp"])), "a shard is 'shard-00000.scdp'"),
    "a field less": (edited(lambda m: first(m).pop("hash")), "expected an object with name, rows, nnz, bytes, hash"),
    "a field of another kind": (edited(lambda m: first(m).update(rows="3")), "expected an object with name"),
    "a name that leads away": (edited(lambda m: first(m).update(name="../packed/shard-00000.scdp")), r"named '\.\./packed"),
    "a hidden name": (edited(lambda m: first(m).update(name=".x.scdp")), r"named '\.x\.scdp'"),
    "a name with a zero": (edited(lambda m: first(m).update(name="a\0.scdp")), "is named"),
    "another hash": (edited(lambda m: first(m).update(hash="0" * 16)), "another file"),
    "another size": (edited(lambda m: first(m).update(bytes=4096)), "another file"),
    "other rows": (edited(lambda m: (first(m).update(rows=4), m.update(num_rows=6))), "expected 6 packed rows"),
    "rows that do not add up": (edited(lambda m: m.update(num_rows=6)), "do not add up to 6 rows"),
    "nonzeros that do not add up": (edited(lambda m: m.update(nnz=None)), "do not add up to 5 rows of None"),
    "no JSON": (lambda path: (path / "metadata.json").write_text("{"), "not JSON"),
    "a shard is gone": (lambda path: (path / "shard-00001.scdp").unlink(), "shard-00001.scdp"),
    "a shard is cut short": (lambda path: os.truncate(path / "shard-00001.scdp", 8192), "copy incomplete"),
    "a shard is longer": (lambda path: os.truncate(path / "shard-00001.scdp", 20480), "another file"),
    "shards are swapped": (swap, "another file"),
    "no header": (lambda path: (path / "header.sch").unlink(), "header.sch is missing"),
    "the header of others": (lambda path: shutil.copy(GOLDEN.parent / "0.1.0" / "header.sch", path), "backend MEMMAP_V0"),
    "no genes": (lambda path: shutil.rmtree(path / "var_features"), "describes 0 rows, the header promises 5"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_archives_are_refused_by_name(golden: Path, name: str) -> None:
    """Each damage is an ArchiveError that names the archive and what is wrong, whichever way it is opened."""
    damage, message = DAMAGES[name]
    damage(golden)

    for opened in (open_packed, open_archive):
        with pytest.raises(ArchiveError, match=message) as caught:
            opened(golden)
        assert str(golden) in str(caught.value)


def test_what_is_no_archive_is_missing(tmp_path: Path) -> None:
    """No directory, and an empty one, are missing files."""
    for path in (tmp_path / "nowhere", tmp_path):
        for opened in (open_packed, open_archive):
            with pytest.raises(MissingFileError, match=str(path)):
                opened(path)


def test_files_that_are_not_listed_are_ignored(golden: Path) -> None:
    """Stray shards, of a packing that was killed, are no rows."""
    shutil.copy(golden / "shard-00000.scdp", golden / "shard-00002.scdp")
    (golden / "shard-00003.scdp").write_bytes(b"begun")

    assert open_packed(golden).n_rows == 5


def test_a_written_archive_follows_the_specification(tmp_path: Path) -> None:
    """The reader of the specification reads what finish_packed writes; entries of others do not take the place of its own."""
    path = write(tmp_path / "packed", example(), Case("float32", 10, [((1,), (2.0,))]))

    archive = open_packed(path)

    assert [shard.n_rows for shard in read_archive(path)] == [3, 1]
    assert (archive.n_rows, archive.nnz, archive.metadata["x"], archive.metadata["nnz"]) == (4, 13, "X", 13)
    assert [ShardRecord.of(shard).as_json() for shard in archive.shards] == archive.metadata["packed"]["shards"]
    assert check_archive(archive)


def test_no_shards_are_an_archive(tmp_path: Path) -> None:
    """An archive of no shards has no rows, and one whose rows have no genes has a shard of one gene."""
    empty = open_packed(write(tmp_path / "empty", widths=[]))
    bare = open_packed(write(tmp_path / "bare", Case("uint8", 1, [((), ())]), widths=[(1, 0)]))

    assert (empty.n_rows, empty.nnz, empty.shards) == (0, 0, ())
    assert (bare.n_rows, bare.nnz) == (1, 0)


def test_shards_have_the_genes_of_their_rows(tmp_path: Path) -> None:
    """Tables of var with other genes begin with a shard; rows of a shard that has more or fewer genes are refused."""
    seven, ten = Case("float32", 7, [((6,), (1.0,))]), example()

    archive = open_packed(write(tmp_path / "two", ten, seven, widths=[(3, 10), (1, 7)]))

    assert (archive.n_vars, [shard.n_vars for shard in archive.shards]) == (10, [10, 7])
    for name, widths in (("more", [(3, 10), (1, 8)]), ("fewer", [(4, 7)]), ("across", [(2, 10), (2, 7)])):
        with pytest.raises(ArchiveError, match=r"shard-0000[01]\.scdp: rows of (7|10) genes"):
            open_packed(write(tmp_path / name, ten, seven, widths=widths))


def test_shards_may_differ_in_dtype(tmp_path: Path) -> None:
    """The dtype of an archive holds the values of all its shards."""
    path = write(tmp_path / "packed", Case("int16", 10, [((1,), (2,))]), Case("float32", 10, [((1,), (2.5,))]))

    archive = open_packed(path)

    assert (archive.dtype, archive.dtypes["data.npy"]) == (np.dtype("float32"), "float32")


def test_an_archive_exchanged_while_it_is_opened_is_opened_anew(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of two states of an archive are never mixed."""
    real, calls = PackedShard.open.__func__, []  # type: ignore[attr-defined]

    def exchanging(cls: type[PackedShard], folder: Path, name: str, **options: Any) -> PackedShard:
        calls.append(name)
        if len(calls) == 2:
            with Staging.change(golden, replaced=["shard-00001.scdp", "metadata.json", "header.sch"]) as staging:
                records = [ShardRecord.of(real(PackedShard, folder, "shard-00000.scdp"))]
                records.append(write_case(staging.directory, "shard-00001.scdp", Case("float32", 10, [((1,), (4.0,)), ((), ())])))
                shutil.rmtree(staging.directory / "var_features")
                shutil.rmtree(staging.directory / "obs_features")
                archive = raw.load_features(golden, VariableFeatureIndex, ("var_features",))[0]
                obs = raw.load_features(golden, ObservedFeatureIndex, ("obs_features",))[0]
                finish_packed(staging.directory, shards=records, var=archive, obs=obs)
        return real(cls, folder, name)

    monkeypatch.setattr(PackedShard, "open", classmethod(exchanging))

    archive = open_packed(golden)

    assert calls == ["shard-00000.scdp", "shard-00001.scdp"] * 2
    assert (archive.nnz, archive.metadata["nnz"]) == (13, 13)


def test_a_replaced_archive_is_told_from_the_one_before(golden: Path, tmp_path: Path) -> None:
    """The identity that a pickle carries fits the same files on another machine, and no others."""
    before = open_packed(golden)
    told = identity(before)

    check_identity(open_packed(golden), told)
    moved = {**told, "stamp": tuple(file and (file[0] + 1, *file[1:]) for file in told["stamp"])}
    check_identity(before, moved)
    shutil.rmtree(golden)
    write(golden, example())
    with pytest.raises(ArchiveError, match="was changed or replaced"):
        check_identity(open_packed(golden), told)


def test_names_that_are_gone_are_missed(golden: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Names of cells that metadata.json records, and that the copy lacks, are reported when the archive is opened."""
    (golden / "obs_features" / "names_0.names").unlink()

    open_packed(golden)

    assert "names_0.names: metadata.json records it" in caplog.text
