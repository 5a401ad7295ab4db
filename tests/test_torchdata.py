"""torchdata's StatefulDataLoader around GPUBatchLoader: stopped within an epoch, another goes on with the very batches that were left."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scdl_gpu import GPUBatchLoader, convert_h5ad

N_ROWS, BATCH = 61, 8

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("torchdata") is None, reason="torchdata is not installed; the extra `dev` has it"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),  # torchdata 0.11 calls it
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give an archive of N_ROWS rows."""
    import scipy.sparse

    matrix = scipy.sparse.random(N_ROWS, 20, 0.3, "csr", random_state=0)
    return convert_h5ad(matrix, tmp_path_factory.mktemp("stateful") / "archive")


@pytest.fixture
def stateful(archive: Path) -> Callable[..., Any]:
    """Give what makes a new loader, and torchdata's around it."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    def make(num_workers: int, **options: Any) -> Any:
        loader = GPUBatchLoader(archive, BATCH, device="cpu", seed=3, **options)
        return StatefulDataLoader(loader, batch_size=None, num_workers=num_workers, snapshot_every_n_steps=1)

    return make


def seen(batches: Any) -> list[list[int]]:
    """Give the rows of each batch, and which were padding, as one list."""
    return [batch.rows.tolist() + batch.is_padding.tolist() for batch in batches]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("done", [1, 4, 7])
def test_a_stopped_epoch_goes_on(stateful: Callable[..., Any], num_workers: int, done: int) -> None:
    """A new loader with the state gives exactly the batches that were left, then the whole next epoch."""
    expected = seen(stateful(0).dataset)
    whole = stateful(num_workers)
    first, second = seen(whole), seen(whole)

    stopped = stateful(num_workers)
    batches = iter(stopped)
    before = seen(next(batches) for _ in range(done))
    state = stopped.state_dict()
    resumed = stateful(num_workers)
    resumed.load_state_dict(state)

    assert first == expected
    assert before == first[:done]
    assert seen(resumed) == first[done:]
    assert seen(resumed) == second
