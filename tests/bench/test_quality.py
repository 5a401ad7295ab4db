"""What is said of batches: whether their rows are true, and how well they are shuffled."""

import base64

import numpy as np
import pytest
import scipy.sparse as sp

from scdl_gpu.bench import quality, serve
from scdl_gpu.bench.quality import Table


def coded(numbers: np.ndarray) -> str:
    """Code fingerprints as a process answers them."""
    return base64.b64encode(numbers.astype(np.uint64).tobytes()).decode()


def test_fingerprints_see_genes_and_values_only() -> None:
    """They are the same for another order, dtype and layout and with explicit zeros, and differ where a gene or a value does."""
    random = np.random.default_rng(0)
    dense = random.poisson(0.5, (40, 30)).astype(np.float32)
    dense[0] = 0
    csr = sp.csr_matrix(dense)
    flipped = [
        np.concatenate([part[a:b][::-1] for a, b in zip(csr.indptr[:-1], csr.indptr[1:], strict=True)]) for part in (csr.indices, csr.data)
    ]
    zeros = sp.csr_matrix((np.ones(1200, np.float32), np.tile(np.arange(30), 40), np.arange(0, 1201, 30)), (40, 30))
    zeros.data[:] = dense.ravel()

    plain = serve.fingerprints(csr.indptr, csr.indices, csr.data)

    np.testing.assert_array_equal(serve.fingerprints(csr.indptr.astype(np.uint32), flipped[0], flipped[1].astype(np.int64)), plain)
    np.testing.assert_array_equal(serve.of_dense(dense), plain)
    np.testing.assert_array_equal(serve.fingerprints(zeros.indptr, zeros.indices, zeros.data), plain)
    np.testing.assert_array_equal(
        serve.fingerprints(csr.indptr[5:9], *(part[csr.indptr[5] : csr.indptr[8]] for part in (csr.indices, csr.data))), plain[5:8]
    )
    assert plain[0] == 0
    assert np.unique(plain[1:]).size == 39
    assert (serve.fingerprints(csr.indptr, csr.indices + 1, csr.data)[1:] != plain[1:]).all()
    assert (serve.fingerprints(csr.indptr, csr.indices, csr.data + 1)[1:] != plain[1:]).all()


def test_strange_rows_are_counted() -> None:
    """Rows that the source has not are counted, and nothing is said of how they are shuffled."""
    table = Table(np.array([30, 10, 20], np.uint64), np.array([0, 1, 1]))

    judged = table.judge([coded(np.array([10, 20, 11])), coded(np.array([30]))])

    assert (judged.rows, judged.strange) == (4, 1)
    assert table.rows(np.array([20, 30, 99], np.uint64)).tolist() == [2, 0, -1]
    assert judged.entropy == 0


@pytest.mark.parametrize(("labels", "bits"), [([1, 1, 1, 1], 0), ([0, 1, 0, 1], 1), ([0, 1, 2, 3], 2), ([0, 0, 0, 1], 0.8112781244591328)])
def test_entropy(labels: list[int], bits: float) -> None:
    """Shannon's, in bits."""
    assert quality.entropy(np.array(labels)) == pytest.approx(bits)


def test_near_pairs_see_blocks() -> None:
    """Random batches have as many near pairs as chance gives; batches of blocks of 16 rows have many more; few rows say nothing."""
    n, random = 100_000, np.random.default_rng(0)
    rows = random.permutation(n).reshape(-1, 200)
    blocks = (random.permutation(n // 16)[:, None] * 16 + np.arange(16)).ravel()[: n // 160 * 160].reshape(-1, 160)

    assert quality.near_pairs(list(rows), n) == pytest.approx(1, abs=0.05)
    assert quality.near_pairs(list(blocks), n) == pytest.approx((15 / 159) / (100 / n), rel=0.15)
    assert quality.near_pairs([np.arange(3)], n) is None


def test_near_pairs_count_every_pair_once() -> None:
    """The count is that of all pairs tried one by one."""
    n, batch = 300, np.random.default_rng(1).permutation(300)[:40]
    near = sum(abs(int(a) - int(b)) <= 50 for i, a in enumerate(batch) for b in batch[i + 1 :])
    chance = sum(abs(a - b) <= 50 for a in range(n) for b in range(a)) / (n * (n - 1) / 2)

    found = quality.near_pairs([batch], n)

    assert found == pytest.approx(near / (40 * 39 / 2 * chance))
