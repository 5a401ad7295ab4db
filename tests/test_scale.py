"""A list of archives of a billion rows costs what one archive costs: counted in calls and bytes, never in time."""

import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scdl_gpu import GPUBatchLoader, convert_h5ad

N_ROWS, N_VARS, BILLION = 400, 30, 10**9
BYTES_LISTED = 12
"""What a place in the list may take: the row it ends at, and which part stands there."""
KINDS = ["raw", "packed"]


@pytest.fixture(scope="module")
def matrix() -> sp.csr_matrix:
    """Make rows of 10 nonzeros each, so that all batches are of one size."""
    random = np.random.default_rng(0)
    columns = np.concatenate([np.sort(random.choice(N_VARS, 10, replace=False)) for _ in range(N_ROWS)])
    return sp.csr_matrix((random.integers(1, 9, columns.size).astype(np.float32), columns, np.arange(N_ROWS + 1) * 10), (N_ROWS, N_VARS))


@pytest.fixture(scope="module")
def archives(matrix: sp.csr_matrix, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Give the rows raw and packed, with their number as obs column `number`, and a category `kind`."""
    folder = tmp_path_factory.mktemp("scale")
    kinds = pd.Categorical.from_codes(np.arange(N_ROWS) % 3, ["a", "b", "c"])
    adata = anndata.AnnData(matrix, obs=pd.DataFrame({"number": np.arange(N_ROWS), "kind": kinds}, index=[f"c{i}" for i in range(N_ROWS)]))
    return {kind: convert_h5ad(adata, folder / kind, packed=kind == "packed") for kind in KINDS}


def calls_of(do: Callable[[], Any]) -> int:
    """Count the calls that Python makes meanwhile, of functions in Python and C, in this thread."""
    n_calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal n_calls
        n_calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        do()
    finally:
        sys.setprofile(None)
    return n_calls


def bytes_of(do: Callable[[], Any]) -> tuple[int, int]:
    """Measure the bytes that are held afterwards, and the most that were held meanwhile; of Python and NumPy."""
    tracemalloc.start()
    try:
        kept = do()
        held, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    del kept
    return held, most


@pytest.mark.parametrize("kind", KINDS)
def test_opening_makes_as_many_calls_however_long_the_list(archives: dict[str, Path], kind: str) -> None:
    """A list of a hundred thousand places is opened by as many calls as one of ten: nothing is done place by place."""
    lists = [[archives[kind]] * times for times in (10, 10, 100_000)]

    _, few, many = (calls_of(lambda sources=sources: GPUBatchLoader(sources, device="cpu", obs=["kind"])) for sources in lists)

    assert abs(many - few) < 50  # caches of the interpreter and of Numba


@pytest.mark.parametrize("kind", KINDS)
def test_a_place_in_the_list_takes_twelve_bytes(archives: dict[str, Path], kind: str) -> None:
    """What a loader holds grows by 12 bytes a place, obs columns included: 0.03 bytes a row here, 10^-5 of shards of a million."""
    lists = [[archives[kind]] * times for times in (10, 10, 200_010)]

    _, few, many = (bytes_of(lambda sources=sources: GPUBatchLoader(sources, device="cpu", obs=["kind", "number"]))[0] for sources in lists)

    assert (many - few) / 200_000 < BYTES_LISTED * 1.01


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_a_long_list_takes_no_more(archives: dict[str, Path], kind: str) -> None:
    """Calls and memory that order and locate a batch are those of a short list: nothing is made for all places, or all rows."""
    loaders = [GPUBatchLoader([archives[kind]] * times, 20_000, device="cpu", obs=["kind"]) for times in (200, 1_000_000)]

    def one(loader: GPUBatchLoader) -> Any:
        """Order, locate and describe a batch; what is gathered differs from batch to batch in size, and goes into buffers that stay."""
        rows, _ = loader._order.batch(0, 0)
        return loader._shards.extents(rows), loader._obs.of(rows)

    for loader in loaders:
        one(loader)  # Numba compiles
    few, many = (calls_of(lambda: one(loader)) for loader in loaders)  # noqa: B023
    few_bytes, many_bytes = (bytes_of(lambda: one(loader))[1] for loader in loaders)  # noqa: B023

    assert few == many
    assert abs(many_bytes - few_bytes) < 100_000  # an array of a byte for each place would be 1,000,000


def test_rows_of_a_billion_are_the_rows_of_the_archives(archives: dict[str, Path], matrix: sp.csr_matrix) -> None:
    """The first, the last and any rows of a list of raw and packed archives in turn come with their values and obs columns."""
    sources = [archives[kind] for kind in KINDS] * (BILLION // N_ROWS // 2)
    rows = np.concatenate([[0, N_ROWS - 1, N_ROWS, BILLION - 1], np.random.default_rng(0).integers(0, BILLION, 60)])

    loader = GPUBatchLoader(sources, batch_sampler=[rows.tolist()], device="cpu", output="dense", obs=["number", "kind"])
    (batch,) = loader

    assert loader.shape == (BILLION, N_VARS)
    np.testing.assert_array_equal(batch.x.numpy(), matrix[rows % N_ROWS].toarray())
    assert batch.obs["number"].tolist() == (rows % N_ROWS).tolist()
    assert batch.obs["kind"].tolist() == (rows % N_ROWS % 3).tolist()


@pytest.mark.exhaustive
def test_an_epoch_of_a_billion_rows_begins_and_ends_as_any_other(archives: dict[str, Path]) -> None:
    """A shuffled epoch starts at once, ranks have rows of their own, and the last batch is marked where it wraps around."""
    sources = [archives["packed"]] * (BILLION // N_ROWS)
    ranks = [GPUBatchLoader(sources, 48, device="cpu", rank=rank, world_size=2) for rank in range(2)]
    state = ranks[0].state_dict() | {"position": BILLION - 10}
    firsts = [next(iter(loader)).rows.tolist() for loader in ranks]
    for loader in ranks:
        loader.load_state_dict(state)

    (lasts,) = zip(*ranks, strict=True)

    assert len({row for rows in firsts for row in rows}) == 96
    assert max(row for rows in firsts for row in rows) > BILLION // 2
    assert [len(loader) for loader in ranks] == [-(-BILLION // 96)] * 2
    assert sum(int((~batch.is_padding).sum()) for batch in lasts) == 10
    assert {len(batch) for batch in lasts} == {48}
