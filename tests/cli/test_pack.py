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
    reasons = {"--as-stored": "they are canonical", "--workers=2": "by threads of this process on all cores", "--tolerance=1": "exact"}
    for option, why in reasons.items():
        refused = run("convert", path, tmp_path / "other", "--packed", option)
        assert refused.exit_code == 1
        assert f"{option.partition('=')[0]} does not go with packed rows: " in refused.stderr
        assert why in refused.stderr
    assert run("convert", path, tmp_path / "other", "--reorder-var").exit_code == 2
    assert not (tmp_path / "other").exists()


def test_help_of_convert_holds_for_packed_archives(run, raw, make_h5ad, tmp_path):
    """A packed archive is no source, a raw one is; the dtype is the file's or one that holds all; genes are the same; obsm of one."""
    run("pack", raw, tmp_path / "packed")
    path, other = make_h5ad("f.h5ad", 30, 60, dtype="float32"), make_h5ad("o.h5ad", 30, 61)
    source = anndata.read_h5ad(path)
    source.obsm["X_pca"] = np.ones((30, 2))
    source.write_h5ad(path)
    words = " ".join(run("convert", "--help").stdout.split())
    for sentence in ("A packed one is no source", "values keep the dtype of the file", "all sources have the same genes"):
        assert sentence in words

    for source, options, message in (
        ([tmp_path / "packed"], [], "`scdl-gpu unpack`"),
        ([tmp_path / "packed"], ["--packed"], "`scdl-gpu unpack`"),
        ([path, other], ["--packed"], "different genes"),
        ([path, path], ["--packed", "--obsm", "X_pca"], "obsm and obsp of several sources"),
    ):
        refused = run("convert", *source, tmp_path / "new", *options)
        assert refused.exit_code == 1
        assert message in refused.stderr
    for source, options, dtype in ((path, [], "float32"), (path, ["--data-dtype", "uint16"], "uint16"), (raw, [], "uint8")):
        done = run("convert", source, tmp_path / f"new-{dtype}", "--packed", *options)
        assert done.exit_code == 0, done.output
        assert f"nonzeros, as {dtype}" in done.stdout


def test_help_of_concat_holds_for_packed_archives(run, make_h5ad, tmp_path):
    """Genes must be the same; dtypes may differ where one holds the values of all."""
    words = " ".join(run("concat", "--help").stdout.split())
    assert "Genes must be the same, in the same order" in words
    paths = {}
    for name, genes, dtype in (("a", 60, "float32"), ("b", 60, "int32"), ("c", 60, "int64"), ("d", 61, "float32")):
        paths[name] = tmp_path / name
        assert run("convert", make_h5ad(f"{name}.h5ad", 30, genes, dtype=dtype), paths[name], "--packed").exit_code == 0

    joined = run("concat", paths["a"], paths["b"], tmp_path / "joined")
    genes = run("concat", paths["a"], paths["d"], tmp_path / "new")
    dtypes = run("concat", paths["a"], paths["c"], tmp_path / "new")

    assert joined.exit_code == 0, joined.output
    assert "as float64" in joined.stdout
    assert (genes.exit_code, dtypes.exit_code) == (1, 1)
    assert "other genes than" in genes.stderr
    assert f"`scdl-gpu unpack {paths['c']} RAW --data-dtype float64`" in dtypes.stderr
    assert not (tmp_path / "new").exists()


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
