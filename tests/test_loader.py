"""GPUBatchLoader on the CPU: its batches are rows of the archive, in the order that the document describes."""

import itertools
import json
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from cells import N_ROWS, N_VARS, annotated, backwards, dense, matrix, rows_of
from emulator.device import EmulatedDevice
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, get_worker_info

from scdl_gpu import (
    ArchiveError,
    DeviceError,
    GPUBatchLoader,
    RowSampler,
    SingleCellMemMapDataset,
    collate_sparse_matrix_batch,
    convert_h5ad,
)
from scdl_gpu.order import Order, permuted

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes:UserWarning"),
]


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Give an archive of `annotated(matrix())`."""
    return convert_h5ad(annotated(matrix()), tmp_path / "archive", data_dtype="float32")


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64"])
def test_csr_batches_are_the_rows_of_the_order(tmp_path: Path, dtype: str) -> None:
    """Every batch holds the rows that the order gives, in the dtype that torch computes in, in one index dtype."""
    x = matrix()
    path = convert_h5ad(annotated(x), tmp_path / "archive", data_dtype=dtype)
    expected = {"uint16": torch.int32, "uint32": torch.int64, "uint64": torch.int64}.get(dtype, getattr(torch, dtype))

    batches = list(GPUBatchLoader(path, 10, seed=4, device="cpu"))

    order = np.concatenate([batch.rows.numpy() for batch in batches])
    assert order[:N_ROWS].tolist() == permuted(4, 0, N_ROWS, np.arange(N_ROWS)).tolist()
    for batch in batches:
        assert (batch.x.dtype, batch.x.crow_indices().dtype, batch.x.col_indices().dtype) == (expected, torch.int32, torch.int32)
        np.testing.assert_array_equal(dense(batch.x), x[batch.rows.numpy()].toarray().astype(dtype))


def test_last_batch_wraps_and_says_so(archive: Path) -> None:
    """All batches have batch_size rows; what repeats is marked, and with drop_last it is left out."""
    loader = GPUBatchLoader(archive, 10, device="cpu")

    batches = list(loader)

    assert [len(batch) for batch in batches] == [10] * 11
    assert len(loader) == 11
    assert [int(batch.is_padding.sum()) for batch in batches] == [0] * 10 + [7]
    assert sorted(rows_of(batches)) == list(range(N_ROWS))
    assert len(GPUBatchLoader(archive, 10, device="cpu", drop_last=True)) == 10
    assert len(list(GPUBatchLoader(archive, 10, device="cpu", drop_last=True))) == 10


def test_it_is_iterated_not_indexed(archive: Path) -> None:
    """A batch asked for by its number is refused, and the error says how to have one."""
    loader = GPUBatchLoader(archive, 16, device="cpu")

    with pytest.raises(TypeError, match=r"iterated, not indexed: next\(iter\(loader\)\) is a batch"):
        loader[0]


def test_epochs_differ_and_repeat(archive: Path) -> None:
    """Each iteration is the next epoch; set_epoch chooses one; the same seed and epoch give the same batches."""
    loader = GPUBatchLoader(archive, 10, seed=1, device="cpu")

    first, second = rows_of(loader), rows_of(loader)
    loader.set_epoch(0)

    assert first != second
    assert rows_of(loader) == first
    assert rows_of(loader) == second
    assert rows_of(GPUBatchLoader(archive, 10, seed=2, device="cpu")) != first
    assert rows_of(GPUBatchLoader(archive, 10, shuffle=False, device="cpu")) == list(range(N_ROWS))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int16, torch.int32, torch.int64]
)
@pytest.mark.parametrize("var", [None, ["g7", 3, "g39"]])
def test_dense_batches_hold_the_genes_asked_for(archive: Path, dtype: torch.dtype, var: list[Any] | None) -> None:
    """Dense batches of any dtype have the columns of var, names or numbers, in their order."""
    columns = slice(None) if var is None else [7, 3, 39]
    expected = torch.from_numpy(matrix().toarray()[:, columns]).to(dtype)

    for batch in GPUBatchLoader(archive, 16, device="cpu", output="dense", dtype=dtype, var=var):
        assert batch.x.dtype == dtype
        assert torch.equal(batch.x, expected[batch.rows])


def test_floating_batches_round_and_integer_ones_refuse(tmp_path: Path) -> None:
    """What the README says of dtypes: float32 is exact up to 2^24, float16 ends at 65,504, integers hold a value or name its row."""
    values = np.array([[2**24 + 1, 65_504, 65_520]], np.float64)
    path = convert_h5ad(sp.csr_matrix(values), tmp_path / "large")

    made = {dtype: next(iter(GPUBatchLoader(path, 1, device="cpu", output="dense", dtype=dtype))).x for dtype in (None, torch.float16)}

    assert made[None].tolist() == [[2**24, 65_504, 65_520]]
    assert made[torch.float16].tolist() == [[np.inf, 65_504, np.inf]]
    assert next(iter(GPUBatchLoader(path, 1, device="cpu", output="dense", dtype=torch.int32))).x.tolist() == values.tolist()
    with pytest.raises(ValueError, match=r"large: row 0 holds a value that torch\.int16 does not"):
        list(GPUBatchLoader(path, 1, device="cpu", output="dense", dtype=torch.int16))


@pytest.mark.parametrize("log1p", [False, True])
@pytest.mark.parametrize("target", [None, 1e4])
@pytest.mark.parametrize("var", [None, [0, 5, 2]])
def test_normalised_batches_agree_with_float64(archive: Path, target: float | None, log1p: bool, var: list[int] | None) -> None:
    """normalize_total divides by the sum over all genes, before the subset; log1p comes after it; within 2 ulp of float64."""
    x = matrix("float64").toarray()
    sums = x.sum(1, keepdims=True)
    expected = x if target is None else np.divide(x * target, sums, out=np.zeros_like(x), where=sums > 0)
    expected = (np.log1p(expected) if log1p else expected)[:, slice(None) if var is None else var]

    for batch in GPUBatchLoader(archive, 16, device="cpu", output="dense", var=var, normalize_total=target, log1p=log1p):
        np.testing.assert_array_max_ulp(batch.x.numpy(), expected[batch.rows.numpy()].astype(np.float32), maxulp=2)


def test_obs_columns_come_as_numbers(archive: Path) -> None:
    """Categories and text are int64 codes with -1 for missing, truth values bool, numbers themselves, missing numbers NaN."""
    names = ("line", "well", "good", "depth", "count", "plate")
    loader = GPUBatchLoader(archive, 16, device="cpu", obs=names)
    obs = annotated(matrix()).obs

    for batch in loader:
        found, rows = batch.obs, obs.iloc[batch.rows.numpy()]
        assert {name: found[name].dtype for name in names} == {
            "line": torch.int64, "well": torch.int64, "good": torch.bool,
            "depth": torch.float32, "count": torch.float64, "plate": torch.int16,
        }  # fmt: skip
        for name in ("line", "well"):
            named = [None if code < 0 else loader.categories[name][code] for code in found[name].tolist()]
            assert named == [None if pd.isna(value) else value for value in rows[name]]
        np.testing.assert_array_equal(found["good"].numpy(), rows["good"])
        np.testing.assert_array_equal(found["depth"].numpy(), rows["depth"])
        np.testing.assert_array_equal(found["count"].numpy(), rows["count"].astype("Float64").to_numpy(np.float64, na_value=np.nan))
    with pytest.raises(ValueError, match="no obs column 'nothing'"):
        GPUBatchLoader(archive, obs=("nothing",), device="cpu")


def test_a_list_is_one_dataset(tmp_path: Path) -> None:
    """Rows of several archives follow each other; dtypes meet in one that holds all; categories are united."""
    parts = [annotated(matrix(seed=seed, n_rows=n), seed) for seed, n in ((0, 30), (1, 1), (2, 50))]
    parts[1].obs["line"] = pd.Categorical(["z"])
    paths = [
        convert_h5ad(part, tmp_path / f"part{k}", data_dtype=dtype)
        for k, (part, dtype) in enumerate(zip(parts, ["uint8", "float32", "uint16"], strict=True))
    ]
    whole = np.concatenate([part.X.toarray() for part in parts])
    lines = [line for part in parts for line in part.obs["line"]]

    loader = GPUBatchLoader([paths[0], SingleCellMemMapDataset(paths[1]), str(paths[2])], 7, device="cpu", obs=("line",))

    for batch in loader:
        np.testing.assert_array_equal(dense(batch.x), whole[batch.rows.numpy()])
        assert [loader.categories["line"][code] for code in batch.obs["line"].tolist()] == [lines[row] for row in batch.rows.tolist()]
    assert batch.x.dtype == torch.float32  # which holds every uint16


def test_the_same_archive_may_stand_in_a_list_often(archive: Path) -> None:
    """A virtual dataset costs no memory for rows: one archive a thousand times."""
    loader = GPUBatchLoader([archive] * 1000, 64, device="cpu")

    batch = next(iter(loader))

    assert loader._order.n_rows == 1000 * N_ROWS
    np.testing.assert_array_equal(dense(batch.x), matrix()[batch.rows.numpy() % N_ROWS].toarray())


def test_different_genes_are_refused(tmp_path: Path, archive: Path) -> None:
    """A list needs the same genes in the same order; the first that differs is named."""
    other = annotated(matrix())
    other.var_names = [f"g{i}" if i != 9 else "other" for i in range(N_VARS)]
    path = convert_h5ad(other, tmp_path / "other")
    narrow = convert_h5ad(annotated(matrix()[:, :30]), tmp_path / "narrow")

    with pytest.raises(ValueError, match=r"gene 9 'other' where .* has 'g9'"):
        GPUBatchLoader([archive, path], device="cpu")
    with pytest.raises(ValueError, match="has 30 genes"):
        GPUBatchLoader([archive, narrow], device="cpu")


def test_samplers_are_used_as_they_are(archive: Path) -> None:
    """Sampler yields rows, batch_sampler lists of rows; nothing is shuffled, split or padded."""
    by_rows = GPUBatchLoader(archive, 3, sampler=[5, 5, 9, 2], device="cpu")
    by_batches = GPUBatchLoader(archive, batch_sampler=[[1], [2, 3, 4], []], device="cpu")

    assert [batch.rows.tolist() for batch in by_rows] == [[5, 5, 9], [2]]
    assert len(by_rows) == 2
    assert [batch.rows.tolist() for batch in by_batches] == [[1], [2, 3, 4], []]
    assert len(by_batches) == 3
    with pytest.raises(ValueError, match="batch_sampler excludes"):
        GPUBatchLoader(archive, 8, batch_sampler=[[1]], device="cpu")
    with pytest.raises(IndexError, match="row 103 is out of range"):
        list(GPUBatchLoader(archive, sampler=[103], device="cpu"))


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_share_the_batches(archive: Path, context: str) -> None:
    """In a DataLoader with two workers every batch comes once, worker w making batches w, w + 2, ..."""
    loader = GPUBatchLoader(archive, 10, seed=3, device="cpu", obs=("line",))

    batches = list(DataLoader(loader, batch_size=None, num_workers=2, multiprocessing_context=context))

    assert rows_of(batches) == permuted(3, 0, N_ROWS, np.arange(N_ROWS)).tolist()
    np.testing.assert_array_equal(dense(batches[4].x), matrix()[batches[4].rows.numpy()].toarray())


def test_pickling_carries_no_data(archive: Path) -> None:
    """A loader travels as the paths of its archives and its settings."""
    loader = GPUBatchLoader(archive, 10, device="cpu", output="dense", var=["g1"])

    copy = pickle.loads(pickle.dumps(loader))

    assert len(pickle.dumps(loader)) < 5_000
    assert rows_of(copy) == rows_of(loader)


def test_state_resumes_in_another_world(archive: Path) -> None:
    """After some batches of two ranks, three ranks with another batch size see the rest of the epoch once."""
    pair = [GPUBatchLoader(archive, 8, seed=5, rank=rank, world_size=2, device="cpu") for rank in range(2)]
    seen = []
    for loader in pair:
        batches: Iterator[Any] = iter(loader)
        seen += rows_of(next(batches) for _ in range(3))
        state = loader.state_dict()
    resumed = [GPUBatchLoader(archive, 5, seed=0, rank=rank, world_size=3, device="cpu") for rank in range(3)]

    for loader in resumed:
        loader.load_state_dict(state)
        seen += rows_of(loader)

    assert state == {"version": 1, "seed": 5, "epoch": 0, "position": 48, "n_rows": N_ROWS, "order": "shuffled"}
    assert sorted(seen) == list(range(N_ROWS))
    assert rows_of(resumed[0]) == Order(N_ROWS, 5, 5, 0, 3).batch(1, 0)[0].tolist() + rows_of_order(Order(N_ROWS, 5, 5, 0, 3), 1)[5:]


def rows_of_order(order: Order, epoch: int) -> list[int]:
    """Return the rows of an epoch that are not padding."""
    steps = (order.batch(epoch, step * order.step_rows) for step in range(order.steps()))
    return [row for rows, padding in steps for row in rows[~padding].tolist()]


def test_state_of_another_dataset_is_refused(archive: Path) -> None:
    """Loading a state of other rows or of another order raises, naming what differs."""
    loader = GPUBatchLoader(archive, 8, device="cpu")

    with pytest.raises(ValueError, match="n_rows 7"):
        loader.load_state_dict(loader.state_dict() | {"n_rows": 7})
    with pytest.raises(ValueError, match="order 'sequential'"):
        loader.load_state_dict(GPUBatchLoader(archive, 8, shuffle=False, device="cpu").state_dict())
    with pytest.raises(ValueError, match="order 'sampler'"):
        loader.load_state_dict(GPUBatchLoader(archive, 8, sampler=[1, 2], device="cpu").state_dict())


def test_row_sampler_gives_the_same_batches(archive: Path) -> None:
    """A plain DataLoader with RowSampler yields what the loader yields."""
    dataset = SingleCellMemMapDataset(archive)
    plain = DataLoader(dataset, batch_size=10, sampler=RowSampler(dataset, 10, seed=6), collate_fn=collate_sparse_matrix_batch)

    for mine, theirs in zip(GPUBatchLoader(dataset, 10, seed=6, device="cpu"), plain, strict=True):
        assert torch.equal(mine.x.to_dense(), theirs.to_dense())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "coo"}, "output is 'coo'"),
        ({"var": ["g1"]}, "need output='dense'"),
        ({"output": "dense", "var": ["nothing"]}, "gene 'nothing'"),
        ({"output": "dense", "var": [40]}, "gene 40 is out of range"),
        ({"output": "dense", "var": [4, "g4"]}, "gene 4 is asked for twice"),
        ({"output": "dense", "dtype": torch.int32, "log1p": True}, "choose a floating dtype"),
        ({"output": "dense", "normalize_total": -1.0}, "expected a positive number"),
        ({"dtype": torch.bfloat16}, "dtype is torch.bfloat16"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"placement": "device"}, "placement"),
        ({"placement": "somewhere"}, "somewhere"),
        ({"windows": True, "sampler": [0]}, "excludes sampler"),
        ({"prefetch": -1}, "prefetch is -1"),
        ({"rank": 3}, "give both, or neither"),
    ],
)
def test_bad_arguments_are_refused(archive: Path, options: dict[str, Any], message: str) -> None:
    """Arguments that make no sense say what was found and what was expected."""
    with pytest.raises(ValueError, match=message):
        GPUBatchLoader(archive, **({"device": "cpu"} | options))


def test_asking_for_cuda_without_a_gpu_says_so(archive: Path) -> None:
    """Nothing falls back in silence: device="cuda" without a GPU is an error, device="auto" tells what it chose."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")

    with pytest.raises(DeviceError, match="finds no GPU"):
        GPUBatchLoader(archive, device="cuda")
    with pytest.raises(ValueError, match="'tpu' is unknown"):
        GPUBatchLoader(archive, device="tpu")
    assert "cpu" in repr(GPUBatchLoader(archive))


def test_damaged_rows_are_not_served(archive: Path) -> None:
    """A column out of range in the file raises ArchiveError that names the archive, never a batch."""
    file = archive / "col_ptr.npy"
    damaged = bytearray(file.read_bytes())
    damaged[100] = 255
    file.write_bytes(damaged)

    with pytest.raises(ArchiveError, match="archive"):
        list(GPUBatchLoader(archive, 10, device="cpu"))


def test_unsorted_rows_come_out_sorted_and_duplicates_are_refused(tmp_path: Path) -> None:
    """Archives from elsewhere keep the order they have: the loader sorts, and refuses a column twice, naming the cure."""
    x = matrix()
    path = convert_h5ad(backwards(x), tmp_path / "unsorted", canonical=False)
    twice = sp.csr_matrix((np.ones(4, np.float32), np.array([1, 1, 2, 3]), np.array([0, 2, 4])), shape=(2, N_VARS))
    duplicates = convert_h5ad(twice, tmp_path / "twice", canonical=False)

    for batch in GPUBatchLoader(path, 10, device="cpu"):
        np.testing.assert_array_equal(dense(batch.x), x[batch.rows.numpy()].toarray())
    with pytest.raises(ArchiveError, match="canonical"):
        list(GPUBatchLoader(duplicates, 2, device="cpu"))


@pytest.mark.parametrize(
    "how",
    [{}, {"output": "dense"}, {"output": "dense", "normalize_total": 1e4}, {"output": "dense", "var": [0], "log1p": True}],
    ids=["csr", "dense", "normalised", "a subset"],
)
@pytest.mark.parametrize("columns", [[3, 3, 1, 2], [3, 1, 3, 2]])
@pytest.mark.parametrize("device", ["cpu", "host"])
def test_duplicates_are_refused_in_every_output(tmp_path: Path, device: str, columns: list[int], how: dict[str, Any]) -> None:
    """A column twice, of which a dense row would keep one value, names its row wherever the CPU makes the batch."""
    twice = sp.csr_matrix((np.array([5, 7, 2, 1], np.float32), columns, [0, 3, 4]), shape=(2, N_VARS))
    path = convert_h5ad(twice, tmp_path / "twice", canonical=False)
    where: dict[str, Any] = {"device": "cpu"} if device == "cpu" else {"device": EmulatedDevice(), "placement": "host"}

    with pytest.raises(ArchiveError, match=r"twice: row 0 holds a column twice; .*canonical"):
        list(GPUBatchLoader(path, 2, **where, **how))


def test_outputs_are_not_overwritten(archive: Path) -> None:
    """Batches that the consumer keeps stay as they were, however many follow."""
    x = matrix().toarray()

    kept = list(GPUBatchLoader(archive, 4, device="cpu", output="dense"))

    for batch in kept:
        np.testing.assert_array_equal(batch.x.numpy(), x[batch.rows.numpy()])


def test_batch_moves_as_a_whole(archive: Path) -> None:
    """`to` moves every tensor of a batch; a dtype changes its values alone."""
    batch = next(iter(GPUBatchLoader(archive, 4, device="cpu", obs=("line",))))

    moved = batch.to("cpu", torch.float64)

    assert moved.x.dtype == torch.float64
    assert moved.obs["line"].dtype == torch.int64
    assert torch.equal(moved.rows, batch.rows)


def test_leaving_early_stops_the_threads(archive: Path, recwarn: pytest.WarningsRecorder) -> None:
    """A consumer that breaks off leaves no thread behind."""
    before = threading.active_count()
    for _ in GPUBatchLoader(archive, 4, device="cpu"):
        break

    assert threading.active_count() <= before
    assert not recwarn.list


class Telling(IterableDataset[Any]):
    """In a worker: the rows of each batch with the loader's state after it, from a state of one's own if there is one."""

    def __init__(self, loader: GPUBatchLoader, states: dict[int, Any] | None = None) -> None:
        self.loader, self.states = loader, states or {}

    def __iter__(self) -> Iterator[Any]:
        """Yield worker, rows and state: the first time before any batch."""
        worker = get_worker_info().id
        if worker in self.states:
            self.loader.load_state_dict(self.states[worker])
            if "then" in self.states[worker]:
                self.loader.set_epoch(self.states[worker]["then"])
        batches = iter(self.loader)
        yield worker, [], self.loader.state_dict()
        for batch in batches:
            yield worker, rows_of([batch]), self.loader.state_dict()
        yield worker, [], self.loader.state_dict()


def told(loader: GPUBatchLoader, workers: int, states: dict[int, Any] | None = None) -> dict[int, list[Any]]:
    """Return what each worker told: (rows, state) pairs."""
    plain = DataLoader(Telling(loader, states), batch_size=None, num_workers=workers, multiprocessing_context="fork")
    found: dict[int, list[Any]] = {worker: [] for worker in range(workers)}
    for worker, rows, state in plain:
        found[worker].append((rows, state))
    return found


@pytest.mark.parametrize("after", [0, 1, 2, 5])
@pytest.mark.parametrize("options", [{"seed": 3}, {"sampler": range(0, 100, 2)}], ids=str)
def test_states_of_workers_resume(archive: Path, after: int, options: dict[str, Any]) -> None:
    """Each worker's state continues its own share, from before its first batch to after its last, and nothing comes twice."""

    def loader() -> GPUBatchLoader:
        return GPUBatchLoader(archive, 10, device="cpu", **options)

    whole = told(loader(), 2)
    states = {worker: pairs[min(after, len(pairs) - 1)][1] for worker, pairs in whole.items()}

    resumed = told(loader(), 2, states)

    for worker in range(2):
        here = min(after, len(whole[worker]) - 1)
        left = [rows for rows, _ in whole[worker][here + 1 :] if rows]
        assert [rows for rows, _ in resumed[worker] if rows][: len(left)] == left


def test_the_end_of_an_epoch_in_a_worker_is_the_beginning_of_the_next(archive: Path) -> None:
    """After an epoch, also one in which a worker had no batch, its state stands for the whole next epoch."""
    whole = told(GPUBatchLoader(archive, 60, device="cpu"), 3)

    resumed = told(GPUBatchLoader(archive, 60, device="cpu"), 3, {worker: pairs[-1][1] for worker, pairs in whole.items()})

    expected = rows_of_order(Order(N_ROWS, 60), 1)
    assert sorted(row for pairs in resumed.values() for rows, _ in pairs for row in rows) == sorted(expected)
    assert [rows for rows, _ in resumed[0]][1] == expected[:60]


def test_a_workers_state_is_its_own(archive: Path) -> None:
    """The state of one worker means nothing to another, or outside of workers: it is refused."""
    states = {worker: pairs[1][1] for worker, pairs in told(GPUBatchLoader(archive, 10, device="cpu"), 2).items()}
    loader = GPUBatchLoader(archive, 10, device="cpu")
    loader.load_state_dict(states[1])

    with pytest.raises(ValueError, match=r"taken in worker \(1, 2\), this is None"):
        next(iter(loader))
    with pytest.raises(ValueError, match=r"taken in worker \(1, 2\), this is \(0, 2\)"):
        told(GPUBatchLoader(archive, 10, device="cpu"), 2, {0: states[1], 1: states[0]})


def test_workers_that_stay_share_the_epoch_after_one_that_was_left(archive: Path) -> None:
    """With persistent workers an epoch that was left early leaves nothing behind: of the next, every row comes once."""
    loader = GPUBatchLoader(archive, 8, seed=1, device="cpu")
    plain = DataLoader(loader, batch_size=None, num_workers=2, persistent_workers=True, multiprocessing_context="fork")
    for _ in plain:
        break

    assert rows_of(plain) == rows_of_order(Order(N_ROWS, 8, 1), 1)


def test_choosing_an_epoch_forgets_the_state_that_was_loaded(archive: Path) -> None:
    """In a worker, another epoch after a loaded state begins at the worker's own share of it."""
    states = {worker: pairs[1][1] | {"then": 3} for worker, pairs in told(GPUBatchLoader(archive, 8, device="cpu"), 2).items()}

    found = told(GPUBatchLoader(archive, 8, device="cpu"), 2, states)

    shares = [row for pairs in found.values() for rows, _ in pairs for row in rows]
    assert sorted(shares) == list(range(N_ROWS))
    assert [rows for rows, _ in found[1]][1] == permuted(0, 3, N_ROWS, np.arange(8, 16)).tolist()


def test_choosing_an_epoch_while_one_runs_leaves_its_state(archive: Path) -> None:
    """set_epoch during an iteration chooses the next one; the state stays in the epoch that runs, and resumes it."""
    loader, resumed = (GPUBatchLoader(archive, 10, seed=4, device="cpu") for _ in range(2))
    batches = iter(loader)
    next(batches)
    loader.set_epoch(5)
    state = loader.state_dict()
    next(batches)

    resumed.load_state_dict(loader.state_dict())

    assert (state["epoch"], state["position"]) == (0, 10)
    assert rows_of(resumed) == rows_of_order(Order(N_ROWS, 10, 4), 0)[20:]
    assert len(rows_of(batches)) == N_ROWS - 20
    assert (loader.state_dict()["epoch"], loader.state_dict()["position"]) == (5, 0)
    assert rows_of(loader) == rows_of_order(Order(N_ROWS, 10, 4), 5)


def test_loading_a_state_while_an_epoch_runs(archive: Path) -> None:
    """What an iteration begun before still yields does not move the place that was loaded."""
    loader = GPUBatchLoader(archive, 10, seed=4, device="cpu")
    batches = iter(loader)
    next(batches)
    loader.load_state_dict(loader.state_dict() | {"epoch": 2, "position": 40})

    next(batches)

    assert (loader.state_dict()["epoch"], loader.state_dict()["position"]) == (2, 40)
    assert rows_of(loader) == rows_of_order(Order(N_ROWS, 10, 4), 2)[40:]


def test_a_random_sampler_is_shared_out_over_workers(archive: Path) -> None:
    """Each worker draws the same permutation, though torch seeds each differently: every row comes once."""
    loader = GPUBatchLoader(archive, 10, sampler=RandomSampler(range(N_ROWS)), device="cpu")
    plain = DataLoader(loader, batch_size=None, num_workers=3, multiprocessing_context="fork")

    first, second = rows_of(plain), rows_of(plain)

    assert sorted(first) == sorted(second) == list(range(N_ROWS))
    assert first != second


def test_a_random_sampler_goes_on_in_workers_that_stay(archive: Path) -> None:
    """Persistent workers, though seeded once, draw another order each epoch, the same in all of them."""
    loader = GPUBatchLoader(archive, 10, sampler=RandomSampler(range(N_ROWS)), device="cpu")
    plain = DataLoader(loader, batch_size=None, num_workers=2, persistent_workers=True, multiprocessing_context="fork")

    epochs = [rows_of(plain) for _ in range(3)]

    assert all(sorted(rows) == list(range(N_ROWS)) for rows in epochs)
    assert len({tuple(rows) for rows in epochs}) == 3


def test_set_epoch_reaches_new_workers(archive: Path) -> None:
    """With set_epoch before each epoch, workers go through epochs as a loader alone does."""
    loader = GPUBatchLoader(archive, 10, seed=3, device="cpu")
    plain = DataLoader(loader, batch_size=None, num_workers=2, multiprocessing_context="fork")

    for epoch in (0, 1, 5):
        loader.set_epoch(epoch)
        assert rows_of(plain) == rows_of_order(Order(N_ROWS, 10, 3), epoch)


@pytest.mark.parametrize("prefetch", [0, 1, 50])
def test_any_prefetch_gives_the_same_batches(archive: Path, prefetch: int) -> None:
    """However far batches are made ahead, they come in their order, and each once."""
    loader = GPUBatchLoader(archive, 10, seed=3, device="cpu", prefetch=prefetch)

    assert rows_of(loader) == rows_of_order(Order(N_ROWS, 10, 3), 0)


def test_the_state_counts_what_was_yielded_not_what_was_made(archive: Path) -> None:
    """Batches made ahead do not count; nor do those of a loader that was only asked for an iterator."""
    loader = GPUBatchLoader(archive, 10, device="cpu", prefetch=50)
    batches = iter(loader)
    before = loader.state_dict()["position"]

    positions = [loader.state_dict()["position"] for _ in batches]

    assert before == 0
    assert positions == [*range(10, 101, 10), 103]
    assert (loader.state_dict()["epoch"], loader.state_dict()["position"]) == (1, 0)


def test_a_state_after_the_last_batch_has_nothing_left(archive: Path) -> None:
    """Resumed between the last batch and the end, an epoch yields nothing, and the next is whole."""
    loader = GPUBatchLoader(archive, 60, device="cpu")
    states = [loader.state_dict() for _ in loader]
    resumed = GPUBatchLoader(archive, 60, device="cpu")

    resumed.load_state_dict(json.loads(json.dumps(states[-1])))
    resumed.set_epoch(0)

    assert list(resumed) == []
    assert rows_of(resumed) == rows_of_order(Order(N_ROWS, 60), 1)


@pytest.mark.parametrize("after", range(11))
def test_a_state_between_batches_of_a_run_resumes(archive: Path, after: int) -> None:
    """Where batches are made many at once, a state still stands between any two of them."""
    order = rows_of_order(Order(N_ROWS, 10, 4), 0)
    loader, resumed = (GPUBatchLoader(archive, 10, seed=4, device="cpu") for _ in range(2))
    batches = iter(loader)
    for _ in range(after):
        next(batches)

    resumed.load_state_dict(loader.state_dict())

    assert rows_of(resumed) == order[10 * after :]


def test_leaving_early_goes_on_with_the_next_epoch(archive: Path) -> None:
    """An epoch that was left is over: the next iteration is the next epoch from its beginning."""
    loader = GPUBatchLoader(archive, 10, device="cpu")

    next(iter(loader))

    assert rows_of(loader) == rows_of_order(Order(N_ROWS, 10), 1)


def test_what_a_thread_meets_is_raised_in_its_place(archive: Path, recwarn: pytest.WarningsRecorder) -> None:
    """An error in a batch that is made ahead is raised when its turn comes, after the batches before it, and no thread stays."""
    before = threading.active_count()
    batches = [[row] for row in range(20)]
    batches[10] = [N_ROWS]
    served: list[Any] = []

    with pytest.raises(IndexError, match="row 103 is out of range"):
        served.extend(GPUBatchLoader(archive, batch_sampler=batches, device="cpu", obs=("line",)))

    assert [batch.rows.tolist() for batch in served] == batches[:10]
    assert threading.active_count() <= before
    assert not recwarn.list


class Broken:
    """A sampler or batch_sampler that gives what it has, and then fails."""

    def __init__(self, given: list[Any], error: Exception) -> None:
        self.given, self.error = given, error

    def __iter__(self) -> Iterator[Any]:
        """Yield what there is, then raise."""
        yield from self.given
        raise self.error


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("n_batches", [0, 1, 7, 90])
@pytest.mark.parametrize("kind", ["sampler", "batch_sampler"])
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_what_a_sampler_gave_before_its_error_is_yielded_first(
    archive: Path, device: str, kind: str, n_batches: int, prefetch: int
) -> None:
    """Every batch that was drawn whole comes, then the sampler's own error; the state stands after the last batch."""
    batches = [[2 * number % N_ROWS, 5] for number in range(n_batches)]
    error = LookupError("the sampler's own")
    given = {"batch_sampler": batches, "sampler": [row for rows in batches for row in rows] + [3]}[kind]
    options: dict[str, Any] = {kind: Broken(given, error)} | ({"batch_size": 2} if kind == "sampler" else {})
    where = EmulatedDevice() if device == "emulated" else "cpu"
    loader = GPUBatchLoader(archive, device=where, prefetch=prefetch, **options)
    served: list[Any] = []

    with pytest.raises(LookupError, match="the sampler's own") as caught:
        served.extend(loader)

    assert [batch.rows.tolist() for batch in served] == batches
    assert caught.value is error
    assert loader.state_dict()["position"] == (2 * n_batches if kind == "sampler" else n_batches)


def test_what_a_sampler_gave_before_its_error_is_yielded_in_workers(archive: Path) -> None:
    """In worker processes too, every batch that was drawn comes before the error."""
    batches = [[number] for number in range(9)]
    plain = DataLoader(
        GPUBatchLoader(archive, batch_sampler=Broken(batches, LookupError("the sampler's own")), device="cpu"),
        batch_size=None, num_workers=2, multiprocessing_context="fork",
    )  # fmt: skip
    served: list[Any] = []

    with pytest.raises(LookupError, match="the sampler's own"):
        served.extend(plain)

    assert [batch.rows.tolist() for batch in served] == batches


def test_an_interrupt_in_a_sampler_is_not_held_back(archive: Path) -> None:
    """Who interrupts the program while a sampler is drawn from gets no more batches first."""
    batches = iter(GPUBatchLoader(archive, batch_sampler=Broken([[1]], KeyboardInterrupt()), device="cpu"))  # type: ignore[arg-type]

    with pytest.raises(KeyboardInterrupt):
        next(batches)


class Drawn:
    """A sampler or batch_sampler without end that counts what was drawn of it."""

    def __init__(self, kind: str) -> None:
        self.kind, self.count = kind, 0

    def __iter__(self) -> Iterator[Any]:
        """Yield row 0, or lists of it, for ever."""
        while True:
            self.count += 1
            yield 0 if self.kind == "sampler" else [0]


@pytest.mark.parametrize("prefetch", [0, 2, 40])
@pytest.mark.parametrize("kind", ["sampler", "batch_sampler"])
def test_a_sampler_is_drawn_from_a_little_ahead(archive: Path, kind: str, prefetch: int) -> None:
    """However small batches are, no more than 16 for each thread, 32 and prefetch are drawn beyond those that were yielded."""
    sampler = Drawn(kind)
    options: dict[str, Any] = {kind: sampler} | ({"batch_size": 2} if kind == "sampler" else {})
    size = 2 if kind == "sampler" else 1
    most = 16 * (torch.get_num_threads() + 2) + prefetch

    batches = enumerate(GPUBatchLoader(archive, device="cpu", prefetch=prefetch, **options), 1)
    ahead = [sampler.count - size * number for number, _ in itertools.islice(batches, 200)]

    assert 0 <= max(ahead) <= size * most


def test_empty_lists_are_batches_of_their_own_on_a_device(archive: Path) -> None:
    """Lists without rows, before and between others, are batches wherever they are made."""
    lists = [[], [1], [], [], [2, 3], []]

    found = [batch.rows.tolist() for batch in GPUBatchLoader(archive, batch_sampler=lists, device=EmulatedDevice())]

    assert found == lists


@pytest.mark.parametrize("output", ["csr", "dense"])
def test_small_batches_of_any_sizes_are_what_they_would_be_alone(archive: Path, output: str) -> None:
    """Batches that are made as one, of whatever sizes, empty ones too, have their own rows, row pointers, marks and obs."""
    batches = [[5, 3, 3], [], [102], list(range(40, 71)), [0], [], [7] * 12]
    loader = GPUBatchLoader(archive, batch_sampler=batches, device="cpu", output=output, obs=["line"])

    found = list(loader)

    alone = [next(iter(GPUBatchLoader(archive, batch_sampler=[rows], device="cpu", output=output, obs=["line"]))) for rows in batches]
    assert [batch.rows.tolist() for batch in found] == batches
    for batch, expected in zip(found, alone, strict=True):
        assert batch.x.shape == expected.x.shape
        np.testing.assert_array_equal(dense(batch.x), dense(expected.x))
        assert torch.equal(batch.obs["line"], expected.obs["line"])
        assert batch.is_padding.shape == expected.is_padding.shape
        if output == "csr":
            assert batch.x.crow_indices().dtype == expected.x.crow_indices().dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_batches_of_a_run_are_apart_for_autograd(archive: Path, dtype: torch.dtype) -> None:
    """A batch may be changed in place while another waits for its backward pass, or by what has a gradient itself."""
    loader = GPUBatchLoader(archive, 8, device="cpu", output="dense", dtype=dtype, obs=["depth"])
    weight = torch.ones(N_VARS, dtype=dtype, requires_grad=True)
    batches = iter(loader)
    first, second, third = (next(batches) for _ in range(3))
    expected = second.x.clone()

    out = (first.x * weight).sum() + (first.obs["depth"] * weight[0]).sum()
    second.x.mul_(2)
    for tensor in (second.obs["depth"], second.rows, second.is_padding):
        tensor.zero_()
    out.backward()
    third.x.mul_(weight)

    saved = first.x.double().sum(0).numpy() + np.eye(N_VARS)[0] * first.obs["depth"].double().sum().item()
    np.testing.assert_allclose(weight.grad.double().numpy(), saved, rtol=0.02)
    assert torch.equal(second.x, expected * 2)
    assert third.x.requires_grad
    assert not first.x.requires_grad


def test_sparse_batches_of_a_run_are_apart_for_autograd(archive: Path) -> None:
    """The values of a batch may be changed in place while another waits for its backward pass."""
    weight = torch.ones(N_VARS, 1, requires_grad=True)
    batches = iter(GPUBatchLoader(archive, 8, device="cpu"))
    first, second = next(batches), next(batches)

    out = first.x @ weight
    second.x.values().mul_(2)
    second.x.col_indices().zero_()
    out.sum().backward()

    np.testing.assert_array_equal(weight.grad.numpy()[:, 0], matrix().toarray()[first.rows.numpy()].sum(0))


def test_the_last_of_a_run_wraps_alone(archive: Path) -> None:
    """Of many batches that are made as one only the last has padding, in every rank."""
    for rank in range(2):
        order = Order(N_ROWS, 7, 5, rank=rank, world_size=2)
        loader = GPUBatchLoader(archive, 7, seed=5, rank=rank, world_size=2, device="cpu")

        found = [(batch.rows.tolist(), batch.is_padding.tolist()) for batch in loader]

        steps = [order.batch(0, position) for position in range(0, N_ROWS, 14)]
        assert found == [(rows.tolist(), is_padding.tolist()) for rows, is_padding in steps]
        assert any(found[-1][1])


def test_buffers_of_runs_are_used_again(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many small batches go by, the memory is that of the few runs under way."""
    monkeypatch.setattr("scdl_gpu.loader.RUN_BYTES", 40 * N_VARS * 4)
    loader = GPUBatchLoader(archive, 5, device="cpu", output="dense", prefetch=2)

    addresses = [batch.x.data_ptr() for _ in range(20) for number, batch in enumerate(loader) if number % 8 == 0]

    assert len(addresses) == 60
    assert len(set(addresses)) < 20


def test_an_archive_without_rows_has_no_batches(tmp_path: Path) -> None:
    """No rows are an epoch of no batches, with the width and the dtype there would be; beside others they change nothing."""
    nothing = convert_h5ad(annotated(matrix(n_rows=18)[:0]), tmp_path / "nothing", data_dtype="uint8")
    some = convert_h5ad(annotated(matrix(n_rows=5)), tmp_path / "some", data_dtype="uint8")
    loader = GPUBatchLoader(nothing, 10, device="cpu", obs=("line", "depth"))

    assert (len(loader), list(loader), list(loader)) == (0, [], [])
    assert loader.state_dict()["epoch"] == 2
    (batch,) = GPUBatchLoader([nothing, some, nothing], 5, shuffle=False, device="cpu", obs=("plate",))
    assert batch.obs["plate"].tolist() == annotated(matrix(n_rows=5)).obs["plate"].tolist()
    np.testing.assert_array_equal(dense(batch.x), matrix(n_rows=5).toarray())


class LongLists(list[list[int]]):
    """A batch_sampler that says how long its lists may be."""

    batch_size = 2**31 // N_VARS + 1


def test_large_batches_have_large_indices(archive: Path) -> None:
    """Where a batch of the size given may hold 2^31 elements, row pointers and columns are int64, in every batch; else int32."""
    options: dict[str, Any] = {"batch_sampler": LongLists([[1, 2], [3]]), "device": "cpu"}

    for batches, dtype in ((GPUBatchLoader(archive, **options), torch.int64), (GPUBatchLoader(archive, 1024, device="cpu"), torch.int32)):
        for batch in batches:
            assert (batch.x.crow_indices().dtype, batch.x.col_indices().dtype) == (dtype, dtype)
            np.testing.assert_array_equal(dense(batch.x), matrix()[batch.rows.numpy()].toarray())


def test_a_closed_loader_says_so(archive: Path) -> None:
    """After close, or after `with`, nothing more comes; closing again does no harm."""
    with GPUBatchLoader(archive, 10, device="cpu") as loader:
        batches = iter(loader)
        first = next(batches)

    loader.close()

    assert len(first) == 10
    with pytest.raises(ValueError, match="the loader is closed"):
        next(batches)
    with pytest.raises(ValueError, match="the loader is closed"):
        next(iter(loader))
    assert repr(loader).endswith("; closed)")


def test_the_repr_says_what_goes_where(archive: Path) -> None:
    """Rows, genes, batches, device, placement, bytes and why, in a line."""
    loader = GPUBatchLoader(archive, 10, device="cpu", output="dense", var=["g1"], normalize_total=1e4, log1p=True)
    sampled = GPUBatchLoader([archive] * 2, batch_sampler=[[1]], device="auto")

    assert (loader.shape, sampled.shape) == ((103, 1), (206, 40))
    assert loader.device == torch.device("cpu")
    assert repr(loader).startswith(
        "GPUBatchLoader(103 rows x 40 genes, 1,128 nonzeros in 1 archive; batches of 10 as dense float32 of 1 genes, normalised to 10000, "
        f"log1p; on the cpu, {torch.get_num_threads()} threads, placement host: 5,760 bytes in the page cache; 5.6 KiB of rows fit"
    )
    assert "2,256 nonzeros in 2 archives; batches of a batch_sampler as csr float32" in repr(sampled)
    if not torch.cuda.is_available():
        assert repr(sampled).endswith("; torch finds no GPU)")
