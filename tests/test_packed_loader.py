"""GPUBatchLoader over packed archives, alone and among raw ones: its batches are those of the raw archives, bit for bit.

On the CPU, on the emulated device and, marked `gpu`, on a real one. It needs no anndata.
"""

import logging
import pickle
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from cells import N_ROWS, N_VARS, dense, matrix, rows_of, write
from counted import CountedGpu
from emulator.device import EmulatedDevice
from packed_cells import byte_of, flip, orders_of, write_packed
from torch.utils.data import DataLoader, RandomSampler

from scdl_gpu import ArchiveError, GPUBatchLoader, SingleCellMemMapDataset
from scdl_gpu.archive import orders as gene_orders
from scdl_gpu.archive.packed import open_packed
from scdl_gpu.pack import concat, pack, unpack

STORED = ["uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64"]
VAR = ["g7", 3, "g39"]
OUTPUTS: list[dict[str, Any]] = [
    {},
    {"output": "dense"},
    {"output": "dense", "dtype": torch.bfloat16, "var": VAR},
    {"output": "dense", "dtype": torch.float64, "normalize_total": 1e4},
    {"output": "dense", "normalize_total": 1e4, "log1p": True, "var": VAR},
]
PLACEMENTS = ["device", "pinned", "host"]
EMULATED, GPU = ([(kind, placement) for placement in PLACEMENTS] for kind in ("emulated", "gpu"))
DEVICES = [("cpu", "host"), *EMULATED, *(pytest.param(one, marks=pytest.mark.gpu) for one in GPU)]
NEAR = [("cpu", "host"), ("emulated", "device"), pytest.param(("gpu", "device"), marks=pytest.mark.gpu)]
NEAR_IDS = ["cpu", "emulated", "gpu"]
"""Where kernels differ, wherever rows lie."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*Sparse CSR tensor support is in beta:UserWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the folder of archives that no test changes."""
    return tmp_path_factory.mktemp("packed")


@pytest.fixture(scope="module")
def raw(folder: Path) -> Path:
    """Give a raw archive of `matrix()`."""
    return write(folder / "raw", matrix())


@pytest.fixture(scope="module")
def packed(folder: Path) -> Path:
    """Give a packed archive of the same cells, in three shards of one gene order."""
    return write_packed(folder / "packed", matrix())


@pytest.fixture(scope="module")
def grouped(folder: Path) -> Path:
    """Give a packed archive of other cells, in three gene orders, one of them the identity."""
    return write_packed(folder / "grouped", matrix(seed=1), orders=[*orders_of(2, N_VARS, 5), None], seed=1)


@pytest.fixture(scope="module")
def other(folder: Path) -> Path:
    """Give the raw archive of the cells of `grouped`."""
    return write(folder / "other", matrix(seed=1), seed=1)


@pytest.fixture(params=DEVICES, ids="-".join)
def where(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> dict[str, Any]:
    """Give what puts a loader on the CPU, or on a device with a placement."""
    caplog.set_level(logging.ERROR)
    kind, placement = request.param
    if kind == "cpu":
        return {"device": "cpu"}
    return {"device": EmulatedDevice() if kind == "emulated" else CountedGpu(), "placement": placement}


def settled(loader: GPUBatchLoader, where: dict[str, Any]) -> Iterator[Any]:
    """Give the batches, each when all that makes it is done."""
    for batch in loader:
        if not isinstance(where["device"], str):
            where["device"].record().wait()
        yield batch


def parts(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Give the tensors that a batch is made of."""
    return (x.crow_indices(), x.col_indices(), x.values()) if x.layout == torch.sparse_csr else (x,)


def bits(x: torch.Tensor) -> bytes:
    """Give the bytes of a tensor, which tell NaN and -0.0 apart."""
    return x.cpu().contiguous().view(torch.uint8).numpy().tobytes() if x.numel() else b""


def check_same(found: Any, expected: Any) -> None:
    """Compare the batches of two loaders: tensors, dtypes, rows, obs and padding."""
    for batch, raw_batch in zip(found, expected, strict=True):
        for a, b in zip(parts(batch.x), parts(raw_batch.x), strict=True):
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            assert bits(a) == bits(b)
        assert batch.rows.tolist() == raw_batch.rows.tolist()
        assert batch.is_padding.tolist() == raw_batch.is_padding.tolist()
        assert batch.obs.keys() == raw_batch.obs.keys()
        assert all(bits(batch.obs[name]) == bits(raw_batch.obs[name]) for name in batch.obs)


@pytest.mark.parametrize("options", OUTPUTS, ids=lambda options: "-".join(map(str, options)) or "csr")
@pytest.mark.parametrize("mixed", [False, True], ids=["packed", "mixed"])
def test_batches_are_those_of_raw_archives(
    options: dict[str, Any], mixed: bool, where: dict[str, Any], raw: Path, other: Path, packed: Path, grouped: Path
) -> None:
    """CSR and dense, normalised, with a subset of genes, wherever rows lie: one packed archive, and four in a mixed list."""
    found, expected = ([packed, raw, grouped, packed], [raw, raw, other, raw]) if mixed else ([packed], [raw])
    obs = ["line", "depth", "count"]

    with GPUBatchLoader(found, 32, **where, **options, obs=obs) as loader:
        check_same(settled(loader, where), GPUBatchLoader(expected, 32, device="cpu", **options, obs=obs))
        assert loader.var_order.tolist() == ([7, 3, 39] if "var" in options else list(range(N_VARS)))
        assert loader.categories["line"].tolist() == ["c", "b", "a", "unused"]


@pytest.mark.parametrize("where", NEAR, indirect=True, ids=NEAR_IDS)
@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("options", [{}, {"output": "dense", "normalize_total": 1.0}], ids=["csr", "dense"])
def test_every_stored_dtype_comes_out_as_from_raw(dtype: str, options: dict[str, Any], where: dict[str, Any], tmp_path: Path) -> None:
    """Values of each dtype that raw archives have, floats with fractions, infinities, NaN and -0.0 among them."""
    x = matrix("float32" if dtype == "float16" else dtype)
    if dtype.startswith("float"):
        x.data[::5] *= 1.37
        x.data[[3, 30, 300]] = np.inf, -0.0, -2.5
        x.data[70] = np.nan if not options else 1e-3
    elif dtype != "uint8":
        x.data[::7] = np.iinfo(dtype).max if dtype in ("uint16", "uint32") else 2**62 + 1
    raw, packed = write(tmp_path / "raw", x, data_dtype=dtype), write_packed(tmp_path / "packed", x, dtype, orders=2)

    with GPUBatchLoader([packed, raw], 64, **where, **options) as loader:
        check_same(settled(loader, where), GPUBatchLoader([raw, raw], 64, device="cpu", **options))


@pytest.mark.parametrize("where", NEAR, indirect=True, ids=NEAR_IDS)
@pytest.mark.parametrize(
    ("source", "made"),
    [("int8", torch.int32), ("int16", torch.int32), ("int32", torch.int32), ("int64", torch.int64), ("bool", torch.uint8)],
)
def test_dtypes_that_only_packed_archives_have(source: str, made: torch.dtype, where: dict[str, Any], tmp_path: Path) -> None:
    """Signed integers, negative ones among them, and truth values come in the dtype that torch computes in."""
    x = matrix("int64")
    x.data = np.ones_like(x.data) if source == "bool" else np.where(np.arange(x.nnz) % 3, x.data % 100 + 1, -(x.data % 128) - 1)
    if source == "int64":
        x.data[::9] = -(2**63)
    packed = write_packed(tmp_path / "packed", x, source)

    with GPUBatchLoader(packed, 32, **where) as loader:
        for batch in settled(loader, where):
            assert batch.x.dtype == made
            np.testing.assert_array_equal(dense(batch.x), x[batch.rows.cpu().numpy()].toarray())


def test_dtypes_of_a_mixed_list_meet(tmp_path: Path) -> None:
    """The dtype of a batch holds what all archives of the list hold."""
    paths = {source: write_packed(tmp_path / source, matrix("int64"), source) for source in ("uint8", "int16", "int64", "float32")}
    raw = write(tmp_path / "raw", matrix(), data_dtype="uint16")
    expected = {
        ("uint8",): torch.uint8, ("int16", "uint8"): torch.int32, ("int16", "int64"): torch.int64, ("int16", "float32"): torch.float32,
    }  # fmt: skip

    for names, dtype in expected.items():
        assert next(iter(GPUBatchLoader([paths[name] for name in names], 8, device="cpu"))).x.dtype == dtype
    assert next(iter(GPUBatchLoader([paths["uint8"], raw], 8, device="cpu"))).x.dtype == torch.int32


PAIRS = {
    ("uint8", "float16"): torch.float16, ("int8", "float16"): torch.float16, ("int16", "float16"): torch.float32,
    ("uint16", "float32"): torch.float32, ("int16", "float32"): torch.float32, ("int32", "float32"): torch.float64,
    ("uint32", "float32"): torch.float64, ("int32", "float64"): torch.float64, ("bool", "float16"): torch.float16,
    ("bool", "int8"): torch.int32, ("int8", "uint16"): torch.int32, ("int16", "uint32"): torch.int64, ("int64", "uint8"): torch.int64,
    ("int16", "uint16", "float32"): torch.float32, ("float16", "float32"): torch.float32,
}  # fmt: skip
"""Dtypes that meet, and the narrowest in which torch computes with the values of all of them."""


@pytest.mark.parametrize("sources", PAIRS, ids="-".join)
def test_joined_archives_give_the_batches_of_a_list(sources: tuple[str, ...], tmp_path: Path) -> None:
    """Archives of different dtypes, joined or one beside the other: the same dtype, and every value exactly, the largest too."""
    parts, paths = [], []
    for k, source in enumerate(sources):
        x = matrix("int64", seed=k)
        largest = {"bool": 1, "float16": 2048, "float32": 2**24, "float64": 2**53}.get(source) or int(np.iinfo(source).max)
        x.data = np.minimum(x.data, largest)
        x.data[::5] = largest
        parts.append(x.toarray())
        paths.append(write_packed(tmp_path / source, x, source))
    expected = np.concatenate(parts)
    joined = concat(paths, tmp_path / "joined")

    for dataset in (joined, paths):
        for batch in GPUBatchLoader(dataset, 64, device="cpu", shuffle=False):
            assert batch.x.dtype == PAIRS[sources]
            found = np.zeros((len(batch.rows), N_VARS), np.int64)
            places = np.repeat(np.arange(len(batch.rows)), np.diff(batch.x.crow_indices().numpy()))
            found[places, batch.x.col_indices().numpy()] = batch.x.values().numpy()
            np.testing.assert_array_equal(found, expected[batch.rows.numpy()])
    dataset = SingleCellMemMapDataset(joined)
    for row in range(0, len(dataset), 7):
        values, columns = dataset.get_row(row)[0]
        assert columns.tolist() == np.flatnonzero(expected[row]).tolist()
        assert values.tolist() == expected[row][columns].tolist()


def small() -> sp.csr_matrix:
    """Make counts that every integer dtype holds."""
    x = matrix("int64")
    x.data = x.data % 100 + 1
    return x


@pytest.mark.parametrize(("sources", "cure"), [
    (("float32", "int64"), "int64 RAW --data-dtype float64"), (("uint64", "float64"), "uint64 RAW --data-dtype float64"),
    (("uint64", "int8"), "int8 RAW --data-dtype uint64"), (("int16", "int64", "float16"), "int64 RAW --data-dtype float64"),
])  # fmt: skip
def test_archives_without_a_dtype_for_all_are_not_joined(sources: tuple[str, ...], cure: str, tmp_path: Path) -> None:
    """What would be rounded when it is read is refused with the dtypes and the way out, which leads there; nothing is written."""
    paths = [write_packed(tmp_path / source, small(), source) for source in sources]

    with pytest.raises(ValueError, match=rf"{sources[0]}: {sources[0]}, .*`scdl-gpu unpack .*{cure}`"):
        concat(paths, tmp_path / "joined")
    assert not (tmp_path / "joined").exists()

    wide = tmp_path / cure.split()[0]
    unpack(wide, tmp_path / "raw", data_dtype=cure.split()[-1])
    pack(tmp_path / "raw", tmp_path / "new")
    joined = concat([tmp_path / "new" if path == wide else path for path in paths], tmp_path / "joined")
    assert (SingleCellMemMapDataset(joined).rows(slice(None)) != sp.vstack([small()] * len(paths))).nnz == 0


@pytest.mark.parametrize("sources", [("float32", "int64"), ("float64", "uint64")])
def test_archives_joined_without_a_dtype_for_all_are_not_rounded(
    sources: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that lies there already opens and verifies; rows are not read in a dtype that rounds them, and the errors say how they are."""
    paths = [write_packed(tmp_path / source, small(), source) for source in sources]
    with monkeypatch.context() as patch:
        patch.setattr("scdl_gpu.pack.join._check_dtypes", lambda archives: None)
        joined = concat(paths, tmp_path / "joined")

    dataset = SingleCellMemMapDataset(joined)

    assert len(dataset) == 2 * N_ROWS
    for read in (lambda: dataset.get_row(1), lambda: dataset.rows([0, -1]), lambda: dataset.__getitems__([3, 4])):
        with pytest.raises(ArchiveError, match=rf"shards of {sources[0]} and of {sources[1]}.*unpack --data-dtype"):
            read()
    for archives in (joined, paths):
        with pytest.raises(ValueError, match=r"no dtype of a batch holds .*dtype=torch.float64"):
            GPUBatchLoader(archives, 8, device="cpu")
        assert next(iter(GPUBatchLoader(archives, 8, device="cpu", dtype=torch.float64))).x.dtype == torch.float64
    assert unpack(joined, tmp_path / "raw", data_dtype="float64").is_dir()


@pytest.mark.parametrize("options", OUTPUTS, ids=lambda options: "-".join(map(str, options)) or "csr")
def test_stored_order_renumbers_columns(options: dict[str, Any], where: dict[str, Any], raw: Path, packed: Path) -> None:
    """With gene_order="stored" `var_order` tells the gene of each column; chosen genes stay where they were asked for."""
    (order,) = orders_of(1, N_VARS)

    with GPUBatchLoader([packed, packed], 32, gene_order="stored", **where, **options) as loader:
        assert loader.var_order.tolist() == ([7, 3, 39] if "var" in options else order.tolist())
        assert " in stored order; " in repr(loader)
        for batch, expected in zip(settled(loader, where), GPUBatchLoader([raw, raw], 32, device="cpu", **options), strict=True):
            there = dense(expected.x.float())
            np.testing.assert_array_equal(dense(batch.x.float()), there if "var" in options else there[:, order])


def test_stored_order_needs_one_order(raw: Path, packed: Path, grouped: Path, tmp_path: Path) -> None:
    """Several orders, of one archive or of two, and raw archives beside an order of its own are refused by name."""
    unlike = write_packed(tmp_path / "unlike", matrix(), orders=orders_of(1, N_VARS, seed=9))
    plain = write_packed(tmp_path / "plain", matrix(), orders=0)

    for paths, message in (
        ([grouped], r"grouped.shard-00000\.scdp has rows in several gene orders.*packed with groups.*`scdl-gpu unpack`.*`scdl-gpu pack`"),
        ([packed, unlike], r"packed.shard-00000\.scdp has another gene order than .*unlike"),
        ([raw, packed], r"packed.shard-00000\.scdp has a gene order of its own, the raw archives have that of var; leave out gene_order"),
    ):
        with pytest.raises(ValueError, match=message):
            GPUBatchLoader(paths, device="cpu", gene_order="stored")
    assert GPUBatchLoader([raw, plain], device="cpu", gene_order="stored").var_order.tolist() == list(range(N_VARS))
    with pytest.raises(ValueError, match="gene_order is 'rank', expected 'var' or 'stored'"):
        GPUBatchLoader(packed, device="cpu", gene_order="rank")


@pytest.mark.parametrize("options", [{}, {"output": "dense", "var": VAR}], ids=["all", "some"])
def test_gene_orders_are_counted_in_the_budget(options: dict[str, Any], grouped: Path, raw: Path) -> None:
    """What a loader has on the device before its first batch, rows and tables, is what a budget must allow, to the byte."""

    def there(budget: int | None) -> tuple[str, int]:
        device = EmulatedDevice()
        with GPUBatchLoader([grouped, raw], 8, device=device, memory_budget=budget, **options) as loader:
            return repr(loader), device.allocated_bytes

    _, needed = there(None)

    assert "placement device" in there(needed)[0]
    assert "placement pinned" in there(needed - 1)[0]


def test_a_loader_resumes_where_it_was(raw: Path, packed: Path) -> None:
    """The state of a loader over raw archives continues over packed ones: order and position are of rows."""
    loader = GPUBatchLoader([raw, raw], 16, seed=3, device="cpu")
    batches = iter(loader)
    first = [next(batches) for _ in range(4)]
    state = loader.state_dict()
    resumed = GPUBatchLoader([packed, raw], 16, seed=8, device="cpu")
    resumed.load_state_dict(state)

    check_same(list(resumed), list(batches))
    assert len(first) == 4


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_packed_rows(context: str, raw: Path, packed: Path) -> None:
    """In worker processes the same batches are made; what travels is paths and options, stored order among them."""
    loader = GPUBatchLoader([packed, packed], 32, device="cpu", gene_order="stored", obs=["line"])
    alone = list(loader)
    loader.set_epoch(0)

    batches = list(DataLoader(loader, batch_size=None, num_workers=2, multiprocessing_context=context))

    assert len(pickle.dumps(loader)) < 10_000
    check_same(batches, alone)


def test_samplers_and_datasets(raw: Path, packed: Path) -> None:
    """Opened datasets go into a list beside paths, and a sampler chooses rows of both kinds."""
    datasets = [SingleCellMemMapDataset(packed), raw]
    sampler = RandomSampler(range(2 * N_ROWS), num_samples=50, generator=torch.Generator().manual_seed(4))

    batches = list(GPUBatchLoader(datasets, 10, sampler=sampler, device="cpu"))  # type: ignore[arg-type]

    whole = sp.vstack([matrix(), matrix()]).tocsr()
    assert len(rows_of(batches)) == 50
    for batch in batches:
        np.testing.assert_array_equal(dense(batch.x), whole[batch.rows.numpy()].toarray())


# Faults


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Give a packed archive of its own, which a test may damage."""
    return write_packed(tmp_path / "damaged", matrix(), orders=2)


def drained(loader: Any) -> Iterator[Any]:
    """Make all batches."""
    with loader if hasattr(loader, "__enter__") else nullcontext():
        yield from loader


@pytest.mark.parametrize("bit", [1, 128])
def test_a_flipped_bit_is_named(bit: int, where: dict[str, Any], raw: Path, damaged: Path) -> None:
    """A bit of a row that is not as it was written: shard and row are in the error, before the epoch ends."""
    shard = open_packed(damaged).shards[1]
    flip(shard.path, byte_of(shard, 9) + 3, bit)

    message = r"shard-00001\.scdp: row 9( \(row 49 of the archive\))? does not match its check"
    with pytest.raises(ArchiveError, match=message):
        list(drained(GPUBatchLoader([raw, damaged], 16, **where)))


def test_a_damaged_row_table_is_named(where: dict[str, Any], damaged: Path) -> None:
    """An entry that was changed is noticed when its shard is first used, not before: opening costs nothing for the others."""
    shard = open_packed(damaged).shards[2]
    start = shard.header.rows.offset
    flip(shard.path, start + 16 * 5 + 8)

    loader = GPUBatchLoader(damaged, 16, batch_sampler=None, device="cpu")
    part = GPUBatchLoader(damaged, batch_sampler=[list(range(80))], device="cpu")

    assert len(list(part)) == 1
    with pytest.raises(ArchiveError, match=r"shard-00002\.scdp: .*(row|table)"):
        list(loader)
    with pytest.raises(ArchiveError, match=r"shard-00002\.scdp: .*(row|table)"):
        list(drained(GPUBatchLoader(damaged, 16, **where)))


def test_rows_beyond_the_payload_are_never_read(damaged: Path) -> None:
    """An entry that leaves the payload, below the hash that would tell: the row is named, whatever its bytes are."""
    archive = open_packed(damaged)
    loader = GPUBatchLoader(damaged, 16, device="cpu", shuffle=False)
    table = np.array(archive.shards[0].entries)
    table["offset"][7] = 2**31
    for part in loader._shards.parts.parts[:1]:
        object.__setattr__(part.shard, "check_tables", lambda: None)
    loader._shards.parts._addresses[0] = table.ctypes.data

    with pytest.raises(ArchiveError, match=r"shard-00000\.scdp: row [67] is .* in the row table"):
        list(loader)


def test_too_many_gene_orders_are_refused(packed: Path, grouped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of all orders of the list beyond the limit: the error has the sizes; equal orders count once."""
    monkeypatch.setattr(gene_orders, "MOST_BYTES", 3 * 2 * N_VARS)

    assert len(GPUBatchLoader([packed, grouped, packed, grouped], device="cpu")) > 0
    monkeypatch.setattr(gene_orders, "MOST_BYTES", 3 * 2 * N_VARS - 1)
    with pytest.raises(ArchiveError, match=r"grouped.shard-00000\.scdp: .* different gene orders of 240 bytes, expected at most .* 239"):
        GPUBatchLoader([packed, grouped], device="cpu")


def test_a_changed_archive_is_not_reopened(packed: Path, tmp_path: Path) -> None:
    """What travels to a worker notices that another archive lies there now, of other rows or as many; a moved one it finds."""
    path = write_packed(tmp_path / "a", matrix())
    carried = pickle.dumps(GPUBatchLoader(path, device="cpu"))
    path.rename(tmp_path / "old")

    for other in (matrix(n_rows=50), matrix()):
        write_packed(path, other)
        with pytest.raises(ArchiveError, match=f"{path} was changed or replaced"):
            pickle.loads(carried)
        shutil.rmtree(path)
    (tmp_path / "old").rename(path)
    assert len(pickle.loads(carried)) > 0
