"""Arguments of the loader and of RowSampler are taken for what they are, or refused by name, with what was expected."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cells import N_ROWS, annotated, matrix, rows_of
from torch.utils.data import RandomSampler

from scdl_gpu import DeviceError, GPUBatchLoader, RowSampler, convert_h5ad
from scdl_gpu.arguments import is_truth, real, whole
from scdl_gpu.device import device_of


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give an archive of `annotated(matrix())`."""
    return convert_h5ad(annotated(matrix()), tmp_path_factory.mktemp("arguments") / "archive", data_dtype="float32")


WHOLE = "expected a whole number"
DENSE = {"output": "dense"}


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"batch_size": True}, TypeError, f"batch_size is True, {WHOLE} of at least 1"),
        ({"batch_size": 64.0}, TypeError, f"batch_size is 64.0, {WHOLE}"),
        ({"batch_size": "64"}, TypeError, f"batch_size is '64', {WHOLE}"),
        ({"batch_size": None}, TypeError, f"batch_size is None, {WHOLE}"),
        ({"batch_size": -3}, ValueError, f"batch_size is -3, {WHOLE} of at least 1"),
        ({"seed": True}, TypeError, f"seed is True, {WHOLE}"),
        ({"seed": np.True_}, TypeError, f"seed is .*True.*, {WHOLE}"),
        ({"seed": None}, TypeError, f"seed is None, {WHOLE}"),
        ({"prefetch": True}, TypeError, f"prefetch is True, {WHOLE} of at least 0"),
        ({"prefetch": -1}, ValueError, f"prefetch is -1, {WHOLE} of at least 0"),
        ({"prefetch": 1.5}, TypeError, f"prefetch is 1.5, {WHOLE}"),
        ({"rank": False, "world_size": 2}, TypeError, f"rank is False, {WHOLE}"),
        ({"rank": 0, "world_size": True}, TypeError, f"world_size is True, {WHOLE}"),
        ({"rank": -1, "world_size": 2}, ValueError, "rank is -1 and world_size 2, expected 0 <= rank < world_size"),
        ({"rank": 0, "world_size": 0}, ValueError, f"world_size is 0, {WHOLE} of at least 1"),
        ({"shuffle": "no"}, TypeError, "shuffle is 'no', expected True or False"),
        ({"drop_last": 1}, TypeError, "drop_last is 1, expected True or False"),
        ({"windows": "auto"}, TypeError, "windows is 'auto', expected True, False or None"),
        ({"device": True}, TypeError, 'device is True, expected "auto", "cpu"'),
        ({"device": None}, TypeError, 'device is None, expected "auto", "cpu"'),
        ({"device": 1.0}, TypeError, 'device is 1.0, expected "auto", "cpu"'),
        ({"device": -1}, ValueError, "device is -1, expected a whole number of at least 0"),
        ({"device": "gpu"}, ValueError, "device 'gpu' is unknown, expected \"auto\", \"cpu\""),
        ({"placement": "hots"}, ValueError, "placement 'hots' is unknown, expected one of auto, device, node, pinned, host"),
        ({"placement": None}, ValueError, "placement None is unknown, expected one of auto, device, node, pinned, host"),
        ({"host_budget": "4 GB"}, TypeError, "host_budget is '4 GB', expected bytes as an int"),
        ({"output": "Dense"}, ValueError, "output is 'Dense', expected 'csr' or 'dense'"),
        ({"output": None}, ValueError, "output is None, expected 'csr' or 'dense'"),
        ({"gene_order": "packed"}, ValueError, "gene_order is 'packed', expected 'var' or 'stored'"),
        ({"dtype": "float32"}, TypeError, "dtype is 'float32', expected a dtype of torch, one of torch.uint8"),
        ({"dtype": np.float32}, TypeError, "dtype is .*numpy.float32.*, expected a dtype of torch"),
        ({"dtype": np.dtype("int32")}, TypeError, r"dtype is dtype\('int32'\), expected a dtype of torch"),
        (DENSE | {"normalize_total": True}, TypeError, "normalize_total is True, expected a positive number"),
        (DENSE | {"normalize_total": "1e4"}, TypeError, "normalize_total is '1e4', expected a positive number"),
        (DENSE | {"normalize_total": float("inf")}, ValueError, "normalize_total is inf, expected a positive number"),
        (DENSE | {"log1p": "no"}, TypeError, "log1p is 'no', expected True or False"),
        (DENSE | {"log1p": 1}, TypeError, "log1p is 1, expected True or False"),
        (DENSE | {"var": []}, ValueError, "var is empty, expected at least one gene, or None for all"),
        (DENSE | {"var": [True, False]}, TypeError, r"var holds True, .*np\.flatnonzero\(mask\)"),
        (DENSE | {"var": np.arange(40) < 3}, TypeError, r"var holds .*True.*, .*np\.flatnonzero\(mask\)"),
        (DENSE | {"var": 3}, TypeError, "var is 3, expected a list of genes"),
        ({"obs": ["line", "line"]}, ValueError, "obs column 'line' is asked for twice"),
        ({"obs": None}, TypeError, "obs is None, expected a list of column names"),
        ({"obs": [3]}, ValueError, "has no obs column 3; it has"),
        ({"sampler": 5}, TypeError, "sampler is 5, expected something that yields rows"),
        ({"sampler": RandomSampler}, TypeError, "sampler is .*RandomSampler.*, expected something that yields rows"),
        ({"batch_sampler": 5}, TypeError, "batch_sampler is 5, expected something that yields lists of rows"),
        ({"sampler": [1], "rank": 0, "world_size": 2}, ValueError, "sampler excludes rank and world_size"),
        ({"batch_sampler": [[1]], "rank": 0, "world_size": 2}, ValueError, "batch_sampler excludes rank and world_size"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_argument_is_refused(archive: Path, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    """Slips that Python would let pass, and values of other types, are named with what was expected."""
    with pytest.raises(kind, match=message):
        GPUBatchLoader(archive, **({"device": "cpu"} | options))


@pytest.mark.parametrize("rows", [[-1], [N_ROWS]], ids=str)
@pytest.mark.parametrize("kind", ["sampler", "batch_sampler"])
def test_a_row_that_is_not_there_is_refused(archive: Path, kind: str, rows: list[int]) -> None:
    """A negative row of a sampler is not counted from the end; it and one beyond the end are named with the rows there are."""
    options: dict[str, Any] = {kind: rows if kind == "sampler" else [rows]}

    with pytest.raises(IndexError, match=rf"row {rows[0]} is out of range: .* {N_ROWS} rows, expected 0 <= row < {N_ROWS}"):
        list(GPUBatchLoader(archive, device="cpu", **options))


def test_a_batch_sampler_of_nothing_is_an_epoch_of_nothing(archive: Path) -> None:
    """A batch_sampler without lists has no batches; an empty list is a batch without rows."""
    assert list(GPUBatchLoader(archive, batch_sampler=[], device="cpu")) == []
    assert [len(batch) for batch in GPUBatchLoader(archive, batch_sampler=[[]], device="cpu")] == [0]


def test_numbers_of_numpy_are_numbers(archive: Path) -> None:
    """NumPy's integers and floats stand for Python's, and a state holds plain ones."""
    plain = GPUBatchLoader(archive, 10, seed=3, rank=1, world_size=2, device="cpu", prefetch=1)
    options: dict[str, Any] = {"seed": np.uint8(3), "rank": np.int64(1), "world_size": np.int32(2), "prefetch": np.int16(1)}
    loader = GPUBatchLoader(archive, np.int64(10), device="cpu", **options)  # type: ignore[arg-type]
    sampler = RowSampler(range(N_ROWS), np.int64(10), seed=np.int64(3))  # type: ignore[arg-type]
    for one in (plain, loader, sampler):
        one.set_epoch(np.int64(4))  # type: ignore[arg-type]
        next(iter(one))

    states = [one.state_dict() for one in (plain, loader, sampler)]

    assert [json.loads(json.dumps(state)) for state in states] == states
    assert states[1] == states[0] == {"version": 1, "seed": 3, "epoch": 4, "position": 20, "n_rows": N_ROWS, "order": "shuffled"}
    assert {type(value) for state in states for value in state.values()} == {int, str}
    assert rows_of(loader) == rows_of(plain)


def test_a_number_as_device_is_that_gpu(archive: Path) -> None:
    """As for torch, N means cuda:N, of NumPy too; without a GPU that is an error, not the CPU."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")

    for number in (0, np.int64(1)):
        with pytest.raises(DeviceError, match="finds no GPU"):
            device_of(number)  # type: ignore[arg-type]
    with pytest.raises(DeviceError, match="finds no GPU"):
        GPUBatchLoader(archive, device=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position": -1}, "position is -1, expected a whole number of at least 0"),
        ({"position": N_ROWS + 1}, rf"position is {N_ROWS + 1}, expected 0\.\.{N_ROWS}"),
        ({"position": 2.0}, f"position is 2.0, {WHOLE}"),
        ({"position": True}, f"position is True, {WHOLE}"),
        ({"seed": "3"}, f"seed is '3', {WHOLE}"),
        ({"seed": None}, f"seed is None, {WHOLE}"),
        ({"epoch": -1}, f"epoch is -1, {WHOLE} of at least 0"),
        ({"epoch": "1"}, f"epoch is '1', {WHOLE}"),
        ({"worker": 3}, "worker is 3, expected its number and of how many"),
        ({"worker": [2, 2]}, r"worker is \[2, 2\], expected its number and of how many"),
        ({"version": 2}, "version 2, expected 1"),
    ],
    ids=str,
)
def test_a_state_out_of_range_is_refused(archive: Path, change: dict[str, Any], message: str) -> None:
    """Each value of a state that no loader gives raises ValueError that names it and what was expected; nothing is taken over."""
    loader = GPUBatchLoader(archive, 10, device="cpu")
    sampler = RowSampler(range(N_ROWS), 10)
    sampled = GPUBatchLoader(archive, 10, sampler=range(N_ROWS), device="cpu")

    for one in (loader, sampler, sampled):
        state = one.state_dict()
        with pytest.raises(ValueError, match=message):
            one.load_state_dict(state | change)
        with pytest.raises(TypeError, match="the state is None, expected what state_dict"):
            one.load_state_dict(None)  # type: ignore[arg-type]
        assert one.state_dict() == state


def test_a_position_is_bounded_by_the_sampler(archive: Path) -> None:
    """Rows of a sampler, lists of a batch_sampler bound a position, not the rows of the dataset; unknown lengths bound nothing."""
    cases: list[tuple[dict[str, Any], int | None]] = [
        ({"sampler": range(7)}, 7),
        ({"sampler": [1] * 500}, 500),
        ({"batch_sampler": [[1, 2], [3]]}, 2),
        ({"batch_sampler": iter([[1]])}, None),
    ]
    for options, last in cases:
        loader = GPUBatchLoader(archive, device="cpu", **options)
        state = loader.state_dict()

        loader.load_state_dict(state | {"position": 1000 if last is None else last})
        if last is not None:
            with pytest.raises(ValueError, match=rf"position is {last + 1}, expected 0\.\.{last}"):
                loader.load_state_dict(state | {"position": last + 1})

        assert list(loader) == []


@pytest.mark.parametrize("drop_last", [False, True])
def test_every_state_of_a_sampler_loads(archive: Path, drop_last: bool) -> None:
    """The state after each batch, also after an incomplete last one, is one that loads, and what follows is the rest."""
    loader, resumed = (GPUBatchLoader(archive, 3, sampler=range(10, 18), drop_last=drop_last, device="cpu") for _ in range(2))
    whole_epoch = [batch.rows.tolist() for batch in GPUBatchLoader(archive, 3, sampler=range(10, 18), drop_last=drop_last, device="cpu")]
    states = [loader.state_dict() for _ in loader]

    for number, state in enumerate(states, 1):
        resumed.load_state_dict(state)

        assert [batch.rows.tolist() for batch in resumed] == whole_epoch[number:]


def test_a_state_of_a_worker_is_not_a_row_samplers() -> None:
    """The place of a worker process means nothing to a RowSampler: iterating from it is refused."""
    sampler = RowSampler(range(20), 4)
    sampler.load_state_dict(sampler.state_dict() | {"worker": [1, 2]})

    with pytest.raises(ValueError, match=r"taken in worker \(1, 2\), this is None"):
        next(iter(sampler))


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (("archive", 10), TypeError, "dataset is 'archive', expected a dataset"),
        ((Path("archive"), 10), TypeError, "dataset is .*archive.*, expected a dataset"),
        ((100, 10), TypeError, "dataset is 100, expected a dataset"),
        ((range(9), True), TypeError, f"batch_size is True, {WHOLE}"),
        ((range(9), 2.0), TypeError, f"batch_size is 2.0, {WHOLE}"),
    ],
    ids=str,
)
def test_row_sampler_refuses_as_the_loader_does(arguments: tuple[Any, Any], kind: type[Exception], message: str) -> None:
    """What has no rows, and what is no size, is named; the letters of a path are not rows."""
    with pytest.raises(kind, match=message):
        RowSampler(*arguments)
    with pytest.raises(TypeError, match="shuffle is 'yes', expected True or False"):
        RowSampler(range(9), 2, shuffle="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize("epoch", [True, 1.0, "1", None], ids=str)
def test_an_epoch_is_a_whole_number(archive: Path, epoch: Any) -> None:
    """set_epoch refuses what is none, and a negative one."""
    for one in (GPUBatchLoader(archive, device="cpu"), RowSampler(range(9), 2)):
        with pytest.raises(TypeError, match=f"epoch is {epoch!r}, {WHOLE} of at least 0"):
            one.set_epoch(epoch)
        with pytest.raises(ValueError, match=f"epoch is -1, {WHOLE} of at least 0"):
            one.set_epoch(-1)


def test_numbers_and_truths_are_told_apart() -> None:
    """Truth values of Python, NumPy and torch are no numbers; whole numbers of all three are; long values are cut."""
    assert [whole("n", value) for value in (3, np.uint8(3), np.array(3), torch.tensor(3))] == [3] * 4
    assert real("x", np.float32(0.5), "a number") == 0.5
    assert all(is_truth(value) for value in (True, np.False_, torch.tensor(True), np.array([True])))
    assert not any(is_truth(value) for value in (1, 0.0, "True", torch.tensor(1), None))
    with pytest.raises(TypeError, match=r"n is '0+\.\.\., expected a whole number$"):
        whole("n", "0" * 500)
