"""`scdl-gpu info`: what is told is what is there, for archives of this package and of bionemo-scdl."""

import json
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse
from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset as Reference

from scdl_gpu.convert import convert_h5ad


def described(tmp_path: Path) -> Path:
    """Make an archive with a column of every kind, neighbours, obsm and obsp."""
    adata = anndata.AnnData(scipy.sparse.csr_matrix([[0, 2, 0], [300, 0, 0]], dtype="float32"))
    adata.obs = pd.DataFrame(
        {
            "batch": pd.Categorical(["x", "y"], categories=["y", "x", "z"]),
            "grade": pd.Categorical(["lo", "hi"], categories=["lo", "hi"], ordered=True),
            "depth": [0.5, np.nan],
            "count": pd.array([1, None], dtype="Int32"),
            "good": [True, False],
            "note": ["a", "b"],
        },
        index=["c1", "c2"],
    )
    adata.obsm["X_pca"] = np.zeros((2, 4), "float32")
    adata.obsp["near"] = scipy.sparse.csr_matrix([[0, 0.5], [0, 0]])
    adata.obsp["far"] = scipy.sparse.csr_matrix([[0, 1.0], [2.0, 0]])
    return convert_h5ad(adata, tmp_path / "archive", obsm=["X_pca"], obsp=["near", "far"])


def test_json_holds_the_facts(shell: Callable, tmp_path: Path) -> None:
    """Every figure is the one that follows from the matrix by hand."""
    archive = described(tmp_path)

    done = shell("scdl-gpu", "info", archive, "--json")
    found = json.loads(done.stdout)

    assert (done.returncode, done.stderr) == (0, "")
    assert (found["cells"], found["genes"], found["blocks"]) == (2, [3], [{"cells": 2, "genes": 3, "source": None}])
    assert (found["nonzeros"], found["sparsity"]) == (2, 1 - 2 / 6)
    assert found["dtypes"] == {"data": "uint16", "indices": "uint8", "indptr": "uint8"}
    assert (found["array_bytes"], found["bytes_per_nonzero"]) == (2 * 2 + 2 + 3, 4.5)
    assert found["size_bytes"] == sum(file.stat().st_size for file in archive.rglob("*") if file.is_file())
    assert found["obs"] == {
        "batch": "categorical of 3",
        "grade": "ordered categorical of 2",
        "depth": "float64",
        "count": "nullable int32",
        "good": "bool",
        "note": "string",
    }
    assert found["var"] == {"var_feature_id": "string"}
    assert (found["obs_names"], found["var_names"], found["canonical"]) == (True, True, True)
    assert found["neighbors"] == {"key": "near", "connections": 1}
    assert found["obsm"] == {"X_pca": {"shape": [2, 4], "dtype": "float32"}}
    assert found["obsp"] == {"far": {"connections": 2, "dtype": "float64"}}
    assert (found["matrix"], found["generation"], found["schema_version"]) == ("X", "D", "0.1.0")


def test_text_holds_the_facts(run: Callable, tmp_path: Path) -> None:
    """The same for people: a name and a fact a line, the names in a column."""
    result = run("info", described(tmp_path))

    lines = {line[:11].strip(): line[13:] for line in result.stdout.splitlines() if line[:11].strip()}
    assert result.exit_code == 0
    assert lines["cells"] == "2"
    assert lines["genes"] == "3"
    assert lines["nonzeros"] == "2 (sparsity 0.6667)"
    assert lines["dtypes"] == "values uint16, columns uint8, row pointers uint8"
    assert lines["rows"] == "canonical"
    assert lines["names"] == "cells and genes"
    assert lines["neighbours"] == "1 connections (near)"
    assert lines["obsm"] == "X_pca (2 x 4 float32)"
    assert lines["obs columns"] == "batch: categorical of 3"
    assert "             note: string\n" in result.stdout


def test_archives_of_bionemo_scdl_are_described(run: Callable, make_h5ad: Callable[..., Path], tmp_path: Path) -> None:
    """Its tables hold plain values, its rows are not marked, its names are lost: that is what is told."""
    Reference(str(tmp_path / "a"), h5ad_path=str(make_h5ad("a.h5ad", 6, 4)), use_X_not_raw=True)

    found = json.loads(run("info", tmp_path / "a", "--json").stdout)

    assert found["obs"] == {"batch": "string", "depth": "float64"}
    assert found["var"] == {"symbol": "string"}
    assert (found["obs_names"], found["var_names"], found["canonical"]) == (False, False, None)
    assert (found["generation"], found["written_by"], found["matrix"], found["neighbors"]) == ("C", "0.1.3", None, None)
    assert found["dtypes"]["data"] == "float32"


def test_blocks_of_different_genes_are_listed(run: Callable, make_h5ad: Callable[..., Path], tmp_path: Path) -> None:
    """Of a ragged archive each block is told, with its cells and genes, and columns that only some blocks have."""
    wider = anndata.read_h5ad(make_h5ad("b.h5ad", 3, 5))
    wider.obs["extra"] = [1, 2, 3]
    convert_h5ad([make_h5ad("a.h5ad", 6, 4), wider], tmp_path / "a")

    found = json.loads(run("info", tmp_path / "a", "--json").stdout)
    text = run("info", tmp_path / "a").stdout

    first = str(tmp_path / "a.h5ad")
    assert found["blocks"] == [{"cells": 6, "genes": 4, "source": first}, {"cells": 3, "genes": 5, "source": None}]
    assert found["obs"] == {"batch": "categorical", "depth": "float64", "extra": "int64"}
    assert f"4 for 6 cells from {first}\n" in text
    assert "extra: int64 (in 1 of 2 blocks)\n" in text
    assert "5 for 3 cells\n" in text


def test_empty_archives_are_described(run: Callable, tmp_path: Path) -> None:
    """No rows or no values: no figure is divided by zero."""
    convert_h5ad(scipy.sparse.csr_matrix((0, 3)), tmp_path / "rows")
    convert_h5ad(scipy.sparse.csr_matrix((3, 0)), tmp_path / "vars")
    convert_h5ad(scipy.sparse.csr_matrix((3, 4)), tmp_path / "values")

    results = [run("info", tmp_path / name) for name in ("rows", "vars", "values")]
    found = [json.loads(run("info", tmp_path / name, "--json").stdout) for name in ("rows", "vars", "values")]

    assert [result.exit_code for result in results] == [0, 0, 0]
    assert [one["cells"] for one in found] == [0, 3, 3]
    assert [one["sparsity"] for one in found] == [None, None, 1.0]
    assert [one["bytes_per_nonzero"] for one in found] == [None, None, None]


def test_many_blocks_are_summed_up(run: Callable, make_h5ad: Callable[..., Path], tmp_path: Path) -> None:
    """The first few are listed, the others counted; JSON has them all."""
    convert_h5ad([make_h5ad(f"{n}.h5ad", 2, n) for n in range(3, 11)], tmp_path / "a")

    lines = run("info", tmp_path / "a").stdout.splitlines()
    found = json.loads(run("info", tmp_path / "a", "--json").stdout)

    start = next(k for k, line in enumerate(lines) if line.startswith("genes"))
    assert lines[start].endswith("8 blocks of different genes:")
    assert [line.strip() for line in lines[start + 1 : start + 7]] == [
        *(f"{n} for 2 cells from {tmp_path / f'{n}.h5ad'}" for n in range(3, 8)),
        "... and 3 more",
    ]
    assert len(found["blocks"]) == 8


def test_the_size_tells_all_from_arrays(run: Callable, tmp_path: Path) -> None:
    """The archive in all, and the three arrays that the bytes per nonzero are about."""
    archive = described(tmp_path)
    total = sum(file.stat().st_size for file in archive.rglob("*") if file.is_file())

    line = next(line for line in run("info", archive).stdout.splitlines() if line.startswith("size"))

    assert line.endswith(f"{total / 1000:.3g} kB in all, 9 bytes in the arrays of the rows: 4.50 bytes per nonzero")


def test_joined_archives_say_what_they_are_made_of(run: Callable, make_h5ad: Callable[..., Path], tmp_path: Path) -> None:
    """Sources follow each other; of more than a hundred the number is kept; where the matrix is not known, that is said apart."""
    first = convert_h5ad(make_h5ad("a.h5ad"), tmp_path / "first")
    second = convert_h5ad([make_h5ad("b.h5ad", seed=1), make_h5ad("c.h5ad", seed=2)], tmp_path / "second")
    run("concat", first, second, tmp_path / "both")
    run("concat", *[tmp_path / "both"] * 40, tmp_path / "many")
    run("concat", first, tmp_path / "many", tmp_path / "more")
    document = json.loads((tmp_path / "both" / "metadata.json").read_text())
    del document["x"]
    (tmp_path / "both" / "metadata.json").write_text(json.dumps(document))

    texts = [run("info", tmp_path / name).stdout for name in ("both", "many")]

    assert document["source"] == [str(tmp_path / f"{name}.h5ad") for name in "abc"]
    assert json.loads((tmp_path / "more" / "metadata.json").read_text())["source"] == 121
    assert f"not recorded; made of {tmp_path / 'a.h5ad'} and 2 more\n" in texts[0]
    assert "X of 120 sources\n" in texts[1]
