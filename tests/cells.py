"""Cells for the tests of the loader: a small matrix, names and obs columns of every kind around it, and what batches hold.

Needs no anndata, unless `annotated` is called: a machine with a GPU often lacks it.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

if TYPE_CHECKING:
    import anndata as ad

N_ROWS, N_VARS = 103, 40


def matrix(dtype: str = "float32", n_rows: int = N_ROWS, seed: int = 0) -> sp.csr_matrix:
    """Make counts with empty rows among them."""
    random = np.random.default_rng(seed)
    dense = random.integers(1, 200, (n_rows, N_VARS)) * (random.random((n_rows, N_VARS)) < 0.3)
    dense[::17] = 0
    return sp.csr_matrix(dense.astype(dtype))


def backwards(x: sp.csr_matrix) -> sp.csr_matrix:
    """Turn the columns of each row round."""
    order = np.concatenate([np.arange(stop - 1, start - 1, -1) for start, stop in zip(x.indptr[:-1], x.indptr[1:], strict=True)])
    return sp.csr_matrix((x.data[order], x.indices[order], x.indptr), x.shape)


def obs_of(n: int, seed: int = 0) -> pd.DataFrame:
    """Make names and obs columns of every kind for n rows."""
    random = np.random.default_rng(seed)
    columns = {
        "line": pd.Categorical(random.choice(["b", "a", "c"], n), categories=["c", "b", "a", "unused"]),
        "well": [None if i % 10 == 3 else f"w{i % 4}" for i in range(n)],
        "good": random.random(n) < 0.5,
        "depth": random.random(n).astype(np.float32),
        "count": pd.array([pd.NA if i % 7 == 0 else i for i in range(n)], dtype="Int64"),
        "plate": random.integers(0, 5, n).astype(np.int16),
    }
    return pd.DataFrame(columns, index=[f"cell{seed}_{i}" for i in range(n)])


def genes(n: int) -> list[str]:
    """Name n genes."""
    return [f"g{i}" for i in range(n)]


def annotated(x: Any, seed: int = 0) -> "ad.AnnData":
    """Put names and obs columns of every kind around a matrix."""
    import anndata as ad

    return ad.AnnData(x, obs=obs_of(x.shape[0], seed), var=pd.DataFrame(index=genes(x.shape[1])))


def write(path: Path, x: sp.csr_matrix, *, data_dtype: str = "float32", seed: int = 0, canonical: bool = True) -> Path:
    """Write an archive of `annotated(x, seed)` without a conversion: arrays as they are, in the narrowest dtypes of pointers and columns.

    canonical: what the archive says of its rows.
    """
    from scdl_gpu.archive.features import ObservedFeatureIndex, VariableFeatureIndex
    from scdl_gpu.archive.writer import ArrayWriter, finish

    path.mkdir()
    widths = {"row_ptr.npy": np.min_scalar_type(x.nnz), "col_ptr.npy": np.min_scalar_type(max(0, x.shape[1] - 1)), "data.npy": data_dtype}
    for (name, dtype), array in zip(widths.items(), (x.indptr, x.indices, x.data), strict=True):
        with ArrayWriter(path / name, dtype) as writer:
            writer.append(array.astype(dtype))
    table = obs_of(x.shape[0], seed)
    var, obs = VariableFeatureIndex(), ObservedFeatureIndex()
    var.append_features(x.shape[0], {"symbol": np.array(genes(x.shape[1]))}, names=genes(x.shape[1]))
    obs.append_features({name: table[name] for name in table.columns}, names=list(table.index))
    finish(path, dtypes={name: np.dtype(dtype).name for name, dtype in widths.items()}, var=var, obs=obs, canonical=canonical)
    return path


def rows_of(batches: Any) -> list[int]:
    """Return all rows that are not padding, in the order of the batches."""
    return [row for batch in batches for row, padded in zip(batch.rows.tolist(), batch.is_padding.tolist(), strict=True) if not padded]


def dense(x: torch.Tensor) -> np.ndarray:
    """Return a batch's values as a dense array on the host, after a check of torch's sparse invariants."""
    x = x.cpu()
    if x.layout == torch.sparse_csr:
        torch.sparse_csr_tensor(x.crow_indices(), x.col_indices(), x.values(), x.shape, check_invariants=True)
        return x.to_dense().numpy()
    return x.numpy()
