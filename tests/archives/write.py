"""Write an archive with everything that an archive can hold: `python tests/archives/write.py tests/archives/VERSION`.

Run once for each release, by the release; what it wrote is committed and never changes afterwards.
"""

import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse

from scdl_gpu import convert_h5ad


def parts() -> list[anndata.AnnData]:
    """Make two cells of four genes, and three cells of three other genes."""
    one = scipy.sparse.csr_matrix(np.array([[0, 1, 0, 300], [2, 0, 0, 0]], dtype="float32"))
    obs = pd.DataFrame(
        {
            "batch": pd.Categorical(["late", "early"], categories=["early", "late", "never"], ordered=True),
            "donor": ["d1", None],
            "age": pd.array([34, None], dtype="Int64"),
            "alive": pd.array([True, None], dtype="boolean"),
            "depth": [301.0, np.nan],
        },
        index=["AAA-1", "CCC-1"],
    )
    var = pd.DataFrame({"symbol": ["A1", "B2", "C3", "D4"], "length": [10, 20, 30, 40]}, index=["ENSG1", "ENSG2", "ENSG3", "ENSG4"])
    first = anndata.AnnData(one, obs=obs, var=var)
    two = scipy.sparse.csr_matrix(np.array([[0, 0, 0], [7, 8, 9], [0, 0, 4]], dtype="float32"))
    obs = pd.DataFrame(
        {
            "batch": pd.Categorical(["early"] * 3, categories=["early", "late", "never"], ordered=True),
            "donor": ["d3", "d4", "d3"],
            "age": pd.array([1, 2, 3], dtype="Int64"),
            "alive": pd.array([False, True, True], dtype="boolean"),
            "depth": [0.0, 24.0, 4.0],
        },
        index=["AAA-2", "GGG-2", "TTT-2"],
    )
    second = anndata.AnnData(two, obs=obs, var=pd.DataFrame({"symbol": ["X", "Y", "Z"]}, index=["ENSG7", "ENSG8", "ENSG9"]))
    for adata, graph in ((first, [[0, 0.5], [1, 0]]), (second, [[0, 0, 0.25], [0, 0, 0], [2, 3, 0]])):
        adata.obsp["next_cell_ids"] = scipy.sparse.csr_matrix(np.array(graph, dtype="float32"))
        adata.obsp["exact"] = scipy.sparse.csr_matrix(np.array(graph) / 3)
        adata.obsm["X_pca"] = np.arange(2.0 * adata.n_obs).reshape(-1, 2)
    return [first, second]


if __name__ == "__main__":
    convert_h5ad(parts(), Path(sys.argv[1]), obsm=["X_pca"], obsp=["next_cell_ids", "exact"])
