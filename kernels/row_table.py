"""The row table of a packed shard, held to what docs/packed-format.md says of it: one pass, in Numba.

Knows entries, not files. 16 bytes a row are read once, before any row of the shard is decoded.
"""

import numpy as np

from scdl_gpu.kernels.packed import NNZ_BITS
from scdl_gpu.kernels.stored import jit

SOUND = -1


@jit
def check_entries(entries, n_vars, n_orders):
    """Check (n + 1, 4) uint32 entries: returns the first row that cannot be, or SOUND; nonzeros; most nonzeros, most words of a row."""
    nnz = longest_nnz = longest_words = np.int64(0)
    start = np.int64(entries[0, 0])
    for k in range(np.uint64(entries.shape[0] - 1)):
        stop, field = np.int64(entries[k + np.uint64(1), 0]), np.int64(entries[k, 1])
        n, words = field & ((1 << NNZ_BITS) - 1), stop - start
        if words < 0 or n > n_vars or field >> NNZ_BITS >= n_orders or (n == 0) != (words == 0) or (n + 7) >> 3 > 4 * words:
            return np.int64(k), nnz, longest_nnz, longest_words
        nnz, longest_nnz, longest_words = nnz + n, max(longest_nnz, n), max(longest_words, words)
        start = stop
    return np.int64(SOUND), nnz, longest_nnz, longest_words
