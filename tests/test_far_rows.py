"""Rows that lie more than 2^32 words behind the begin of their memory, as in a placed collection of 16 GiB and more.

The memory is real, and never touched but where rows are: pages that nobody writes to take nothing.
"""

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cells import dense, matrix, write
from emulator.device import EmulatedDevice
from emulator.launcher import Emulator
from emulator.memory import HostMemory
from emulator.packed_batches import Batch, positions
from emulator.packed_cases import Case, DeviceBatch, table
from emulator.packed_rows import Shard
from numpy.typing import NDArray
from packed_cells import write_packed

from scdl_gpu import GPUBatchLoader, placement
from scdl_gpu.slab import Layout, PackedPlot, RawPlot

FAR_WORDS = (1 << 32) + 4096
NORESERVE = 0x4000
"""MAP_NORESERVE of Linux, which Python's mmap does not name."""


def sparse(size_bytes: int) -> NDArray[np.uint8]:
    """Map memory that takes a page only where it is written to."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    return np.frombuffer(mmap.mmap(-1, size_bytes, flags=flags), np.uint8)


@pytest.fixture(scope="module")
def memory() -> NDArray[np.uint8]:
    """Give memory of some more than 2^32 words."""
    return sparse(4 * FAR_WORDS + (1 << 20))


class FarMemory(HostMemory):
    """Memory of the emulator in which the payload, the first array that is put, lies FAR_WORDS words behind `origin`."""

    def __init__(self, memory: NDArray[np.uint8]) -> None:
        super().__init__(Emulator(1))
        self._memory, self._is_first = memory, True

    def put(self, array: NDArray[Any], padded_to: int = 1) -> NDArray[Any]:
        """Copy to where it belongs."""
        if not self._is_first:
            return super().put(array, padded_to)
        self._is_first = False
        there = self._memory[4 * FAR_WORDS : 4 * FAR_WORDS + array.nbytes].view(array.dtype)
        there[:] = array
        return there


NAMES = ["ranked: ragged rows", "identity: long rows of raw doubles", "ranked: one row of 60,000 nonzeros"]


@pytest.mark.parametrize("name", NAMES)
def test_kernels_reach_rows_beyond_32_bits(name: str, memory: NDArray[np.uint8]) -> None:
    """The twin in Numba and the emulated kernels decode rows of an entry whose words are counted from the begin of the memory."""
    case = table()[name]
    _, columns, values = case.expected("float64")

    device = DeviceBatch(case.batch(), FarMemory(memory), shift=FAR_WORDS)
    found, data, fault = device.csr("float64")
    on_cpu = far_batch(case, memory).csr("float64")

    assert int(device.table.entries["payload"][0]) == memory.ctypes.data
    for indices, made, faults in ((found, data, fault), on_cpu):
        assert positions(faults) == {}
        np.testing.assert_array_equal(indices, columns)
        assert made.tobytes() == values.tobytes()
    assert positions(device.check()) == positions(far_batch(case, memory).check()) == {}
    np.testing.assert_array_equal(device.dense("float64")[0], case.expected_dense("float64"))


def far_batch(case: Case, memory: NDArray[np.uint8]) -> Batch:
    """Describe a case for the CPU, its one payload FAR_WORDS words behind the begin of the memory."""
    batch = case.batch()
    words = batch.payloads[0]
    memory[4 * FAR_WORDS : 4 * FAR_WORDS + words.nbytes] = words.view(np.uint8)
    batch.shards["payload"], batch.rows["start"] = memory.ctypes.data, batch.rows["start"] + np.uint64(FAR_WORDS)
    batch.shards["words"] += np.uint64(FAR_WORDS)
    return batch


@pytest.mark.parametrize("start", [FAR_WORDS + 8 - (1 << 32), (1 << 48) - 1, FAR_WORDS + (1 << 40)])
def test_entries_that_lead_elsewhere_are_damaged(start: int, memory: NDArray[np.uint8]) -> None:
    """A start whose upper bits are lost, or that leads beyond the memory, is told; nothing there is read."""
    shard = Shard("float32", 50)
    shard.add([1, 2, 30], np.array([1, 2, 3], np.float32))
    case = Case("one row", [shard], [[(np.array([1, 2, 30]), np.array([1, 2, 3], np.float32))]], [(0, 0)])
    batch = far_batch(case, memory)

    batch.rows["start"] = start

    for fault in (batch.csr()[2], batch.dense()[1], batch.check()):
        assert positions(fault) == {"DAMAGED": 0}


class FarLayout(Layout):
    """A slab whose parts begin 2^32 words and more behind its begin."""

    def __init__(self, archives: Any) -> None:
        super().__init__(archives)
        for plot in self.plots:
            if isinstance(plot, PackedPlot):
                plot.payload += 4 * FAR_WORDS
            if isinstance(plot, RawPlot):
                plot.indices += 4 * FAR_WORDS
                plot.data += 4 * FAR_WORDS
        self.size_bytes += 4 * FAR_WORDS


class SparseDevice(EmulatedDevice):
    """An emulated device of 64 GiB, of which only what is written to is there."""

    def allocate(self, size_bytes: int) -> torch.Tensor:
        """Map a large block; small ones are as ever."""
        return torch.from_numpy(sparse(size_bytes)) if size_bytes > 1 << 32 else super().allocate(size_bytes)


@pytest.mark.parametrize("output", ["csr", "dense"])
def test_loaders_reach_rows_beyond_32_bits(output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raw and packed archives placed behind 16 GiB of a slab give the batches that they give where they lie."""
    paths = [write_packed(tmp_path / "packed", matrix(), orders=2), write(tmp_path / "raw", matrix(seed=1))]
    expected = GPUBatchLoader(paths, 32, device="cpu", output=output)
    monkeypatch.setattr(placement, "Layout", FarLayout)

    with GPUBatchLoader(paths, 32, device=SparseDevice(64 << 30), placement="device", output=output) as loader:
        for batch, known in zip(loader, expected, strict=True):
            np.testing.assert_array_equal(batch.rows.numpy(), known.rows.numpy())
            np.testing.assert_array_equal(dense(batch.x), dense(known.x))
