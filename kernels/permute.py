"""A keyed permutation of 0..n-1, position by position: where the order of an epoch comes from.

Knows numbers only. An unbalanced Feistel network over the bits of n - 1, walked again while it leaves 0..n-1:
the domain is smaller than 2 n, so a row takes less than two walks on average. Specified in docs/order.md; a change
here is a new major version.
"""

import numpy as np
from numba import njit

ONE = np.uint64(1)


@njit(nogil=True, cache=True)
def scramble(x, key):
    """Hash a half under a round's key: fmix32 of MurmurHash3 (Appleby, 2011) over 32 bits."""
    h = np.uint32(x) + np.uint32(key)
    h ^= h >> np.uint32(16)
    h = np.uint32(h * np.uint32(0x85EBCA6B))
    h ^= h >> np.uint32(13)
    h = np.uint32(h * np.uint32(0xC2B2AE35))
    return np.uint64(h ^ (h >> np.uint32(16)))


@njit(nogil=True, cache=True)
def permute(positions, n, bits, keys, out):
    """Write the row at each of `positions` to `out`, both (k,) int64; 0 <= position < n <= 2^bits, bits <= 62.

    keys: (rounds,) uint32, an even number.
    """
    low_bits = np.uint64(bits - bits // 2)
    low_mask = (ONE << low_bits) - ONE
    high_mask = (ONE << np.uint64(bits // 2)) - ONE
    for i in range(np.uint64(positions.size)):
        out[i] = positions[i]
    for k in range(0, keys.size, 2):
        a, b = keys[k], keys[k + 1]
        for i in range(np.uint64(out.size)):  # all rows, round by round: that vectorises, a walk of each row does not
            low, high = np.uint64(out[i]) & low_mask, np.uint64(out[i]) >> low_bits
            high ^= scramble(low, a) & high_mask
            low ^= scramble(high, b) & low_mask
            out[i] = np.int64((high << low_bits) | low)
    for i in range(np.uint64(out.size)):
        x = np.uint64(out[i])
        while x >= np.uint64(n):
            low, high = x & low_mask, x >> low_bits
            for k in range(0, keys.size, 2):
                high ^= scramble(low, keys[k]) & high_mask
                low ^= scramble(high, keys[k + 1]) & low_mask
            x = (high << low_bits) | low
        out[i] = np.int64(x)
