"""Worker processes of a conversion whose parent is killed: what they leave, and that they end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import anndata
import numpy as np
import pytest
import scipy.sparse as sp

from scdl_gpu.convert import convert_h5ad
from scdl_gpu.dataset import SingleCellMemMapDataset

CONVERT = """
import sys
from pathlib import Path
import scdl_gpu.convert.archive
from scdl_gpu.convert import convert_h5ad

if __name__ == "__main__":
    scdl_gpu.convert.archive.WORTH_A_PROCESS_BYTES = 0
    convert_h5ad(sorted(Path(sys.argv[1]).glob("*.h5ad")), Path(sys.argv[1]) / "archive", data_dtype="float32")
"""
PATIENCE_SECONDS = 30


def waited_for(happened):
    """Wait until something has happened; tell whether it did."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not (result := happened()) and time.monotonic() < end:
        time.sleep(0.1)
    return result


def workers_of(pid):
    """List the process ids of a process's spawned workers, without multiprocessing's resource tracker, which tidies up after them."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def has_ended(pid):
    """Tell whether a process is gone, or a zombie that nobody has asked after."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.fixture
def killed(tmp_path):
    """Kill a conversion of several files once its workers have begun; gives the directory and the workers' process ids."""
    if (os.cpu_count() or 1) < 2:
        pytest.skip("one core: conversions do not start workers")
    for i in range(3):
        counts = sp.random_array((200, 50), density=0.5, rng=i, format="csr", dtype="float32")
        anndata.AnnData(X=counts).write_h5ad(tmp_path / f"{i}.h5ad")
    script = tmp_path / "job.py"
    script.write_text(CONVERT)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with (tmp_path / "job.log").open("w") as log:
        job = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env=environment, stdout=log, stderr=log)
    assert waited_for(lambda: len(workers_of(job.pid)) >= 2)
    workers = workers_of(job.pid)
    job.kill()
    job.wait()
    yield tmp_path, workers
    for pid in workers:
        if not has_ended(pid):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.exhaustive
def test_conversion_can_be_run_again_when_parent_of_workers_was_killed(killed):
    """Workers that outlive their parent hold no lock: the conversion is run again at once, and is whole."""
    directory, workers = killed

    convert_h5ad(sorted(directory.glob("*.h5ad")), directory / "archive", data_dtype="float32")

    expected = sp.vstack([anndata.read_h5ad(file).X for file in sorted(directory.glob("*.h5ad"))])
    np.testing.assert_array_equal(SingleCellMemMapDataset(directory / "archive").rows(slice(None)).toarray(), expected.toarray())
    assert workers


@pytest.mark.exhaustive
@pytest.mark.xfail(strict=True, reason="workers wait for work for ever when their parent is killed, half a gigabyte each")
def test_workers_end_when_their_parent_is_killed(killed):
    """No worker outlives a parent that was killed."""
    _, workers = killed

    assert waited_for(lambda: all(has_ended(pid) for pid in workers))
