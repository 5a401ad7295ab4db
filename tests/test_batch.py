"""A batch moves as a whole, by its own methods and through the helpers of torch and Lightning."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.utils import _apply_to_tensors
from torch.utils.data._utils.collate import default_convert
from torch.utils.data._utils.pin_memory import pin_memory

from scdl_gpu import Batch


def csr(values: list[float]) -> torch.Tensor:
    """Make a sparse CSR of one value a row."""
    n = len(values)
    return torch.sparse_csr_tensor(torch.arange(n + 1), torch.arange(n), torch.tensor(values), (n, n + 1))


@pytest.fixture(params=["csr", "dense"])
def batch(request: pytest.FixtureRequest) -> Batch:
    """Give a batch of two rows."""
    x = csr([1.0, 2.0])
    obs = {"line": torch.tensor([0, -1]), "good": torch.tensor([True, False])}
    return Batch(x if request.param == "csr" else x.to_dense(), torch.tensor([7, 3]), obs, torch.tensor([False, True]))


def lightning_apply(data: Any, kind: Any, function: Callable[..., Any]) -> Any:
    """Do what apply_to_collection of lightning_utilities does: to what is of a kind, else to the fields of a dataclass's copy."""
    if isinstance(data, kind):
        return function(data)
    if isinstance(data, dict):
        return {key: lightning_apply(value, kind, function) for key, value in data.items()}
    if dataclasses.is_dataclass(data):
        fields = {field.name: getattr(data, field.name) for field in dataclasses.fields(data)}
        result = copy.deepcopy(data, memo={id(value): value for value in fields.values()})
        for name, value in fields.items():
            setattr(result, name, lightning_apply(value, kind, function))
        return result
    return data


def test_to_moves_every_tensor(batch: Batch) -> None:
    """`to` moves x, rows, obs and is_padding, and leaves the batch as it was."""
    moved = batch.to("meta", non_blocking=True)

    assert {moved.x.device.type, moved.rows.device.type, moved.is_padding.device.type} == {"meta"}
    assert {column.device.type for column in moved.obs.values()} == {"meta"}
    assert moved.x.layout == batch.x.layout
    assert moved.x.shape == batch.x.shape
    assert len(moved) == len(batch) == 2
    assert batch.x.device.type == "cpu"


@pytest.mark.parametrize("arguments", [("cpu", torch.float16), (torch.float16,), (None, torch.float16)], ids=str)
def test_a_dtype_is_that_of_x(batch: Batch, arguments: tuple[Any, ...]) -> None:
    """A dtype, alone or after a device, changes x; rows, codes and marks keep theirs."""
    moved = batch.to(*arguments)

    assert moved.x.dtype == torch.float16
    assert moved.rows.tolist() == [7, 3]
    assert {name: column.dtype for name, column in moved.obs.items()} == {"line": torch.int64, "good": torch.bool}
    assert moved.is_padding.dtype == torch.bool
    assert moved.x.to_dense().tolist() == batch.x.to_dense().tolist()


def test_lightning_moves_it(batch: Batch) -> None:
    """move_data_to_device calls `to(device, non_blocking=...)` on whatever has a `to`; a hook may also go through the fields."""
    moved = batch.to(torch.device("meta"), non_blocking=True)
    halved = lightning_apply(batch, torch.Tensor, lambda tensor: tensor.half() if tensor.is_floating_point() else tensor)

    assert callable(type(batch).to)
    assert moved.rows.device.type == "meta"
    assert halved.x.dtype == torch.float16
    assert halved.obs["line"].tolist() == [0, -1]
    assert batch.x.dtype == torch.float32


def test_torch_helpers_take_it(batch: Batch) -> None:
    """FSDP's helper goes through the fields, DataLoader's hands the batch on whole."""
    doubled = _apply_to_tensors(lambda tensor: tensor + tensor if tensor.is_floating_point() else tensor, batch)

    assert isinstance(doubled, Batch)
    assert doubled.x.to_dense().sum() == 6
    assert default_convert(batch) is batch


def test_a_batch_is_like_itself_alone(batch: Batch) -> None:
    """Batches are compared by identity: equality of tensors is no truth value."""
    other = batch.to("cpu")

    assert batch == batch
    assert batch != other
    assert len({batch, other}) == 2


def test_pin_memory_takes_every_tensor(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """DataLoader's pin_memory calls the batch's own, which pins the parts of a sparse x, as torch 2.4 cannot pin the whole."""
    layouts = []

    def pinned(tensor: torch.Tensor) -> torch.Tensor:
        layouts.append(tensor.layout)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)

    moved = pin_memory(batch)

    assert isinstance(moved, Batch)
    assert moved.x.to_dense().tolist() == batch.x.to_dense().tolist()
    assert layouts == [torch.strided] * (7 if batch.x.layout == torch.sparse_csr else 5)


@pytest.mark.gpu
def test_pin_memory_pins(batch: Batch) -> None:
    """Every tensor of a pinned batch is page-locked."""
    pinned = pin_memory(batch)

    assert pinned.rows.is_pinned()
    assert all(column.is_pinned() for column in pinned.obs.values())
    assert pinned.x.to_dense().tolist() == batch.x.to_dense().tolist()
