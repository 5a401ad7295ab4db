"""GpuLauncher hands CuPy the sources, and starts kernels on torch's current stream; CuPy and the stream are stand-ins here."""

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from emulator import cases

from scdl_gpu.kernels import gpu, packed, shards, source


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


@pytest.mark.parametrize("n_vars", [1, 62_710, 1 << 18, 2_000_000])
@pytest.mark.parametrize("length", [0, 1_450, 60_000])
def test_what_launches_of_packed_rows_take(n_vars: int, length: int) -> None:
    """Whatever rows and genes there are, shared memory stays below what every GPU has; kernels are those that the orders need."""
    launches: list[tuple[Any, ...]] = []
    table, none, pointers = gpu.Table(np.empty(0), 256), np.empty(0, np.int32), np.array([0, length, 2 * length + 1])
    rows, fault = np.zeros(2, packed.ROW), cases.no_faults()

    def launch(*args: Any) -> None:
        launches.append(args)

    for tables, kernels in (([0], ["csr"]), ([1], ["csr_ranked"]), ([0, 1], ["csr", "csr_ranked"])):
        orders = np.zeros(len(tables), packed.ORDER)
        orders["table"] = tables
        for made in shards.CSR_KINDS:
            out = (np.empty(2 * length + 1, np.int64), np.empty(2 * length + 1, made), fault)
            launches.clear()
            gpu.decode_csr(launch, table, gpu.Table(orders, 1), none, rows, none, pointers, n_vars, pointers, shards.kind_of(made), *out)
            assert [args[0] for args in launches] == [f"decode_{kernel}_int64_{made}" for kernel in kernels]
            assert all(args[4] <= gpu.SHARED_BYTES for args in launches)
    for made in ("uint8", "float32", "float64"):
        out = np.empty((2, n_vars), made)
        for lut in (none, np.zeros(n_vars, np.int32)):
            target = 0.0 if made == "uint8" else 1.0
            gpu.decode_dense(launch, table, table, none, rows, none, pointers, n_vars, lut, target, False, shards.kind_of(made), out, fault)
            name, grid, _, args, shared_bytes = launches.pop()
            tile_bytes = args[-4]
            assert (name, grid[0]) == (f"decode_dense_{made}", 2)
            assert shared_bytes <= gpu.SHARED_BYTES
            assert tile_bytes % 128 == 0
            assert grid[1] <= -(-(n_vars * out.itemsize + 127) // tile_bytes)
    gpu.check_rows(launch, table, none, rows, pointers.astype(np.int32), fault)
    assert launches[-1][:3] == ("check_rows_int32", (1, 1), (128,))


def test_nothing_is_launched_for_nothing() -> None:
    """A batch without elements or rows starts no kernel."""
    table = gpu.Table(cases.entries_of(cases.one_shard("one", 3, [1], [0]), [(0, 0)]), 0)
    empty, ints = np.empty(0, np.int64), np.empty(0, np.int32)

    gpu.gather_csr(None, table, ints, np.zeros(2, np.int64), ints, np.zeros(3, np.int32), 3, ints, 5, ints, empty, ints)
    gpu.gather_dense(None, table, ints, empty, ints, np.zeros(1, np.int64), 3, ints, 0.0, False, 5, np.empty((0, 3), np.float32), ints)
    gpu.decode_csr(None, table, table, ints, ints, ints, np.zeros(1, np.int32), 3, ints, 5, ints, empty, ints)
    gpu.decode_dense(None, table, table, ints, ints, ints, np.zeros(1), 3, ints, 0.0, False, 5, np.empty((0, 3), np.float32), ints)
    gpu.check_rows(None, table, ints, ints, np.zeros(1, np.int32), ints)

    assert table.element_bytes == 5


def test_structures_are_those_of_the_sources() -> None:
    """The entries of tables have the bytes that the CUDA structures have, and the launchers count them alike."""
    text = source.text("decode_csr")

    assert (packed.PACKED.itemsize, packed.ROW.itemsize, packed.ORDER.itemsize) == (24, 24, 16)
    assert "u64 payload, words;\n    u32 source, reserved;" in text
    assert "u64 start;\n    u32 words, order, sum, check;" in text
    assert "u64 table;\n    u32 entry_bytes, reserved;" in text
    assert f"STEPS = {gpu.STEPS};" in text
    assert f"TILE = 1u << {gpu.PACKED_TILE_GENES.bit_length() - 1};" in text
