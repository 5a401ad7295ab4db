"""h5ad files to be loaded into collections."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Give a directory for h5ad files."""
    (tmp_path / "sources").mkdir()
    return tmp_path / "sources"


@pytest.fixture
def make(sources: Path) -> Callable[..., Any]:
    """Give `make("folder/name.h5ad", n_rows, genes=...)`, which writes a file of counts with a graph and returns its matrix."""

    def write(name: str, n_rows: int = 5, genes: str = "g", n_vars: int = 6, dtype: str = "float32", graph: bool = True) -> Any:
        random = np.random.default_rng(len(name) + n_rows)
        dense = random.integers(1, 9, (n_rows, n_vars)) * (random.random((n_rows, n_vars)) < 0.5)
        matrix = scipy.sparse.csr_matrix(dense.astype(dtype))
        obs = pd.DataFrame({"batch": pd.Categorical([name] * n_rows), "n": np.arange(n_rows)}, index=[f"{name}-{i}" for i in range(n_rows)])
        var = pd.DataFrame({"symbol": [f"{genes}{i}".upper() for i in range(n_vars)]}, index=[f"{genes}{i}" for i in range(n_vars)])
        adata = anndata.AnnData(matrix, obs=obs, var=var)
        if graph:
            ring = scipy.sparse.csr_matrix((np.ones(n_rows, "float32"), (np.arange(n_rows), (np.arange(n_rows) + 1) % n_rows)))
            adata.obsp["next_cell_ids"] = ring
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        adata.write_h5ad(sources / name)
        return matrix

    return write
