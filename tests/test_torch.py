"""The dataset inside torch's DataLoader: no workers, forked ones, spawned ones, Subset; expected batches come from SciPy."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, RandomSampler, Subset, random_split

from scdl_gpu import SingleCellMemMapDataset, convert_h5ad
from scdl_gpu.backend import SPLIT_ELEMENTS
from scdl_gpu.collate import Rows, collate_neighbor_sparse_matrix_batch, collate_sparse_matrix_batch

N_ROWS, N_VARS = 37, 20
WORKERS = [(0, None), (2, "fork"), (2, "spawn")]
QUICK = WORKERS[:2]
"""A spawned worker imports torch anew, for seconds: tests of what spawning cannot change go without."""

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture(scope="module")
def matrix() -> scipy.sparse.csr_matrix:
    """Give counts 1 to 9, rows of which differ."""
    random = np.random.default_rng(0)
    dense = random.integers(1, 10, (N_ROWS, N_VARS)) * (random.random((N_ROWS, N_VARS)) < 0.5)
    dense[:, 0] = np.arange(1, N_ROWS + 1)
    return scipy.sparse.csr_matrix(dense.astype(np.float32))


@pytest.fixture(scope="module")
def ds(matrix: scipy.sparse.csr_matrix, tmp_path_factory: pytest.TempPathFactory) -> SingleCellMemMapDataset:
    """Give an archive of `matrix`; the first gene numbers the rows from 1."""
    return SingleCellMemMapDataset(convert_h5ad(matrix, tmp_path_factory.mktemp("torch") / "archive", data_dtype="float32"))


def loader(dataset: Dataset[Any], workers: tuple[int, str | None] = (0, None), **options: Any) -> DataLoader[Any]:
    """Make a loader with the collate function of this package."""
    given = {"batch_size": 8, "collate_fn": collate_sparse_matrix_batch, "num_workers": workers[0], "multiprocessing_context": workers[1]}
    return DataLoader(dataset, **(given | options))


def stacked(batches: Any) -> list[list[float]]:
    """List the rows of all batches, after torch has checked each."""
    found = []
    for batch in batches:
        parts = batch.crow_indices(), batch.col_indices(), batch.values()
        torch.sparse_csr_tensor(*parts, size=batch.shape, check_invariants=True)
        found += batch.to_dense().tolist()
    return found


@pytest.mark.parametrize("workers", WORKERS, ids=str)
def test_an_epoch_in_order(ds: SingleCellMemMapDataset, matrix: scipy.sparse.csr_matrix, workers: tuple[int, str | None]) -> None:
    """Every row once, in order, with the default sampler; the last batch is what is left."""
    batches = list(loader(ds, workers))

    assert [tuple(batch.shape) for batch in batches] == [(8, N_VARS)] * 4 + [(5, N_VARS)]
    assert stacked(batches) == matrix.toarray().tolist()


@pytest.mark.parametrize("workers", QUICK, ids=str)
def test_a_shuffled_epoch(ds: SingleCellMemMapDataset, matrix: scipy.sparse.csr_matrix, workers: tuple[int, str | None]) -> None:
    """Every row once, in the order that torch's sampler draws, epoch after epoch with the same workers."""
    generator = torch.Generator().manual_seed(1)
    batches = loader(ds, workers, shuffle=True, generator=generator, persistent_workers=workers[0] > 0)

    epochs = [stacked(batches) for _ in range(2)]

    assert epochs[0] != epochs[1]
    assert all(sorted(rows) == sorted(matrix.toarray().tolist()) for rows in epochs)


def test_sampler_and_batch_sampler(ds: SingleCellMemMapDataset, matrix: scipy.sparse.csr_matrix) -> None:
    """A sampler with replacement, and batches of unequal length."""
    sampled = list(loader(ds, sampler=RandomSampler(ds, replacement=True, num_samples=100)))
    batched = list(DataLoader(ds, batch_sampler=[[3], [5, 3, -1]], collate_fn=collate_sparse_matrix_batch))

    assert [len(batch) for batch in sampled] == [8] * 12 + [4]
    assert stacked(batched) == matrix.toarray()[[3, 5, 3, -1]].tolist()


@pytest.mark.parametrize("workers", QUICK, ids=str)
@pytest.mark.parametrize("indices", [[5, 2, 30, 2], np.array([5, 2, 30, 2]), torch.tensor([5, 2, 30, 2])], ids=["list", "numpy", "torch"])
def test_a_subset(ds: SingleCellMemMapDataset, matrix: scipy.sparse.csr_matrix, indices: Any, workers: tuple[int, str | None]) -> None:
    """Rows are gathered at once inside a Subset too, whatever holds its indices."""
    subset: Subset[Any] = Subset(ds, indices)

    assert isinstance(subset.__getitems__([1, 0]), Rows)
    assert stacked(loader(subset, workers, batch_size=3)) == matrix.toarray()[[5, 2, 30, 2]].tolist()


def test_nested_subsets_and_splits(ds: SingleCellMemMapDataset, matrix: scipy.sparse.csr_matrix) -> None:
    """A subset of a subset, and a random split into two that are complete together."""
    nested: Subset[Any] = Subset(Subset(ds, range(10, 20)), [3, 1])
    split = random_split(ds, [0.5, 0.5], generator=torch.Generator().manual_seed(0))

    assert stacked(loader(nested)) == matrix.toarray()[[13, 11]].tolist()
    assert sorted(row for part in split for row in stacked(loader(part))) == sorted(matrix.toarray().tolist())


def test_concatenated_datasets(ds: SingleCellMemMapDataset, matrix: scipy.sparse.csr_matrix) -> None:
    """The ConcatDataset of torch takes rows one by one."""
    both: ConcatDataset[Any] = ConcatDataset([ds, ds])

    rows = stacked(loader(both, batch_size=N_ROWS))

    assert rows == matrix.toarray().tolist() * 2


@pytest.mark.parametrize("workers", QUICK, ids=str)
def test_the_default_collate(ds: SingleCellMemMapDataset, workers: tuple[int, str | None]) -> None:
    """With batches of one row it gives (1, 2, nnz), as with bionemo-scdl."""
    batches = list(DataLoader(ds, batch_size=1, num_workers=workers[0], multiprocessing_context=workers[1]))

    assert [batch.tolist() for batch in batches] == [[ds[row].tolist()] for row in range(N_ROWS)]


def first_values(rows: Any) -> list[float]:
    """Collate by looking at every row."""
    return [float(row[0][0]) for row in rows]


def unchanged(rows: Any) -> Any:
    """Collate nothing."""
    return rows


@pytest.mark.parametrize("workers", WORKERS, ids=str)
def test_other_collate_functions(ds: SingleCellMemMapDataset, workers: tuple[int, str | None]) -> None:
    """They index rows, or hand them on: from a worker too, and what arrives can be collated here."""
    handed_on = list(loader(ds, workers, collate_fn=unchanged))
    indexed = list(loader(ds, QUICK[workers[0] > 0], collate_fn=first_values))

    assert [value for batch in indexed for value in batch] == list(range(1, N_ROWS + 1))
    assert [row.tolist() for row in handed_on[4]] == [ds[row].tolist() for row in range(32, 37)]
    assert stacked(map(collate_sparse_matrix_batch, handed_on))[-1][0] == N_ROWS


def test_no_batches_at_all(ds: SingleCellMemMapDataset) -> None:
    """Without automatic batching single rows come, as from the dataset."""
    rows = list(DataLoader(ds, batch_size=None))

    assert [row.tolist() for row in rows] == [ds[row].tolist() for row in range(N_ROWS)]


def test_workers_after_threads(tmp_path: Path) -> None:
    """A process whose batches were split over threads can fork: a worker has none of its parent's threads."""
    matrix = scipy.sparse.csr_matrix(np.arange(1, 1 + 100 * 2000, dtype=np.float32).reshape(100, 2000))
    dataset = SingleCellMemMapDataset(convert_h5ad(matrix, tmp_path / "archive", data_dtype="float32"))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        large = collate_sparse_matrix_batch(dataset.__getitems__(list(range(100))))
        found = stacked(loader(dataset, (2, "fork"), batch_size=50, timeout=120))
    finally:
        torch.set_num_threads(before)

    assert 2 * SPLIT_ELEMENTS <= 100 * 2000
    assert large.to_dense().tolist() == found == matrix.toarray().tolist()


def test_what_a_spawned_worker_receives_is_small(tmp_path: Path) -> None:
    """A path, options and what tells the archive: the pickle does not grow with the rows (a number may take a byte more)."""
    sizes = []
    for n_rows in (10, 20_000):
        matrix = scipy.sparse.csr_matrix(np.ones((n_rows, 50), np.float32))
        dataset = SingleCellMemMapDataset(convert_h5ad(matrix, tmp_path / f"{n_rows:05d}", data_dtype="float32"))
        dataset.__getitems__([0, 1])
        dataset.obs_features().column("obs_feature_id")
        sizes.append(len(pickle.dumps(dataset)))

    assert max(sizes) < 1000
    assert max(sizes) - min(sizes) < 16


class Pairs(Dataset[dict[str, Any]]):
    """Rows with a neighbour, as bionemo-scdl's users wrap them."""

    def __init__(self, dataset: SingleCellMemMapDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Return a row and its neighbour."""
        return self.dataset.get_row_with_neighbor(row)


@pytest.fixture
def pairs(matrix: scipy.sparse.csr_matrix, tmp_path: Path) -> Pairs:
    """Give the rows of `matrix` with their successors as neighbours."""
    import anndata

    ring = scipy.sparse.csr_matrix(np.roll(np.eye(N_ROWS), 1, axis=1))
    path = convert_h5ad(anndata.AnnData(X=matrix, obsp={"ring": ring}), tmp_path / "pairs", data_dtype="float32", obsp=("ring",))
    return Pairs(SingleCellMemMapDataset(path, load_neighbors=True))


@pytest.mark.parametrize(("workers", "collated"), [*((workers, True) for workers in QUICK), ((2, "spawn"), False)], ids=str)
def test_pairs_of_neighbours(pairs: Pairs, matrix: scipy.sparse.csr_matrix, workers: tuple[int, str | None], collated: bool) -> None:
    """Rows and their neighbours arrive side by side, collated in the worker or here."""
    batches = list(loader(pairs, workers, collate_fn=collate_neighbor_sparse_matrix_batch if collated else unchanged))

    found = batches if collated else [collate_neighbor_sparse_matrix_batch(batch) for batch in batches]
    assert stacked(batch["current_cells"] for batch in found) == matrix.toarray().tolist()
    assert stacked(batch["next_cells"] for batch in found) == np.roll(matrix.toarray(), -1, axis=0).tolist()
    assert [int(row) for batch in found for row in batch["next_cell_indices"]] == [*range(1, N_ROWS), 0]


@pytest.mark.parametrize("workers", QUICK, ids=str)
def test_an_error_in_a_worker_says_what_was_wrong(ds: SingleCellMemMapDataset, workers: tuple[int, str | None]) -> None:
    """The row and the archive are named in the process that waits for the batch."""
    batches = DataLoader(ds, batch_sampler=[[99]], collate_fn=unchanged, num_workers=workers[0], multiprocessing_context=workers[1])

    with pytest.raises(IndexError, match=r"row 99 is out of range for .*archive, which has 37 rows"):
        list(batches)
