"""Cells for the tests of the loader: a small matrix, names and obs columns of every kind around it, and what batches hold."""

from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

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


def annotated(x: Any, seed: int = 0) -> ad.AnnData:
    """Put names and obs columns of every kind around a matrix."""
    n = x.shape[0]
    random = np.random.default_rng(seed)
    obs = pd.DataFrame(
        {
            "line": pd.Categorical(random.choice(["b", "a", "c"], n), categories=["c", "b", "a", "unused"]),
            "well": [None if i % 10 == 3 else f"w{i % 4}" for i in range(n)],
            "good": random.random(n) < 0.5,
            "depth": random.random(n).astype(np.float32),
            "count": pd.array([pd.NA if i % 7 == 0 else i for i in range(n)], dtype="Int64"),
            "plate": random.integers(0, 5, n).astype(np.int16),
        },
        index=[f"cell{seed}_{i}" for i in range(n)],
    )
    return ad.AnnData(x, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(x.shape[1])]))


def rows_of(batches: Any) -> list[int]:
    """Return all rows that are not padding, in the order of the batches."""
    return [row for batch in batches for row, padded in zip(batch.rows.tolist(), batch.is_padding.tolist(), strict=True) if not padded]


def dense(x: torch.Tensor) -> np.ndarray:
    """Return a batch's values as a dense array, after a check of torch's sparse invariants."""
    if x.layout == torch.sparse_csr:
        torch.sparse_csr_tensor(x.crow_indices(), x.col_indices(), x.values(), x.shape, check_invariants=True)
        return x.to_dense().numpy()
    return x.numpy()
