"""Memory does not grow with the source."""

import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse as sp

from scdl_gpu.archive.packed import open_packed
from scdl_gpu.convert import convert_h5ad

PROGRAM = """
import sys
import scdl_gpu.pack.archive, scdl_gpu.pack.raw
from scdl_gpu import bench
from scdl_gpu.convert import convert_h5ad
from scdl_gpu.pack import pack, unpack

what, source, target = sys.argv[1:]
with bench.PeakMemory() as memory:
    if what == "convert":
        convert_h5ad(source, target, packed=True)
    elif what == "pack":
        pack(source, target, group_by="kind", shard_bytes=16 << 20)
    else:
        unpack(source, target)
print(memory.growth_bytes)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Write an h5ad of 60 M elements, 720 MB."""
    import anndata
    import pandas as pd

    n_rows, n_vars, per_row = 60_000, 20_000, 1000
    columns = (np.arange(per_row, dtype=np.int32) * 20 + np.arange(n_rows, dtype=np.int32)[:, None] % 20).ravel()
    values = (np.arange(columns.size) % 7 + 1).astype(np.float64)
    matrix = sp.csr_matrix((values, columns, np.arange(0, columns.size + 1, per_row)), shape=(n_rows, n_vars))
    obs = pd.DataFrame({"kind": pd.Categorical(np.arange(n_rows) % 20)}, index=[f"c{i}" for i in range(n_rows)])
    path = tmp_path_factory.mktemp("memory") / "a.h5ad"
    anndata.AnnData(matrix, obs=obs).write_h5ad(path)
    return path


@pytest.mark.exhaustive
@pytest.mark.parametrize("what", ["convert", "pack", "unpack"])
def test_packing_stays_below_half_a_gigabyte(source, tmp_path, what):
    """Packing from an h5ad or a raw archive, in groups, and unpacking take less than 500 MB beside what the imports take."""
    given = source
    if what != "convert":
        given = convert_h5ad(source, tmp_path / "given", packed=what == "unpack")

    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, what, str(given), str(tmp_path / "a")], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 500 << 20
    if what != "unpack":
        assert open_packed(tmp_path / "a").nnz == 60_000_000
