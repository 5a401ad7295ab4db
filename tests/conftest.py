"""Data that tests of several folders share: the real h5ad files, and random ones made on the spot.

Real files come from $SCDL_TEST_DATA, or from shared/data beside the repository. A test that takes `real_data` is skipped where they are
absent; a test that takes `real_file` runs once for each of them, and on generated stand-ins where they are absent.
"""

import os
from collections.abc import Callable
from pathlib import Path

import hypothesis
import numpy as np
import pytest

REAL_DATA = Path(os.environ.get("SCDL_TEST_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
REAL_FILES = sorted(REAL_DATA.rglob("*.h5ad"))
STAND_INS = {
    "generated_csr_float32": {"dtype": "float32"},
    "generated_csr_int64": {"dtype": "int64"},
    "generated_csc_uint16": {"dtype": "uint16", "layout": "csc"},
    "generated_dense_float64": {"dtype": "float64", "layout": "dense"},
}

# The same examples in every run, and no deadlines: a slow machine is no fault of the code.
hypothesis.settings.register_profile("house", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("house")


def pytest_report_header() -> str:
    """Say in the head of a run which data it uses."""
    if REAL_FILES:
        return f"real data: {len(REAL_FILES)} h5ad files in {REAL_DATA}"
    return f"real data: none in {REAL_DATA}; generated files instead, tests of single real files are skipped (set SCDL_TEST_DATA)"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that takes `real_file` once for each file."""
    if "real_file" in metafunc.fixturenames:
        params = REAL_FILES or list(STAND_INS)
        metafunc.parametrize("real_file", params, indirect=True, ids=[Path(p).stem for p in params])


def write_h5ad(
    path: Path,
    n_rows: int = 60,
    n_vars: int = 40,
    *,
    density: float = 0.2,
    dtype: str = "float32",
    layout: str = "csr",
    seed: int = 0,
    raw: bool = False,
    compression: str | None = None,
) -> Path:
    """Write an h5ad with counts 1 to 9 at random places, obs columns `batch` (categorical) and `depth`, and a var column `symbol`.

    layout: csr, csc or dense. raw: also raw.X, with two more vars than X and other counts.
    """
    import anndata
    import pandas
    import scipy.sparse

    random = np.random.default_rng(seed)

    def counts(width: int) -> scipy.sparse.csr_matrix:
        dense = random.integers(1, 10, size=(n_rows, width)) * (random.random((n_rows, width)) < density)
        return scipy.sparse.csr_matrix(dense.astype(dtype))

    def var(width: int) -> pandas.DataFrame:
        names = [f"gene_{i}" for i in range(width)]
        return pandas.DataFrame({"symbol": [name.upper() for name in names]}, index=names)

    obs = pandas.DataFrame(
        {"batch": pandas.Categorical([f"batch_{i % 3}" for i in range(n_rows)]), "depth": random.random(n_rows)},
        index=[f"cell_{i}" for i in range(n_rows)],
    )
    x = counts(n_vars)
    x = {"csr": x, "csc": x.tocsc(), "dense": x.toarray()}[layout]
    adata = anndata.AnnData(X=x, obs=obs, var=var(n_vars))
    if raw:
        adata.raw = anndata.AnnData(X=counts(n_vars + 2), obs=obs, var=var(n_vars + 2))
    adata.write_h5ad(path, compression=compression)
    return path


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Give the folder of the real files, or skip."""
    if not REAL_FILES:
        pytest.skip(f"needs the real h5ad files: none in {REAL_DATA}; set SCDL_TEST_DATA")
    return REAL_DATA


@pytest.fixture(scope="session")
def real_files() -> list[Path]:
    """Give the real files, an empty list where there are none."""
    return REAL_FILES


@pytest.fixture(scope="session")
def real_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give one real file, or one generated stand-in."""
    if isinstance(request.param, Path):
        return request.param
    return write_h5ad(tmp_path_factory.mktemp("stand_in") / f"{request.param}.h5ad", **STAND_INS[request.param])


@pytest.fixture
def make_h5ad(tmp_path: Path) -> Callable[..., Path]:
    """Give the function that writes a random h5ad: `make_h5ad("a.h5ad", n_rows, n_vars, ...)`, arguments as `write_h5ad` above."""

    def make(name: str = "made.h5ad", *args: int, **options: object) -> Path:
        return write_h5ad(tmp_path / name, *args, **options)

    return make
