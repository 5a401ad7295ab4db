"""Extents arrive as they are in the file, by preadv and by kvikio, and what cannot be read is named."""

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from scdl_gpu import reader
from scdl_gpu.errors import ArchiveError, MissingFileError

EXTENTS = [(0, 0), (0, 1), (4095, 4097), (1, 300_001), (0, 300_001), (300_001, 300_001)]
UNDER_STUB = """
import sys
from concurrent.futures import ThreadPoolExecutor
import torch
from scdl_gpu import reader

print(reader.path_in_use())
print(reader.reaches_device())
content = open(sys.argv[1], "rb").read()
size = len(content)
extents = [(0, size), (0, 0), (1, size), (4095, 4097), (size - 5, size)] + [(k * 100_000, (k + 7) * 100_000) for k in range(40)]
with reader.File(sys.argv[1]) as file, ThreadPoolExecutor(4) as pool:
    outs = [torch.full((stop - start,), 0xA5, dtype=torch.uint8) for start, stop in extents]
    list(pool.map(lambda extent, out: file.read(*extent, out), extents, outs))
    print(all(bytes(out.numpy()) == content[start:stop] for (start, stop), out in zip(extents, outs)))
    try:
        file.read(size - 1, size + 1, torch.empty(2, dtype=torch.uint8))
    except reader.ArchiveError as error:
        print(error)
"""


class FakeCuFile:
    """What this package uses of kvikio.CuFile."""

    def __init__(self, path: str, flags: str) -> None:
        self._file = Path(path).open(f"{flags}b", buffering=0)  # noqa: SIM115

    def pread(self, buffer: Any, size: int, file_offset: int) -> "FakeCuFile":
        """Read at once."""
        self._found = os.preadv(self._file.fileno(), [memoryview(buffer)[:size]], file_offset)
        return self

    def get(self) -> int:
        """Give how much was read."""
        return self._found

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "FakeCuFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class BrokenCuFile(FakeCuFile):
    """kvikio without a driver."""

    def pread(self, buffer: Any, size: int, file_offset: int) -> "FakeCuFile":
        """Fail as kvikio does."""
        raise RuntimeError("libcuda.so.1: cannot open shared object file")


@pytest.fixture
def decide(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Give the function that puts a kvikio with this CuFile in place, or none, and lets the reader decide anew."""
    settings = {"num_threads": 1}

    def install(cufile: type | None) -> dict[str, int]:
        kvikio, defaults = ModuleType("kvikio"), ModuleType("kvikio.defaults")
        vars(kvikio).update(CuFile=cufile, __version__="1.2")
        vars(defaults).update(get=settings.get, set=settings.__setitem__, is_compat_mode_preferred=lambda: False)
        for name, module in (("kvikio", kvikio), ("kvikio.defaults", defaults)):
            monkeypatch.setitem(sys.modules, name, module if cufile else None)
        reader._kvikio.cache_clear()
        return settings

    monkeypatch.delenv("KVIKIO_NTHREADS", raising=False)
    yield install
    reader._kvikio.cache_clear()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Give a file of 300,001 random bytes."""
    path = tmp_path / "data.npy"
    path.write_bytes(np.random.default_rng(0).bytes(300_001))
    return path


def blank(n: int) -> torch.Tensor:
    """Make n bytes of rubbish."""
    return torch.full((n,), 0xA5, dtype=torch.uint8)


@pytest.mark.parametrize("cufile", [None, FakeCuFile], ids=["preadv", "kvikio"])
@pytest.mark.parametrize(("start", "stop"), EXTENTS)
def test_extents_arrive(start: int, stop: int, cufile: type | None, decide: Any, path: Path) -> None:
    """Any extent of a file, an empty one too, is what it is in the file, and nothing around it is touched."""
    decide(cufile)
    memory = blank(stop - start + 20)

    reader.read(path, start, stop, memory[10:-10])

    rubbish = b"\xa5" * 10
    assert bytes(memory.numpy()) == rubbish + path.read_bytes()[start:stop] + rubbish


def test_an_open_file_stays_what_it_was(decide: Any, path: Path, tmp_path: Path) -> None:
    """A file that is replaced while it is open is read to its end, by kvikio as well."""
    for cufile in (None, FakeCuFile):
        decide(cufile)
        old, out = path.read_bytes(), blank(1000)
        with reader.File(path) as file:
            (tmp_path / "new").write_bytes(bytes(2000))
            (tmp_path / "new").replace(path)

            file.read(0, 1000, out)

        assert bytes(out.numpy()) == old[:1000]
        path.write_bytes(old)


@pytest.mark.parametrize("cufile", [None, FakeCuFile], ids=["preadv", "kvikio"])
def test_faults_are_named(cufile: type | None, decide: Any, path: Path) -> None:
    """A file that ends too early, is not there or is no file is named, and so are extents that do not fit the memory."""
    decide(cufile)

    with pytest.raises(ArchiveError, match=r"data\.npy ends before byte 300,002"):
        reader.read(path, 300_000, 300_002, blank(2))
    with pytest.raises(MissingFileError, match=r"absent\.npy is missing"):
        reader.read(path.with_name("absent.npy"), 0, 1, blank(1))
    for out in (blank(9), blank(20)[::2], blank(10).to(torch.int8)):
        with pytest.raises(ValueError, match="for bytes 0 to 10, expected as many uint8"):
            reader.read(path, 0, 10, out)
    with pytest.raises(ValueError, match="expected as many"):
        reader.read(path, 10, 0, blank(0))


def test_a_failing_disk_is_named(decide: Any, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the system becomes an ArchiveError naming file and bytes."""
    decide(None)

    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)

    with pytest.raises(ArchiveError, match=r"data\.npy: bytes 0 to 10 cannot be read \(.*Input/output error\)"):
        reader.read(path, 0, 10, blank(10))


def test_short_reads_are_continued(decide: Any, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that reads less than it was asked for, as beyond 2 GiB, is asked again."""
    decide(None)
    preadv, out = os.preadv, blank(1000)
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:333]], offset))

    reader.read(path, 5, 1005, out)

    assert bytes(out.numpy()) == path.read_bytes()[5:1005]


def test_it_says_how_it_reads(decide: Any) -> None:
    """The path in use is named with its reason, and kvikio's default of one thread is raised."""
    said = {}
    for name, cufile in (("absent", None), ("broken", BrokenCuFile), ("works", FakeCuFile)):
        settings = decide(cufile)
        said[name] = reader.path_in_use(), reader.reaches_device()

    assert said["absent"][0].startswith("preadv: kvikio is not there")
    assert said["broken"] == ("preadv: kvikio cannot read here (libcuda.so.1: cannot open shared object file)", False)
    assert said["works"] == ("kvikio 1.2: GPUDirect Storage, where the file system has it", True)
    assert settings["num_threads"] == 8


def test_the_users_threads_stay(decide: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """KVIKIO_NTHREADS is left as it is."""
    monkeypatch.setenv("KVIKIO_NTHREADS", "1")

    settings = decide(FakeCuFile)
    reader.path_in_use()

    assert settings["num_threads"] == 1


def test_kvikio_reads_under_a_stub_driver(tmp_path: Path) -> None:
    """The real kvikio reads into host memory, in threads and unaligned, in a process with a driver that only says no."""
    if importlib.util.find_spec("kvikio") is None:
        pytest.skip("kvikio is not installed; `make env` does so where there are wheels of it")
    source = Path(__file__).with_name("stub_libcuda.c")
    library, data = tmp_path / "libcuda.so.1", tmp_path / "data.npy"
    compiler = shutil.which("cc") or "c++"
    subprocess.run([compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(source)], check=True)
    data.write_bytes(np.random.default_rng(1).bytes(5_000_001))

    run = subprocess.run(
        [sys.executable, "-c", UNDER_STUB, str(data)],
        env=os.environ | {"LD_LIBRARY_PATH": str(tmp_path), "KVIKIO_COMPAT_MODE": "ON"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert run.returncode == 0, run.stderr
    version, reaches, equal, fault = run.stdout.splitlines()
    if version.startswith("preadv: kvikio is not there"):
        pytest.skip(f"kvikio is installed and cannot be loaded here: {version}")
    assert version.startswith("kvikio ")
    assert "compatibility mode" in version
    assert (reaches, equal) == ("True", "True")
    assert "ends before byte 5,000,002" in fault
