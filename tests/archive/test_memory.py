"""Private memory of what is done to whole archives: pieces, whatever the size."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from scdl_gpu.archive.raw import open_raw

N_ROWS, LENGTH = 40_000, 1_000  # 40 M values: 160 MB as float32, 80 MB of columns
BOUND = 100 << 20

MEASURE = """
import sys, threading, time
from pathlib import Path
import numpy, pyarrow.parquet, numba
from scdl_gpu.archive import change, check
from scdl_gpu.archive.raw import open_raw

def private():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])

small, path, action = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
actions = {
    "cast": lambda p: change.cast(p, open_raw(p), "float64"),
    "join": lambda p: change.join_into([open_raw(p)] * 2, p.with_name(p.name + "-joined"), data_dtype="float64"),
    "copy": lambda p: change.copy(open_raw(p), p.with_name(p.name + "-copy")),
    "describe": lambda p: change.describe(p, open_raw(p), canonical=False),
    "check": lambda p: check.check_archive(open_raw(p)),
}
actions[action](small)  # what is loaded and compiled once
before, peak, done = private(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, private())
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
actions[action](path)
done = True
thread.join()
print(peak - before)
"""


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Give a small archive and one of 240 MB."""
    from scdl_gpu.archive.features import ObservedFeatureIndex, VariableFeatureIndex
    from scdl_gpu.archive.writer import finish

    directory = tmp_path_factory.mktemp("memory")
    columns = np.arange(LENGTH, dtype="uint16")
    values = np.ones(LENGTH, "float32")
    for name, n_rows in (("small", 10), ("large", N_ROWS)):
        path = directory / name
        path.mkdir()
        (np.arange(n_rows + 1, dtype="uint32") * LENGTH).tofile(path / "row_ptr.npy")
        for file, row in (("col_ptr.npy", columns), ("data.npy", values)):
            with (path / file).open("wb") as stream:
                for start in range(0, n_rows, 1000):
                    stream.write(np.tile(row, min(1000, n_rows - start)).data)
        var, obs = VariableFeatureIndex(), ObservedFeatureIndex()
        var.append_features(n_rows, {"gene": np.arange(LENGTH)}, "x")
        obs.append_features({"n": np.arange(n_rows)}, "x")
        dtypes = {"data.npy": "float32", "row_ptr.npy": "uint32", "col_ptr.npy": "uint16"}
        finish(path, dtypes=dtypes, var=var, obs=obs, canonical=True)
    return directory / "small", directory / "large"


@pytest.mark.parametrize("action", ["check", "describe", "copy", "join", "cast"])
def test_memory_does_not_grow_with_the_archive(archives: tuple[Path, Path], action: str) -> None:
    """Far less than the archive, for everything that reads or writes all of it."""
    done = subprocess.run([sys.executable, "-c", MEASURE, *map(str, archives), action], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < BOUND


def test_the_archive_of_these_tests_is_large(archives: tuple[Path, Path]) -> None:
    """The bound means something."""
    archive = open_raw(archives[1])

    assert archive.data.nbytes + archive.indices.nbytes > 2 * BOUND
