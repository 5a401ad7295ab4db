"""Reading HDF5 past its lock, against h5py."""

import re
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from scdl_gpu.convert import h5array, spill
from scdl_gpu.convert.h5array import H5Array
from scdl_gpu.errors import SourceError

RANDOM = np.random.default_rng(3)
Open = Callable[..., H5Array]


@pytest.fixture
def opened() -> Iterator[Open]:
    """Give a function that opens the dataset "d" of a file with three threads."""
    files, arrays, pool = [], [], ThreadPoolExecutor(3)

    def make(path: Path, scratch: Path | None = None) -> H5Array:
        files.append(h5py.File(path, "r"))
        arrays.append(H5Array(files[-1]["d"], path=path, pool=pool, threads=3, scratch=scratch))
        return arrays[-1]

    yield make
    for thing in (*arrays, *files):
        thing.close()
    pool.shutdown()


def no_h5py(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make h5py's own reading fail, to see that it is not used."""

    def refuse(*_: Any) -> None:
        raise OSError("read by h5py")

    monkeypatch.setattr(h5py.Dataset, "read_direct", refuse)


def assert_reads(array: H5Array, values: Any) -> None:
    """Read the whole and many parts, one after the other, as a conversion does."""
    for step in (len(values), 7, 1):
        for start in range(0, len(values), step):
            stop = min(start + step, len(values))
            out = np.full((stop - start, *values.shape[1:]), 99, array.dtype)
            np.testing.assert_array_equal(array.read(start, stop, out), values[start:stop])


STORAGES: dict[str, dict[str, Any]] = {
    "contiguous": {},
    "chunks": {"chunks": (8,)},
    "one chunk": {"chunks": (40,)},
    "gzip": {"chunks": (8,), "compression": "gzip"},
    "gzip and shuffle": {"chunks": (8,), "compression": "gzip", "shuffle": True},
    "shuffle": {"chunks": (8,), "shuffle": True},
}


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint16", "int32", "int64", "float16", "float32", "float64", ">i4", ">f8"])
@pytest.mark.parametrize("storage", STORAGES)
def test_usual_storage_is_read_without_h5py(
    storage: str, dtype: str, tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contiguous, chunked, gzip and shuffle, of any dtype and byte order, edge chunks included."""
    values = RANDOM.integers(0, 2, 37).astype(dtype) if dtype == "bool" else RANDOM.integers(0, 100, 37).astype(dtype)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("d", data=values, maxshape=(None,) if storage == "one chunk" else None, **STORAGES[storage])
    array = opened(tmp_path / "a.h5")
    no_h5py(monkeypatch)

    assert_reads(array, values)
    assert array.dtype.isnative


@pytest.mark.parametrize("storage", [{"compression": "lzf"}, {"fletcher32": True}, {"scaleoffset": 0}], ids=str)
def test_other_filters_are_left_to_h5py(storage: dict[str, Any], tmp_path: Path, opened: Open) -> None:
    """Filters that are not known here are read all the same."""
    values = RANDOM.integers(0, 100, 37)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("d", data=values, chunks=(8,), **storage)

    assert_reads(opened(tmp_path / "a.h5"), values)


def test_a_user_block_moves_nothing(tmp_path: Path, opened: Open) -> None:
    """A file that begins with foreign bytes is read at the right place."""
    values = RANDOM.integers(0, 100, 37)
    with h5py.File(tmp_path / "a.h5", "w", userblock_size=512) as file:
        file.create_dataset("d", data=values, chunks=(8,))

    assert_reads(opened(tmp_path / "a.h5"), values)


def test_external_and_compact_storage(tmp_path: Path, opened: Open) -> None:
    """Values in another file, or inside the header, are read."""
    values = RANDOM.integers(0, 100, 37).astype(np.int32)
    with h5py.File(tmp_path / "external.h5", "w") as file:
        file.create_dataset("d", data=values, external=[(tmp_path / "values.bin", 0, values.nbytes)])
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_layout(h5py.h5d.COMPACT)
    with h5py.File(tmp_path / "compact.h5", "w") as file:
        space = h5py.h5s.create_simple(values.shape)
        h5py.h5d.create(file.id, b"d", h5py.h5t.NATIVE_INT32, space, dcpl=plist).write(h5py.h5s.ALL, h5py.h5s.ALL, values)

    assert_reads(opened(tmp_path / "external.h5"), values)
    assert_reads(opened(tmp_path / "compact.h5"), values)


@pytest.mark.parametrize("chunks", [None, (8,)])
def test_what_was_never_written_is_the_fill_value(chunks: Any, tmp_path: Path, opened: Open) -> None:
    """Chunks without bytes, and a dataset without any, give the fill value."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("d", shape=(37,), dtype="i4", chunks=chunks, fillvalue=5)
        if chunks:
            file["d"][8:16] = 1
        expected = file["d"][:]

    assert_reads(opened(tmp_path / "a.h5"), expected)


def test_a_chunk_that_skipped_its_filter_is_read(tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """HDF5 marks chunks that did not shrink: bit k of the mask skips filter k."""
    values = RANDOM.integers(0, 100, 24).astype(np.uint32)
    shuffled = values[8:16].view(np.uint8).reshape(-1, 4).T.tobytes()
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = file.create_dataset("d", shape=(24,), dtype="u4", chunks=(8,), compression="gzip", shuffle=True)
        dataset.id.write_direct_chunk((0,), values[:8].tobytes(), filter_mask=0b11)
        dataset.id.write_direct_chunk((8,), shuffled, filter_mask=0b10)
        dataset.id.write_direct_chunk((16,), zlib.compress(values[16:].tobytes()), filter_mask=0b01)
    array = opened(tmp_path / "a.h5")
    no_h5py(monkeypatch)

    assert_reads(array, values)


@pytest.mark.parametrize("chunks", [None, (5, 7), (30, 4), (1, 23)])
def test_two_dimensions_by_rows_and_columns(chunks: Any, tmp_path: Path, opened: Open) -> None:
    """Rows, and rectangles, of a matrix in tiles."""
    values = RANDOM.integers(0, 3, (31, 23)).astype(np.float32)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("d", data=values, chunks=chunks, compression="gzip" if chunks else None)
    array = opened(tmp_path / "a.h5")

    assert_reads(array, values)
    np.testing.assert_array_equal(array.read(3, 29, np.empty((26, 12), np.float32), columns=(5, 17)), values[3:29, 5:17])


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("dtype", ["u1", "u2", "f4", "f8"])
@pytest.mark.parametrize("shape", [(1000,), (40, 25)])
def test_a_huge_chunk_is_unpacked_into_a_file(
    shape: tuple[int, ...], dtype: str, shuffle: bool, tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks above the limit are read by ranges from a temporary file, which is unpacked once and removed."""
    values = RANDOM.integers(0, 100, shape).astype(dtype)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("d", data=values, chunks=shape, compression="gzip", shuffle=shuffle)
    monkeypatch.setattr(h5array, "MAX_CHUNK_BYTES", 64)
    monkeypatch.setattr(spill, "PIECE_BYTES", 100)
    array = opened(tmp_path / "a.h5", tmp_path)
    no_h5py(monkeypatch)

    assert_reads(array, values)
    assert array.chunk_shape == (1, *shape[1:])
    assert [file.name for file in tmp_path.iterdir()] == ["a.h5"]


@pytest.mark.parametrize("limit", [64, 1 << 20])
@pytest.mark.parametrize("damage", ["flip", "short"])
def test_a_damaged_chunk_is_named(damage: str, limit: int, tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that does not unpack to what it should is an error with file, dataset and place."""
    values = RANDOM.integers(0, 100, 100).astype(np.int32)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = file.create_dataset("d", data=values, chunks=(50,), compression="gzip")
        if damage == "short":
            dataset.id.write_direct_chunk((50,), zlib.compress(values[50:90].tobytes()))
        place = dataset.id.get_chunk_info(1)
    if damage == "flip":
        content = bytearray((tmp_path / "a.h5").read_bytes())
        content[place.byte_offset + place.size // 2] ^= 0x10
        (tmp_path / "a.h5").write_bytes(content)
    monkeypatch.setattr(h5array, "MAX_CHUNK_BYTES", limit)
    array = opened(tmp_path / "a.h5", tmp_path)
    out = np.empty(100, np.int32)

    np.testing.assert_array_equal(array.read(0, 50, out), values[:50])
    with pytest.raises(SourceError, match=re.escape(f"{tmp_path / 'a.h5'}: d[50:100]") + f".*chunk at byte {place.byte_offset:,}"):
        array.read(50, 100, out)


def test_a_file_that_ends_too_early_is_named(tmp_path: Path, opened: Open) -> None:
    """Bytes that are missing under an open file are an error, not zeros."""
    values = np.ones(1 << 20)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("d", data=values)
    array = opened(tmp_path / "a.h5")
    with (tmp_path / "a.h5").open("r+b") as file:
        file.truncate(1 << 20)

    with pytest.raises(SourceError, match=r"a\.h5: d\[0:1048576\] cannot be read"):
        array.read(0, 1 << 20, np.empty(1 << 20))
