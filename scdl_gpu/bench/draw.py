"""Rows of counts, drawn: each is a multinomial sample of the profile of its cell line.

Knows lookup tables and random bits, not Tahoe. A draw is one look into an inverse CDF of 2^20 slots, 2 MB that stay in a
core's cache while the cells of one line are drawn; a bitmap of the genes that were hit gives them in ascending order, so
that nothing is sorted. Random bits are SplitMix64 (Steele, Lea and Flood 2014), a stream a cell: what is drawn does not depend on
blocks or threads.
"""

import numba as nb
import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_DE_BRUIJN = np.uint64(0x03F79D71B4CB0A89)
_POSITIONS = np.zeros(64, np.uint8)
"""The number of the only bit of a word, at the upper six bits of its product with a de Bruijn sequence: no branch that is guessed wrong."""
_POSITIONS[[(int(_DE_BRUIJN) << bit & (1 << 64) - 1) >> 58 for bit in range(64)]] = range(64)


@nb.njit(nb.uint64(nb.uint64), inline="always")
def _mixed(z: np.uint64) -> np.uint64:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@nb.njit(nogil=True, cache=True)
def draw(order, total, line, drug, streams, lines, drugs, drug_cut, n_vars, starts, out_genes, out_counts, out_lengths):
    """Draw the cells of a block, in the order `order`, which keeps cells of one line together.

    total: (n,) draws of a cell. line, drug: (n,) row of `lines` and of `drugs`, inverse CDFs with a power of two of slots; drug -1: none.
    streams: (n,) uint64, where the random bits of each cell begin. drug_cut: of 65,536 draws of a treated cell, how many are of the
    drug's profile.
    starts: (n,) where the elements of a cell go in out_genes and out_counts, with room for min(total, n_vars) each.
    """
    line_mask, drug_mask = np.uint64(lines.shape[1] - 1), np.uint64(drugs.shape[1] - 1)
    counter = np.zeros(n_vars, np.uint16)  # no cell has more molecules
    hit = np.zeros((n_vars + 63) // 64, np.uint64)
    for cell in order:
        state = streams[cell]
        own, given = lines[line[cell]], drugs[max(drug[cell], 0)]
        cut = np.uint64(drug_cut if drug[cell] >= 0 else 0)
        for _ in range(total[cell]):
            state += _GOLDEN
            bits = _mixed(state)
            is_treated = (bits >> np.uint64(48)) < cut
            gene = given[(bits >> np.uint64(24)) & drug_mask] if is_treated else own[bits & line_mask]
            counter[gene] += np.uint16(1)
            hit[gene >> 6] |= np.uint64(1) << np.uint64(gene & 63)
        at = starts[cell]
        for word in range(hit.size):
            left = hit[word]
            hit[word] = np.uint64(0)
            while left:
                lowest = left & (~left + np.uint64(1))
                gene = word * 64 + np.int64(_POSITIONS[(lowest * _DE_BRUIJN) >> np.uint64(58)])
                out_genes[at], out_counts[at] = gene, counter[gene]
                counter[gene] = 0
                at += 1
                left ^= lowest
        out_lengths[cell] = at - starts[cell]


@nb.njit(nogil=True, cache=True)
def close_up(starts, lengths, ends, genes, counts, out_genes, out_counts):
    """Copy the elements of each cell to where they end at `ends`, one cell after the other."""
    for cell in range(starts.size):
        start, length = starts[cell], lengths[cell]
        out_genes[ends[cell] - length : ends[cell]] = genes[start : start + length]
        out_counts[ends[cell] - length : ends[cell]] = counts[start : start + length]


def streams_of(numbers: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """Give each number a stream of its own: where its random bits begin."""
    with np.errstate(over="ignore"):
        z = (numbers + np.uint64(1)) * _GOLDEN + np.uint64(seed) * np.uint64(0xD1342543DE82EF95)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
