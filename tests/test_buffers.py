"""Buffers are used again when nobody refers to them, and never before; parcels arrive as they were packed."""

import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from emulator.device import EmulatedDevice

from scdl_gpu.buffers import KEPT, Courier, Ring

FLOAT = np.dtype(np.float32)
SIZE = 100_000


def address(array: Any) -> int:
    """Give where an array begins."""
    return int(array.ctypes.data)


class Counted:
    """Makes buffers and knows how many of them are still there."""

    def __init__(self) -> None:
        self.made = self.alive = 0

    def __call__(self, size_bytes: int) -> np.ndarray:
        """Make one."""
        buffer = np.empty(size_bytes, np.uint8)
        self.made, self.alive = self.made + 1, self.alive + 1
        weakref.finalize(buffer, self._gone)
        return buffer

    def _gone(self) -> None:
        self.alive -= 1


def test_a_free_buffer_is_used_again() -> None:
    """What nobody refers to any more is handed out next, for another dtype and a smaller size too."""
    ring = Ring()
    first = ring.empty(SIZE, FLOAT)
    place = address(first)

    del first

    assert address(ring.empty(SIZE, FLOAT)) == place
    assert address(ring.empty(SIZE // 2, np.dtype(np.int64))) == place
    assert address(ring.empty(SIZE + SIZE // 5, FLOAT)) == place


KEEPERS: dict[str, Callable[[np.ndarray], Any]] = {
    "array": lambda array: array,
    "slice": lambda array: array[5:6],
    "reshaped": lambda array: array.reshape(2, -1)[1],
    "tensor": torch.from_numpy,
    "view of a tensor": lambda array: torch.from_numpy(array).view(torch.int32)[3:].view(-1, 1),
    "other dtype": lambda array: torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16),
    "part of a CSR": lambda array: torch.sparse_csr_tensor(
        torch.tensor([0, array.size]), torch.arange(array.size), torch.from_numpy(array), (1, array.size), check_invariants=False
    ).values()[:1],
    "in a list": lambda array: [{"x": torch.from_numpy(array)}],
    "storage": lambda array: torch.from_numpy(array).untyped_storage(),
    "autograd": lambda array: (torch.from_numpy(array) * torch.ones(1, requires_grad=True)).grad_fn,
    "numpy of a tensor": lambda array: torch.from_numpy(array)[1:].numpy(),
    "memoryview": lambda array: memoryview(array),
}


@pytest.mark.parametrize("keeper", KEEPERS)
def test_a_buffer_is_not_used_again_while_somebody_refers_to_it(keeper: str) -> None:
    """A tensor, a view, a slice or whatever else reads the memory keeps it; when that goes, the memory is free."""
    ring = Ring()
    array = ring.empty(SIZE, FLOAT)
    array[:] = 7
    place = address(array)

    kept = KEEPERS[keeper](array)
    del array

    other = ring.empty(SIZE, FLOAT)
    assert address(other) != place
    del kept
    assert address(ring.empty(SIZE, FLOAT)) == place


def test_small_requests_leave_large_buffers_alone() -> None:
    """Row pointers do not take the place of values: each kind of request finds its own buffer again."""
    made = Counted()
    ring = Ring(made)

    for _ in range(10):
        kept = [ring.empty(n, FLOAT) for n in (65, SIZE, SIZE)]

    assert len(kept) == 3
    assert made.made == 6  # two batches' worth: the new one is made while the last is kept


def test_a_free_buffer_that_is_too_small_gives_way() -> None:
    """Sizes that grow a little do not leave every smaller buffer behind."""
    made = Counted()
    ring = Ring(made)

    for n in range(70_000, 120_000, 10_000):  # of one kind: 2^18 to 2^19 bytes
        ring.empty(n, FLOAT)

    assert made.made > 1
    assert made.alive == 1


def test_a_ring_keeps_no_more_than_its_limit() -> None:
    """A consumer that keeps many batches and drops them gets the memory back, but for a limited number of buffers."""
    made = Counted()
    ring = Ring(made)
    limit = KEPT + 4 * torch.get_num_threads()
    many = [ring.empty(SIZE // 100, FLOAT) for _ in range(3 * limit)]
    alive = made.alive

    del many

    assert alive == 3 * limit
    assert made.alive == limit


def test_long_kept_buffers_are_forgotten() -> None:
    """Beside many buffers that are kept for good, those that come and go are soon used again, and no more are made."""
    made = Counted()
    ring = Ring(made)
    kept = [ring.empty(SIZE // 100, FLOAT) for _ in range(60)]
    for _ in range(400):
        ring.empty(SIZE // 100, FLOAT)
    before = made.made

    for _ in range(400):
        ring.empty(SIZE // 100, FLOAT)

    assert len(kept) == 60
    assert made.made == before


def test_nothing_is_asked_for_and_given() -> None:
    """An empty array is a request like any other."""
    ring = Ring()

    assert ring.empty(0, FLOAT).shape == (0,)
    assert ring.empty(0, np.dtype(np.int64)).shape == (0,)


def test_threads_never_share_a_buffer() -> None:
    """Threads that take, fill, hand over and drop at the same time find what they wrote."""
    ring, faults = Ring(), []

    def work(number: int) -> None:
        random, kept = np.random.default_rng(number), []
        for step in range(200):
            array = ring.empty(int(random.integers(1, 3_000)), np.dtype(np.int64))
            array[:] = number * 1000 + step
            kept.append((torch.from_numpy(array), number * 1000 + step))
            if len(kept) > 5:
                tensor, expected = kept.pop(int(random.integers(0, 5)))
                if not bool((tensor == expected).all()):
                    faults.append(expected)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert faults == []


ARRAYS = {
    "rows": np.arange(5),
    "marks": np.array([True, False, True]),
    "half": np.array([1.5, -2], np.float16),
    "bytes": np.arange(7, dtype=np.uint8),
    "nothing": np.empty(0, np.int32),
    "numbers": np.array([1e300]),
}


def test_a_parcel_arrives_as_it_was_packed() -> None:
    """Arrays of any dtype and length come out on the device by name, as tensors and as addresses for kernels."""
    device = EmulatedDevice()
    courier = Courier(device)

    arrived, more = courier.bring(courier.packed(ARRAYS), torch.arange(3))
    device.record().wait()

    assert more[0].tolist() == [0, 1, 2]
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(arrived.tensor(name).numpy(), array)
        assert arrived.tensor(name).numpy().dtype == array.dtype
        assert len(arrived.part(name)) == array.size
        assert arrived.part(name).data_ptr() % 16 == 0
        if array.size:
            assert arrived.part(name).data_ptr() == arrived.tensor(name).data_ptr()
    assert len(arrived.part("absent")) == 0
    assert "absent" not in arrived
    assert "rows" in arrived


def test_page_locked_memory_is_used_again_after_its_copy() -> None:
    """While a copy is to come its memory is kept; once the next parcel sees that it is done, it is free."""
    device = EmulatedDevice()
    courier = Courier(device)

    def sent(value: int) -> tuple[Any, int]:
        parcel = courier.packed({"x": np.full(1000, value)})
        return courier.bring(parcel)[0], address(parcel.memory)

    early = [sent(1), sent(2)]
    device.record().wait()
    late = [sent(3), sent(4), sent(5)]
    device.record().wait()

    assert early[0][1] != early[1][1]
    assert {place for _, place in late[1:]} == {place for _, place in early}
    assert [int(arrived.tensor("x").unique()) for arrived, _ in early + late] == [1, 2, 3, 4, 5]
