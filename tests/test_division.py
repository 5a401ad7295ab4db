"""Rows that one device of a node does not hold are divided over all of them, and every rank reads every row.

Three processes with an emulated device each, whose memory the others open, go through all scenarios once (divided.py). It needs no
anndata. Marked `gpu`: two processes on one GPU, which read each other's rows through CUDA IPC.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from cells import N_VARS, backwards, matrix, write
from divided import SOURCES, UNEVEN
from packed_cells import byte_of, flip, write_packed

from scdl_gpu.archive.cuts import divided
from scdl_gpu.archive.packed import open_packed
from scdl_gpu.archive.parts import parts_of
from scdl_gpu.archive.raw import open_raw
from scdl_gpu.errors import ArchiveError

ROOT = Path(__file__).resolve().parents[1]
WORLD = 3
CELLS = {"raw": matrix(n_rows=300, seed=1), "packed": matrix(seed=2), "unsorted": backwards(matrix(n_rows=90, seed=3))}


def write_all(folder: Path) -> None:
    """Write the archives, one of them with a damaged row in its last shard."""
    write(folder / "raw", CELLS["raw"])
    write(folder / "unsorted", CELLS["unsorted"], canonical=False)
    write_packed(folder / "packed", CELLS["packed"])
    write_packed(folder / "damaged", CELLS["packed"])
    shard = open_packed(folder / "damaged").shards[2]
    flip(shard.path, byte_of(shard, 20))


def run(folder: Path, world: int, kind: str) -> list[subprocess.CompletedProcess[str]]:
    """Run divided.py in as many processes as there are ranks."""
    write_all(folder)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    started = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "divided.py"), str(folder), str(rank), str(world), kind],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        ended = [(process, *process.communicate(timeout=300)) for process in started]
    finally:
        for process in started:
            process.kill()
    return [subprocess.CompletedProcess(process.args, process.returncode, out, err) for process, out, err in ended]


def read(folder: Path, rank: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read what a rank saw."""
    with np.load(folder / f"{rank}.npz") as arrays:
        return json.loads((folder / f"{rank}.json").read_text()), dict(arrays)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, Any], dict[str, np.ndarray]]]:
    """Give what three ranks saw; the second of them is killed in the end."""
    folder = tmp_path_factory.mktemp("divided")
    ended = run(folder, WORLD, "emulated")
    assert [one.returncode for one in ended] == [0, -9, 0], "\n".join(one.stderr for one in ended)
    return [read(folder, rank) for rank in range(WORLD)]


Seen = list[tuple[dict[str, Any], dict[str, np.ndarray]]]


def check_epoch(arrays: list[dict[str, np.ndarray]], name: str, *, complete: bool = True) -> None:
    """Hold rows and values of an epoch of all ranks to SciPy; each row comes once, but for padding."""
    expected = sp.vstack([CELLS[source] for source in SOURCES]).toarray()
    for one in arrays:
        assert np.array_equal(one[f"{name} values"], expected[one[f"{name} rows"]])
    rows = np.concatenate([one[f"{name} rows"][~one[f"{name} padding"]] for one in arrays])
    assert not complete or sorted(rows.tolist()) == list(range(expected.shape[0]))
    assert len({one[f"{name} rows"].size for one in arrays}) == 1


@pytest.mark.parametrize("output", ["csr", "dense"])
def test_every_rank_serves_every_row(seen: Seen, output: str) -> None:
    """An epoch is complete and disjoint over ranks; its rows are SciPy's, and bit for bit those of a loader on the CPU."""
    arrays = [one for _, one in seen]

    check_epoch(arrays, output)
    for one in arrays:
        assert one[f"{output} values"].tobytes() == one[f"{output} cpu values"].tobytes()
        assert one[f"{output} rows"].tolist() == one[f"{output} cpu rows"].tolist()
    assert "divided over the memory of the devices of 3 ranks" in seen[0][0]["repr"]


def test_each_rank_holds_its_share(seen: Seen) -> None:
    """A rank holds a third of the rows, in whole pages, and opens what the two others hold; closed, it has neither."""
    for said, _ in seen:
        held, opened, *left = said["held"]
        assert said["size_bytes"] / WORLD - 1024 < held < said["size_bytes"] / WORLD + 1024 + 4096
        assert opened == 2
        assert left == [0, 0, 0]


def test_a_small_device_holds_less(seen: Seen) -> None:
    """Where one rank has little room the others hold the rest, equally."""
    check_epoch([one for _, one in seen], "uneven")
    for said, _ in seen:
        first, second, third = said["uneven"]
        assert 0 < second <= UNEVEN[1]
        assert abs(first - third) <= 1
        assert first > 1.1 * second


@pytest.mark.parametrize(
    ("name", "kind", "own", "text"),
    [
        ("narrow", "DeviceError", None, "of rows exceed the budgets of 3 ranks on this node, "),
        ("short", "DeviceError", 2, "emulated has 100 bytes free"),
        ("far", "DeviceError", None, "has no peer access to emulated"),
        ("closed", "DeviceError", 0, "emulated cannot open memory of others"),
        ("damaged", "ArchiveError", 2, "shard-00002.scdp: row 20 does not match its check"),
        ("other", "DeviceError", None, "rank 1 has other rows than rank 0"),
        ("streamed", "ValueError", None, "holds all rows in memory, windows=True streams them"),
        ("cpu", "DeviceError", 1, "needs a GPU for each rank"),
    ],
)
def test_all_ranks_fail_alike(seen: Seen, name: str, kind: str, own: int | None, text: str) -> None:
    """Where rows cannot be divided, or one rank fails, all raise, naming it, and nothing is left on any device."""
    for rank, (said, _) in enumerate(seen):
        found, message, left = said[name]
        assert text in message
        assert (f"rank {own} could not" in message) == (own is not None and own != rank)
        assert found == ("ValueError" if name == "cpu" and rank == own else kind)
        assert set(left) <= {0}


def test_auto_divides_what_a_device_does_not_hold(seen: Seen) -> None:
    """All ranks divide the rows where one device does not hold them, unless ranks share a device or do not reach each other."""
    for said, _ in seen:
        assert [said[name] for name in ("alone", "divided", "shared", "apart")] == ["device", "node", "pinned", "pinned"]
        assert any("rows are divided over the memory of 3 devices" in line for line in said["logged"])


def test_nodes_divide_rows_among_themselves(seen: Seen) -> None:
    """Ranks of another node hold all rows once more; the epoch is divided over all ranks."""
    check_epoch([one for _, one in seen], "nodes")

    assert [said["nodes"] for said, _ in seen] == [2, 2, 1]


def test_no_memory_goes_while_it_is_read(seen: Seen) -> None:
    """A rank that closes first waits for the others, or, without patience, keeps the memory and says so: they read right rows."""
    for name in ("patient", "hasty"):
        check_epoch([one for _, one in seen[1:]], name, complete=False)

    assert ["still reads rows of this one" in " ".join(said["logged"]) for said, _ in seen] == [True, False, False]


def test_a_dead_rank_holds_nobody_up(seen: Seen) -> None:
    """Where a rank was killed the others close all the same."""
    assert [said.get("survived", False) for said, _ in seen] == [True, False, True]


@pytest.mark.parametrize("shares", [[1, 1], [1, 2, 3], [0, 5, 0, 1], [7]])
def test_shares_are_cut_to_a_row(shares: list[int], tmp_path: Path) -> None:
    """Pieces follow each other, hold every row once, and exceed a share by less than two rows; a part that stands twice is cut once."""
    write_all(tmp_path)
    opened = [open_raw(tmp_path / "raw"), open_packed(tmp_path / "packed"), open_raw(tmp_path / "raw")]
    parts = [part for archive in opened for part in parts_of(archive)]
    total = 5 * CELLS["raw"].nnz + 4 * sum(shard.n_words for shard in open_packed(tmp_path / "packed").shards)
    wanted = [total * share // sum(shares) for share in shares]

    found = divided(parts, wanted)

    held = np.zeros(len(shares))
    for part, pieces in zip(parts, found, strict=True):
        assert [piece.skipped for _, piece in pieces] == np.cumsum([0, *(piece.n_rows for _, piece in pieces)])[:-1].tolist()
        assert sum(piece.n_rows for _, piece in pieces) == part.n_rows
    for holder, piece in (one for pieces in found[:-1] for one in pieces):
        held[holder] += (piece.limit - piece.start) * (5 if piece.shard is None else 4)
    assert held.sum() == total
    assert np.abs(held - wanted).max() < 2 * 5 * N_VARS
    assert [(holder, piece.n_rows) for holder, piece in found[-1]] == [(holder, piece.n_rows) for holder, piece in found[0]]


def test_cutting_at_damaged_pointers_is_refused(tmp_path: Path) -> None:
    """Row pointers that fall where a share ends are named before anything is placed."""
    dense = np.arange(N_VARS) < np.array([13] * 4 + [12] * 4)[:, None]
    write(tmp_path / "a", sp.csr_matrix(dense.astype(np.float32)))
    opened = open_raw(tmp_path / "a")
    np.memmap(tmp_path / "a" / "row_ptr.npy", opened.indptr.dtype, "r+")[:] = [0, 10, 40, 48, 50, 52, 30, 90, 100]

    with pytest.raises(ArchiveError, match=r"a: row 6 begins where no row may; the file is damaged"):
        divided(list(parts_of(opened)), [45 * 5, 15 * 5, 40 * 5])


@pytest.mark.gpu
def test_two_processes_on_a_gpu_read_each_others_rows(tmp_path: Path) -> None:
    """Through CUDA IPC each of two ranks serves every row, though it holds half of them."""
    ended = run(tmp_path, 2, "gpu")

    assert [one.returncode for one in ended] == [0, 0], "\n".join(one.stderr for one in ended)
    arrays = [read(tmp_path, rank)[1] for rank in range(2)]
    for output in ("csr", "dense"):
        check_epoch(arrays, output)
        for one in arrays:
            assert one[f"{output} values"].tobytes() == one[f"{output} cpu values"].tobytes()
