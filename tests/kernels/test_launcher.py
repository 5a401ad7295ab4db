"""GpuLauncher hands CuPy the sources, and starts kernels on torch's current stream; CuPy and the stream are stand-ins here."""

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from emulator import cases

from scdl_gpu.kernels import gpu, source


class FakeCupy:
    """What GpuLauncher uses of CuPy; keeps what it was given."""

    def __init__(self) -> None:
        self.modules: list[dict[str, Any]] = []
        self.launches: list[tuple[Any, ...]] = []
        self.streams: list[int] = []
        self.cuda = SimpleNamespace(ExternalStream=self._stream)

    def RawModule(self, **options: Any) -> SimpleNamespace:  # noqa: N802  CuPy's name
        """Keep the options of a module."""
        self.modules.append(options)
        return SimpleNamespace(get_function=self._function)

    def _function(self, name: str) -> Any:
        def call(grid: Any, block: Any, args: Any, *, shared_mem: int, stream: SimpleNamespace) -> None:
            self.launches.append((name, grid, block, args, shared_mem, stream.ptr))

        return call

    def _stream(self, pointer: int) -> SimpleNamespace:
        self.streams.append(pointer)
        return SimpleNamespace(ptr=pointer)


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> FakeCupy:
    """Put the stand-in in CuPy's place, and torch's current stream at a number."""
    fake = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    return fake


def test_kernels_start_on_the_current_stream(cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source is compiled once for all its kernels, a stream is wrapped once, and the stream is looked up at every launch."""
    launcher = gpu.GpuLauncher()

    launcher.launch("gather_dense_float32", (3, 1), (256,), (1, 2.5), 64)
    launcher.launch("gather_dense_uint8", (1, 1), (256,), ())
    launcher.launch("gather_dense_float32", (4, 1), (256,), ())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=8))
    launcher.launch("gather_csr_int32_uint8", (1, 1), (128,), ())

    assert [module["code"] for module in cupy.modules] == [source.text("gather_dense"), source.text("gather_csr")]
    assert all(module["options"] == ("-std=c++17", "--fmad=false") for module in cupy.modules)
    assert cupy.launches[0] == ("gather_dense_float32", (3, 1), (256,), (1, 2.5), 64, 7)
    assert [launch[-1] for launch in cupy.launches] == [7, 7, 7, 8]
    assert cupy.streams == [7, 8]


def test_kernels_that_no_source_has(cupy: FakeCupy) -> None:
    """An unknown name is named."""
    with pytest.raises(LookupError, match="scatter_rows"):
        gpu.GpuLauncher().launch("scatter_rows", (1,), (1,), ())


@pytest.mark.parametrize("stem", source.stems())
def test_sources_need_no_header(stem: str) -> None:
    """What NVRTC is given includes nothing, and has the shared text in it once."""
    text = source.text(stem)

    assert "#include" not in text
    assert text.count("struct Shard {") == 1


def test_what_launches_take() -> None:
    """Grids cover the batch, shared memory stays below what every GPU has, and arguments are 64-bit numbers and doubles."""
    launches: list[tuple[Any, ...]] = []
    case = cases.one_shard("wide", 62_710, [60_000, 10], [0, 1], is_sorted=False).with_dtypes("uint64", "float64")
    plan, nnz = cases.plan_of(case, "int64"), 60_010
    entries = cases.entries_of(case, [(128, 1 << 30)])
    table, tensor = gpu.Table(entries, 256), torch.from_numpy
    rows = [tensor(array) for array in (plan.shard, plan.starts, plan.slots, plan.read_indptr)]
    out = torch.empty(2, 62_710, dtype=torch.float64)

    def launch(*args: Any) -> None:
        launches.append(args)

    fault, indptr = tensor(cases.no_faults()), tensor(plan.indptr)
    gpu.gather_csr(launch, table, *rows, 62_710, indptr, 6, torch.empty(nnz, dtype=torch.int64), torch.empty(nnz).double(), fault)
    gpu.gather_dense(launch, table, *rows, 62_710, torch.arange(62_710).int(), 1.0, True, 6, out, fault)
    gpu.gather_dense(launch, table, *rows, 62_710, np.empty(0, np.int32), 0.0, False, 6, out, fault)

    names = [args[0] for args in launches]
    assert names == ["gather_csr_int64_float64", "gather_csr_unsorted_int64_float64", "gather_dense_float64", "gather_dense_float64"]
    assert all(args[4] <= gpu.SHARED_BYTES for args in launches)
    assert all(type(argument) in (int, float) for args in launches for argument in args[3])
    assert launches[0][1][0] * 4 * 512 >= nnz
    assert launches[3][1] == (2, 31)


def test_nothing_is_launched_for_nothing() -> None:
    """A batch without elements or rows starts no kernel."""
    table = gpu.Table(cases.entries_of(cases.one_shard("one", 3, [1], [0]), [(0, 0)]), 0)
    empty, ints = np.empty(0, np.int64), np.empty(0, np.int32)

    gpu.gather_csr(None, table, ints, np.zeros(2, np.int64), ints, np.zeros(3, np.int32), 3, ints, 5, ints, empty, ints)
    gpu.gather_dense(None, table, ints, empty, ints, np.zeros(1, np.int64), 3, ints, 0.0, False, 5, np.empty((0, 3), np.float32), ints)

    assert table.element_bytes == 5
