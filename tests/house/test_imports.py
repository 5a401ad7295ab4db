"""`import scdl_gpu` is light and does nothing."""

import json
import subprocess
import sys
from pathlib import Path

HEAVY = {"anndata", "cupy", "cupyx", "dask", "distributed", "h5py", "isal", "kvikio", "lightning", "llvmlite", "numba", "pandas", "pyarrow"}
PROBE = """
import json, sys, threading, warnings, logging
import torch
before, threads = set(sys.modules), threading.active_count()
warnings.simplefilter("error")
import scdl_gpu
print(json.dumps({
    "added": sorted(set(sys.modules) - before),
    "threads": threading.active_count() - threads,
    "handlers": len(logging.getLogger("scdl_gpu").handlers),
}))
"""


def test_import_is_light(tmp_path: Path) -> None:
    """Beyond torch, the import of the front door loads no heavy library, starts no thread, prints nothing and writes no file."""
    run = subprocess.run([sys.executable, "-B", "-c", PROBE], cwd=tmp_path, capture_output=True, text=True, check=True)
    printed = run.stdout.splitlines()
    seen = json.loads(printed[-1])

    loaded = {name.split(".")[0] for name in seen["added"]}

    assert "scdl_gpu" in loaded
    assert not loaded & HEAVY
    assert (seen["threads"], seen["handlers"]) == (0, 0)
    assert len(printed) == 1
    assert list(tmp_path.iterdir()) == []
