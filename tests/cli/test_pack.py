"""`scdl-gpu pack`, `unpack`, `convert --packed` and `concat` of packed archives."""

import json
import re
from pathlib import Path

import anndata
import numpy as np
import pytest

from scdl_gpu.archive.packed import open_packed
from scdl_gpu.archive.raw import open_raw
from scdl_gpu.convert import convert_h5ad


@pytest.fixture
def raw(make_h5ad, tmp_path):
    """Give a raw archive of 400 cells."""
    return convert_h5ad(make_h5ad("a.h5ad", 400, 60), tmp_path / "raw")


def test_pack_says_what_it_did(run, raw, tmp_path):
    """Bytes per nonzero before and after, shards, canonical rows: on stdout, exit code 0."""
    result = run("pack", raw, tmp_path / "packed")

    packed = open_packed(tmp_path / "packed")
    [shard] = packed.shards
    each = (4 * shard.n_words + shard.entries.nbytes) / packed.nnz
    assert result.exit_code == 0, result.output
    assert re.search(rf"^packed +{each:.3f} bytes per nonzero, .* [\d.]+ in the source$", result.output, re.M)
    assert re.search(r"^canonical +all rows were$", result.output, re.M)
    assert re.search(r"^shards +1$", result.output, re.M)
    assert f"400 of 60 genes, {packed.nnz:,} nonzeros, as uint8" in result.output


def test_pack_counts_rows_that_were_not_canonical(run, messy, tmp_path):
    """Rows put in canonical form, sums and zeros are told; a sum that overflows is a fault of one line, and nothing is left."""
    result = run("pack", messy, tmp_path / "packed")

    assert result.exit_code == 1
    assert "row 0, column 4 have a sum that uint8 does not hold" in result.stderr
    assert not (tmp_path / "packed").exists()
    run("convert", messy, tmp_path / "wide", "--data-dtype", "uint16", "--as-stored")

    result = run("pack", tmp_path / "wide", tmp_path / "packed")

    assert result.exit_code == 0, result.output
    assert "2 rows were put so: 1 duplicates summed, 1 zeros dropped" in result.stdout


def test_groups_are_shown(run, raw, tmp_path):
    """--group-by shows what orders of their own would gain, --reorder-var leaves the identity; both together are refused."""
    grouped = run("pack", raw, tmp_path / "grouped", "--group-by", "batch")
    reordered = run("pack", raw, tmp_path / "reordered", "--reorder-var")
    both = run("pack", raw, tmp_path / "both", "--group-by", "batch", "--reorder-var")
    unknown = run("pack", raw, tmp_path / "both", "--group-by", "nowhere")

    assert "one gene order for all" in grouped.stdout
    assert "batch_1: -" in grouped.stdout
    assert [order.table for order in open_packed(tmp_path / "reordered").shards[0].orders] == [None]
    assert reordered.exit_code == 0
    assert both.exit_code == 1
    assert "--group-by" in both.stderr
    assert unknown.exit_code == 1
    assert "'batch', 'depth'" in unknown.stderr


def test_unpack_goes_back(run, raw, tmp_path):
    """The arrays of the raw archive come back; a target that is there is refused."""
    run("pack", raw, tmp_path / "packed")

    result = run("unpack", tmp_path / "packed", tmp_path / "again")
    refused = run("unpack", tmp_path / "packed", tmp_path / "again")

    assert result.exit_code == 0, result.output
    assert "as uint8" in result.stdout
    for name in ("row_ptr.npy", "col_ptr.npy", "data.npy"):
        assert (tmp_path / "again" / name).read_bytes() == (raw / name).read_bytes()
    assert refused.exit_code == 1
    assert "exists already" in refused.stderr


def test_convert_packs_at_once(run, make_h5ad, tmp_path):
    """--packed writes a packed archive, with the report; what does not go with it is refused by the name of its option."""
    path = make_h5ad("a.h5ad")

    result = run("convert", path, tmp_path / "packed", "--packed")

    assert result.exit_code == 0, result.output
    assert re.search(r"^packed +[\d.]+ bytes per nonzero", result.stdout, re.M)
    assert open_packed(tmp_path / "packed").nnz == anndata.read_h5ad(path).X.nnz
    for option in (["--as-stored"], ["--workers", "2"], ["--tolerance", "1"]):
        refused = run("convert", path, tmp_path / "other", "--packed", *option)
        assert refused.exit_code == 1
        assert f"{option[0]} does not go with packed rows" in refused.stderr
    assert run("convert", path, tmp_path / "other", "--reorder-var").exit_code == 2
    assert not (tmp_path / "other").exists()


def test_concat_joins_packed_archives(run, raw, tmp_path):
    """Packed archives become one that shares their files; a raw one among them is named, with the way out."""
    run("pack", raw, tmp_path / "packed")

    result = run("concat", tmp_path / "packed", tmp_path / "packed", tmp_path / "both")
    mixed = run("concat", tmp_path / "packed", raw, tmp_path / "mixed")

    assert result.exit_code == 0, result.output
    assert open_packed(tmp_path / "both").n_rows == 800
    assert (tmp_path / "both" / "shard-00001.scdp").stat().st_ino == (tmp_path / "packed" / "shard-00000.scdp").stat().st_ino
    assert mixed.exit_code == 1
    assert "scdl-gpu pack" in mixed.stderr


def test_commands_work_from_a_shell(shell, raw, tmp_path):
    """Installed, the commands pack, verify, describe and unpack an archive."""
    packed, again = tmp_path / "packed", tmp_path / "again"

    runs = [shell("scdl-gpu", *words) for words in (("pack", raw, packed, "--shard-mib", 1), ("verify", packed), ("unpack", packed, again))]
    told = shell("scdl-gpu", "info", packed, "--json")

    assert [one.returncode for one in runs] == [0, 0, 0], [one.stderr for one in runs]
    assert json.loads(told.stdout)["packed"]["shards"] == 1
    np.testing.assert_array_equal(open_raw(again).data, open_raw(Path(raw)).data)
