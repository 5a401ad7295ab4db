"""`scdl-gpu info` and `verify` over packed archives."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cells import N_ROWS, N_VARS, matrix
from packed_cells import byte_of, flip, write_packed

from scdl_gpu.archive.packed import open_packed


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Give a packed archive of three shards and two gene orders."""
    return write_packed(tmp_path / "packed", matrix(), orders=2)


def test_info_tells_shards_and_bytes_per_nonzero(run: Callable, packed: Path) -> None:
    """Facts as JSON and as text: sizes are those of payloads and row tables."""
    shards = open_packed(packed).shards
    words = sum(int(shard.entries["offset"][-1]) for shard in shards)

    found, text = json.loads(run("info", packed, "--json").stdout), run("info", packed).stdout

    nnz = matrix().nnz
    assert (found["cells"], found["genes"], found["nonzeros"]) == (N_ROWS, [N_VARS], nnz)
    assert found["packed"] == {"version": 1, "shards": 3, "gene_orders": 2}
    assert (found["generation"], found["schema_version"], found["dtypes"]) == (None, "0.2.0", {"data": "float32"})
    assert found["array_bytes"] == 4 * words + 16 * (N_ROWS + 3)
    assert found["bytes_per_nonzero"] == found["array_bytes"] / nnz
    assert found["obs"]["line"] == "categorical of 4"
    lines = {line[:11].strip(): line[13:] for line in text.splitlines()}
    assert lines["format"] == "packed, version 1: 3 shards, 2 gene orders"
    assert lines["dtypes"] == "values float32"
    assert lines["rows"] == "canonical"
    assert lines["size"].endswith(f"in packed rows and their table: {found['bytes_per_nonzero']:.2f} bytes per nonzero")


def test_a_whole_archive_is_ok(run: Callable, packed: Path) -> None:
    """One line, code 0."""
    result = run("verify", packed)

    assert result.exit_code == 0
    assert result.stdout.startswith(f"ok {packed}: {N_ROWS} cells, {matrix().nnz:,} nonzeros, ")
    assert "rows all canonical" in result.stdout


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("payload", r"shard-00001.scdp: row 5 .*check"),
        ("rows", r"shard-00001.scdp: .*(table|row)"),
        ("header", r"shard-00001.scdp: .*header"),
    ],
)
def test_damage_is_named(where: str, message: str, run: Callable, packed: Path) -> None:
    """A flipped bit of a row, of the row table, of the header: shard, row where there is one, and code 1."""
    shard = open_packed(packed).shards[1]
    flip(shard.path, {"payload": byte_of(shard, 5) + 1, "rows": shard.header.rows.offset + 84, "header": 30}[where])

    result = run("verify", packed)

    assert result.exit_code == 1
    assert re.search(message, result.stderr)


def test_a_lost_file_of_names_is_a_fault(run: Callable, packed: Path) -> None:
    """What stands beside the rows is verified as for raw archives."""
    (file,) = (packed / "obs_features").glob("*.names")
    file.unlink()

    result = run("verify", packed)

    assert result.exit_code == 1
    assert file.name in result.stderr
    assert np.all([word in result.stderr for word in ("missing", "copy")])
