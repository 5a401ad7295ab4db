"""Packed shards and archives that are damaged, cut short or made to deceive: an error that names where, or the right answer."""

import functools
import itertools
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from archive.test_packed_golden import decoded
from archives.write_packed import Case, write_case
from emulator import build
from emulator.packed_flips import hashed, row_of, wrong_places
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from scdl_gpu.archive.features import ObservedFeatureIndex, VariableFeatureIndex
from scdl_gpu.archive.packed import finish_packed, open_packed
from scdl_gpu.archive.packed_header import ShardHeader, ShardHeaderError
from scdl_gpu.archive.packed_shard import PackedShard
from scdl_gpu.archive.packed_writer import ShardRecord
from scdl_gpu.errors import ArchiveError, MissingFileError
from scdl_gpu.row_source import PackedRows

NAME = "shard-00000.scdp"
ROOT = Path(__file__).resolve().parents[2]
EVERY = [16, pytest.param(1, marks=pytest.mark.exhaustive)]


@functools.cache
def small_bytes() -> bytes:
    """Make a shard that has everything: two orders and the identity, empty rows, counts, raw blocks, a row of many blocks."""
    random = np.random.default_rng(4)
    rows: list[Any] = [((), ())]
    for n in (1, 7, 8, 9, 40, 64, 3, 0, 100):
        columns = np.sort(random.choice(120, n, replace=False))
        rows.append((columns.tolist(), random.integers(1, 9, n).astype(np.float32)))
    rows[5][1][[3, 30]] = 0.5, np.nan
    rows[6][1][:] = 70_000
    orders = [random.permutation(120).tolist(), random.permutation(120).tolist(), None]
    with tempfile.TemporaryDirectory() as folder:
        write_case(Path(folder), NAME, Case("float32", 120, rows, orders, [number % 3 for number in range(len(rows))]))
        return (Path(folder) / NAME).read_bytes()


def small(folder: Path) -> Path:
    """Give a file of its own with the shard of `small_bytes`."""
    (folder / NAME).write_bytes(small_bytes())
    return folder / NAME


def answer(path: Path) -> tuple[bytes, ...]:
    """Read a whole shard, verifying it."""
    shard = PackedShard.open(path.parent, path.name)
    shard.verify()
    return tuple(array.tobytes() for array in decoded(shard))


def flip_all(folder: Path, places: Iterable[int], change: Callable[[int], int]) -> None:
    """Change bytes of the small shard, each alone; every error must name the shard, and the row whose bytes it is in."""
    path = small(folder)
    data, whole = path.read_bytes(), answer(path)
    shard = PackedShard.open(folder, NAME)
    ends = shard.payload_start + 4 * shard.entries["offset"].astype(np.int64)
    missed = []
    for at in places:
        path.write_bytes(data[:at] + bytes([change(data[at])]) + data[at + 1 :])
        is_payload = ends[0] <= at < ends[-1]
        row = int(np.searchsorted(ends, at, side="right")) - 1
        try:
            right = answer(path) == whole and not is_payload
        except ArchiveError as error:
            right = str(path) in str(error) and (not is_payload or f"row {row} does not match its check" in str(error))
        if not right:
            missed.append(at)

    assert missed == []


def test_flipped_bytes_are_named_or_harmless(tmp_path: Path) -> None:
    """One byte in 16 inverted: an error that names shard and row, or the right answer; in a row, always the error."""
    flip_all(tmp_path, range(8, len(small_bytes()), 16), lambda byte: byte ^ 0xFF)


@pytest.mark.exhaustive
@pytest.mark.parametrize("bit", range(8))
def test_every_flipped_bit_is_named_or_harmless(tmp_path: Path, bit: int) -> None:
    """Every bit of the file flipped, alone: as above. Of bytes that no section claims, bit 0 stands for all."""
    header = PackedShard.open(small(tmp_path).parent, NAME).header
    claimed = [(0, 200), (4080, 4096), *((s.offset, s.offset + s.size_bytes) for s in (header.orders, header.rows, header.payload))]
    places = range(len(small_bytes())) if bit == 0 else itertools.chain(*(range(*place) for place in claimed))

    flip_all(tmp_path, places, lambda byte: byte ^ 1 << bit)


@pytest.mark.parametrize("step", EVERY)
def test_a_reader_without_verifying_sees_flipped_bytes(tmp_path: Path, step: int) -> None:
    """Bytes of the whole file, as a dataset reads its rows: an error that names shard and row, or the right rows."""
    path = small(tmp_path)
    data, shard = path.read_bytes(), PackedShard.open(tmp_path, NAME)
    var, obs = VariableFeatureIndex(), ObservedFeatureIndex()
    var.append_features(shard.n_rows, {"symbol": np.arange(120)})
    obs.append_features({"number": np.arange(shard.n_rows)})
    finish_packed(tmp_path, shards=[ShardRecord.of(shard)], var=var, obs=obs)
    archive = open_packed(tmp_path)

    def rows() -> tuple[bytes, ...]:
        source = PackedRows(replace(archive, shards=(PackedShard.open(tmp_path, NAME),)))
        csr = source.gather(np.arange(shard.n_rows), n_vars=120)
        single = [array.tobytes() for array in source.cell(5)]
        return csr.indptr.tobytes(), csr.indices.tobytes(), csr.data.tobytes(), *single

    whole, missed = rows(), []
    for at in range(0, len(data), step):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        row = row_of(shard, at)
        try:
            right = rows() == whole and row is None
        except ArchiveError as error:
            right = str(path) in str(error) and (row is None or f"row {row} does not match its check" in str(error))
        if not right:
            missed.append(at)

    assert missed == []


@pytest.mark.parametrize("step", EVERY)
def test_flipped_bytes_under_right_hashes_lead_nowhere(tmp_path: Path, step: int) -> None:
    """Bytes that mean something, changed with the hashes as they are and with right ones, through all decoders in Numba."""
    assert list(wrong_places(small(tmp_path), step)) == []


@pytest.mark.parametrize("step", EVERY)
def test_flipped_bytes_under_sanitizers(tmp_path: Path, step: int) -> None:
    """The same through the emulated kernels, built with ASan and UBSan: not a byte beyond their buffers is touched."""
    for source in (ROOT / "kernels").glob("*.cu"):
        build.library(source, "sanitized")
    environment = os.environ | build.sanitizer_environment()

    run = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "kernels" / "sanitized.py"), "--flips", str(step), str(small(tmp_path))],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )

    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout == "no fault\n"


def test_two_flipped_bits_never_pass() -> None:
    """What a flipped bit adds to the check of a row of 16,383 words is never what another takes away."""
    words = np.random.default_rng(1).integers(0, 1 << 32, 16_383, dtype=np.uint32)[:, None]
    factors = (2 * np.arange(words.size, dtype=np.uint32)[:, None] + np.uint32(1)) * np.uint32(0x9E3779B1)

    def terms(changed: NDArray[np.uint32]) -> NDArray[np.uint32]:
        mixed = changed ^ factors
        return (mixed ^ mixed >> np.uint32(16)) * factors

    added = terms(words ^ np.uint32(1) << np.arange(32, dtype=np.uint32)[None, :]) - terms(words)

    assert (added != 0).all()
    assert np.intersect1d(added, np.uint32(0) - added).size == 0


def deceive(folder: Path, step: int) -> None:
    """Change bytes of header, row table and orders, and make their hashes right: an error, or an answer, never a crash."""
    path = small(folder)
    data = path.read_bytes()
    shard, outcomes = PackedShard.open(folder, NAME), {"refused": 0, "answered": 0, "unnamed": 0}
    tables = [(0, 160), *((section.offset, section.offset + section.size_bytes) for section in (shard.header.rows, shard.header.orders))]
    for first, last in tables:
        for at in range(first, last, step):
            for byte in (data[at] ^ 1, data[at] ^ 0x80, 0xFF, 0):
                path.write_bytes(hashed(data[:at] + bytes([byte]) + data[at + 1 :]))
                try:
                    answer(path)
                    outcomes["answered"] += 1
                except ArchiveError as error:
                    outcomes["refused" if str(path) in str(error) else "unnamed"] += 1

    assert outcomes["unnamed"] == 0
    assert outcomes["refused"] > outcomes["answered"]


def test_deceiving_tables_lead_nowhere(tmp_path: Path) -> None:
    """Tables that lie, with right hashes, end in errors or in other rows of the same file."""
    deceive(tmp_path, 5)


@pytest.mark.exhaustive
def test_all_deceiving_tables_lead_nowhere(tmp_path: Path) -> None:
    """As above, with every byte."""
    deceive(tmp_path, 1)


def test_a_shard_cut_short_is_refused(tmp_path: Path) -> None:
    """A file that ends early, at, before and behind each border of its sections and of pages, is refused by its size."""
    path = small(tmp_path)
    data, header = path.read_bytes(), PackedShard.open(tmp_path, NAME).header
    sections = (header.orders, header.rows, header.payload)
    borders = {0, 1, 160, 4088, *range(0, len(data), 4096), *(s.offset for s in sections), *(s.offset + s.size_bytes for s in sections)}
    lengths = {length + by for length in borders for by in (-1, 0, 1)} - {len(data)}

    for length in sorted(length for length in lengths if 0 <= length < len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(ArchiveError, match=r"copy (it|incomplete)"):
            PackedShard.open(tmp_path, NAME)


def test_a_longer_file_is_no_other_shard(tmp_path: Path) -> None:
    """A page behind the end changes nothing that a shard says, and is seen by the archive."""
    path = small(tmp_path)
    whole, data = answer(path), path.read_bytes()

    path.write_bytes(data + bytes(4096))

    assert answer(path) == whole


NUMBERS = st.one_of(
    st.sampled_from(
        [
            0,
            1,
            2,
            3,
            255,
            256,
            257,
            4095,
            4096,
            8192,
            12288,
            16384,
            1 << 24,
            (1 << 32) - 1,
            1 << 32,
            (1 << 34) - 4,
            1 << 63,
            (1 << 64) - 4096,
        ]
    ),
    st.integers(0, (1 << 64) - 1),
)


@settings(max_examples=300)
@given(changes=st.dictionaries(st.sampled_from([*range(8, 160, 2)]), st.tuples(st.sampled_from("BHIQ"), NUMBERS), min_size=1, max_size=5))
@example(changes={128: ("Q", (1 << 64) - 4096), 136: ("Q", 8192)})
def test_random_headers_are_refused_or_safe(tmp_path_factory: pytest.TempPathFactory, changes: dict[int, tuple[str, int]]) -> None:
    """Random fields under a right hash: refused by name, or all that is mapped lies in the file, and verifying it ends."""
    path = small(tmp_path_factory.mktemp("random"))
    text = bytearray(path.read_bytes())
    for at, (code, number) in changes.items():
        struct.pack_into(f"<{code}", text, at, number % (1 << 8 * struct.calcsize(code)))
    path.write_bytes(hashed(bytes(text)))

    try:
        header = ShardHeader.parse(path.read_bytes()[:4096], len(text))
    except ShardHeaderError:
        header = None
    try:
        answer(path)
        refusal = str(path)
    except ArchiveError as error:
        refusal = str(error)

    assert str(path) in refusal
    if header is None:
        assert refusal.startswith(f"{path}: ")
        return
    spare = {header.payload: 256}
    places = [(s.offset, s.offset + s.size_bytes + spare.get(s, 0)) for s in (header.orders, header.rows, header.payload)]
    assert all(4096 <= first <= last <= len(text) for first, last in places)
    assert all(last <= first for (_, last), (first, _) in itertools.pairwise(sorted(places)))


@pytest.mark.parametrize(
    ("at", "text", "message"),
    [
        (0, b"\x00", "no packed shard"),
        (8, struct.pack("<H", 2), r"version 2\.0 .*upgrade"),
        (8, struct.pack("<H", 0), r"version 0\.0"),
        (12, struct.pack("<I", 4), "features 0x4.*upgrade"),
        (21, b"\x04", r"2\^4 nonzeros"),
        (4088, b"\x00\x01", "does not match its hash"),
    ],
)
def test_headers_of_others_are_refused_by_name(tmp_path: Path, at: int, text: bytes, message: str) -> None:
    """What is no shard of version 1 is refused, and the error says why."""
    path = small(tmp_path)
    data = path.read_bytes()
    data = data[:at] + text + data[at + len(text) :]
    path.write_bytes(data if at == 4088 else hashed(data))

    with pytest.raises(ArchiveError, match=message):
        PackedShard.open(tmp_path, NAME)


def test_a_higher_minor_version_opens(tmp_path: Path) -> None:
    """A minor version above ours, and features that a reader may ignore, are read on at."""
    path = small(tmp_path)
    whole, data = answer(path), path.read_bytes()

    path.write_bytes(hashed(data[:10] + struct.pack("<HII", 7, 0, 0xFFFF) + data[20:]))

    assert answer(path) == whole


@pytest.mark.parametrize("kind", ["missing", "directory", "empty", "text"])
def test_what_is_no_shard_is_refused(tmp_path: Path, kind: str) -> None:
    """No file, a directory, an empty file and a text are refused by name."""
    path = tmp_path / NAME
    {"missing": lambda: None, "directory": path.mkdir, "empty": path.touch, "text": lambda: path.write_text("x" * 9000)}[kind]()

    with pytest.raises(MissingFileError if kind == "missing" else ArchiveError, match=re.escape(str(path))):
        PackedShard.open(tmp_path, NAME)
