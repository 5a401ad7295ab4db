"""Plates like those of Tahoe-100M, as h5ad files: for whoever has not the 314 GB of the original.

Knows the published figures of the data set and a model that follows them, not who reads the files. A cell has a number of molecules
and a profile over genes, its row is a multinomial sample: nonzeros a cell, values and the popularity of genes follow from that together.
Molecules are a mixture of two log-normals fitted to the quartiles, mean and sd of 100,000 cells of plate 10, and shifted to the
published mean of each plate; a profile is log-normal (sigma 1.84) over 20,000 genes and faint over the rest; cell lines share it up to
a correlation of 0.95 and have their published shares; a drug replaces 4 % of the molecules. Rows lie as in the real files, by
sublibrary, by sample. Memory does not grow with the cells: threads draw blocks ahead, each is written when it is its turn.
"""

import itertools
import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scdl_gpu.bench.plate_file import PlateFile

GENES, PLATES, LINES, DRUGS, SAMPLES = 62_710, 14, 50, 379, 96
BLOCK, SUBLIBRARY = 2_048, 50_000
"""Cells drawn at once, and cells in which each sample of a plate comes once: a multiple of neither need be the whole."""
SIZES = (5481420, 8064658, 4705402, 7004356, 6419498, 7545393, 5692117, 8880979, 5866669, 8044908, 7435869, 10487057, 8501658, 6518806)
MOLECULES = (2482.5, 2626.8, 1855.0, 2344.2, 2088.2, 2845.6, 1952.7, 2459.6, 2257.5, 2331.3, 2154.4, 2603.8, 2317.0, 2455.1)
"""Cells, and mean molecules a cell, of each plate (Tahoe-100M's sample metadata, CC0)."""
# fmt: off
SHARES = (
    6323, 5905, 4144, 3398, 3253, 2767, 2749, 2725, 2647, 2479, 2475, 2458, 2429, 2381, 2345, 2344, 2338, 2317, 2264, 2240, 2238,
    2085, 2026, 1975, 1934, 1877, 1824, 1780, 1780, 1760, 1744, 1702, 1672, 1603, 1589, 1536, 1521, 1463, 1347, 1335, 1314, 1069,
    1026, 631, 583, 228, 163, 144, 39, 30,
)
# fmt: on
"""Of 100,000 cells, how many are of each cell line."""
WIDE, NARROW_FIT, WIDE_FIT, LEAST, MOST, MEAN = 0.175, (7.404, 0.466), (7.850, 0.800), 392.0, 60_000.0, 2_185.0
"""The fit to plate 10: share of the wider log-normal, mu and sigma of both, bounds of the molecules, and the mean of it all."""
LINE_SD, SAMPLE_SD, SAMPLE_SIZE_SD = 0.15, 0.18, 0.40
EXPRESSED, SIGMA, FAINT, FAINT_SIGMA, LIKENESS = 20_000, 1.835, 0.003, 1.5, 0.95
SLOTS_PER_GENE, DRUG_BITS, DRUG_CUT, DRUG_GENES = 16, 12, round(0.04 * 65_536), 300
DOSES = (0.05, 0.5, 5.0)

Told = Callable[[int, int], None]


class Profiles(NamedTuple):
    """Inverse CDFs: a row of genes for each cell line, and for each drug."""

    lines: NDArray[Any]
    drugs: NDArray[Any]


class Block(NamedTuple):
    """Some cells of a plate: CSR arrays, and codes and numbers of obs."""

    lengths: NDArray[np.int64]
    genes: NDArray[np.int32]
    counts: NDArray[np.float32]
    obs: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Plate:
    """What one plate has: its number from 0, its cells, and what its samples were given."""

    number: int
    n_cells: int
    n_vars: int
    seed: int

    @property
    def name(self) -> str:
        """As in the obs column."""
        return f"plate{self.number + 1}"

    def samples(self) -> tuple[list[str], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
        """Give the names of samples, the drug of each (-1: none), their shares of the cells, and how their depth is shifted."""
        random = np.random.default_rng([self.seed, self.number])
        names = [f"smp_{1495 + self.number * SAMPLES + sample}" for sample in range(SAMPLES)]
        drugs = np.concatenate([[-1, -1], (self.number // 3 * (SAMPLES - 2) + np.arange(SAMPLES - 2)) % DRUGS])
        shares = np.exp(random.normal(0, SAMPLE_SIZE_SD, SAMPLES))
        shares /= shares.sum()
        shift = random.normal(0, SAMPLE_SD, SAMPLES)
        return names, drugs, shares, shift + math.log(MOLECULES[self.number % PLATES] / MEAN) - float((shares * shift).sum())


def write_plates(
    folder: Path,
    n_cells: int,
    *,
    n_plates: int = PLATES,
    n_vars: int = GENES,
    seed: int = 0,
    compression: str | None = None,
    told: Told = lambda done, total: None,
) -> list[Path]:
    """Write `n_plates` h5ad files with `n_cells` cells together, shared out as Tahoe's are; returns their paths.

    A function of n_cells, n_plates, n_vars and seed alone. A plate that is there is kept: each appears under its name when it is whole.
    told: called with the cells written so far and all of them.
    """
    if not 1 <= n_plates <= n_cells:
        raise ValueError(f"{n_plates} plates of {n_cells} cells: there must be a plate at least, and a cell for each")
    folder.mkdir(parents=True, exist_ok=True)
    sizes = [SIZES[plate % PLATES] for plate in range(n_plates)]
    ends = [n_cells * sum(sizes[:plate]) // sum(sizes) for plate in range(n_plates + 1)]
    paths, profiles = [], None
    for number, (start, end) in enumerate(itertools.pairwise(ends)):
        path = folder / f"plate{number + 1:02d}.h5ad"
        paths.append(path)
        if not path.exists():
            profiles = profiles or profiles_of(n_vars, seed)
            partial_path = path.with_suffix(".partial")
            write_plate(
                partial_path, Plate(number, end - start, n_vars, seed), profiles, compression, told=partial(_told, told, start, n_cells)
            )
            partial_path.replace(path)
        told(end, n_cells)
    return paths


def _told(told: Told, before: int, total: int, done: int) -> None:
    told(before + done, total)


def write_plate(path: Path, plate: Plate, profiles: Profiles, compression: str | None, *, told: Callable[[int], None]) -> None:
    """Write one plate, blocks drawn ahead by as many threads as there are cores."""
    names, drugs, _, _ = plate.samples()
    given = sorted({_drug_name(drug) for drug in drugs})
    n_libraries = -(-plate.n_cells // SUBLIBRARY)
    categories = {
        "plate": [plate.name],
        "drug": given,
        "cell_line": [f"CVCL_X{line:03d}" for line in range(LINES)],
        "sample": names,
        "sublibrary": [f"lib_{1000 + plate.number * 100 + library}" for library in range(n_libraries)],
    }
    drug_of = np.array([given.index(_drug_name(drug)) for drug in drugs])
    is_long = plate.n_cells * MOLECULES[plate.number % PLATES] > 2**31
    with PlateFile(path, plate.n_vars, categories, is_long=is_long, compression=compression) as file:
        done = 0
        for block in _ahead(plate, profiles):
            block.obs["drug"] = drug_of[block.obs["sample"]]
            file.append(block.lengths, block.genes, block.counts, block.obs)
            done += block.lengths.size
            told(done)


def _drug_name(drug: int) -> str:
    odd = ("γ-Oryzanol", "18β-Glycyrrhetinic acid", "Bestatin (hydrochloride)", "8-Hydroxyquinoline")  # such names are in Tahoe
    return "DMSO_TF" if drug < 0 else odd[drug] if drug < len(odd) else f"compound_{drug:03d}"


def _ahead(plate: Plate, profiles: Profiles) -> Iterator[Block]:
    threads = len(os.sched_getaffinity(0))
    pending: deque[Future[Block]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for library, first in enumerate(range(0, plate.n_cells, SUBLIBRARY)):
            samples = _samples_of(plate, library, min(SUBLIBRARY, plate.n_cells - first))
            for start in range(0, samples.size, BLOCK):
                pending.append(pool.submit(draw_block, plate, profiles, (library, start), samples[start : start + BLOCK]))
                if len(pending) > threads:
                    yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _samples_of(plate: Plate, library: int, n_cells: int) -> NDArray[np.int64]:
    """Give the sample of each cell of a sublibrary, ascending."""
    shares = plate.samples()[2]
    return np.sort(np.random.default_rng([plate.seed, plate.number, library]).choice(SAMPLES, n_cells, p=shares))


def draw_block(plate: Plate, profiles: Profiles, at: tuple[int, int], sample: NDArray[np.int64]) -> Block:
    """Draw the cells of sublibrary at[0] from its cell at[1] on, which are of these samples."""
    from scdl_gpu.bench import draw

    (library, start), n = at, sample.size
    random = np.random.default_rng([plate.seed, plate.number, library, start])
    _, drugs, _, sample_shift = plate.samples()
    shares, line_shift = _lines(plate.seed)
    line = random.choice(LINES, n, p=shares)
    total = molecules(random, line_shift[line] + sample_shift[sample])
    most = np.minimum(total, plate.n_vars)
    starts = np.cumsum(most) - most
    genes, counts, lengths = np.empty(most.sum(), np.int32), np.empty(most.sum(), np.float32), np.empty(n, np.int64)
    numbers = (np.arange(n) + (plate.number << 40) + library * SUBLIBRARY + start).astype(np.uint64)
    order, streams = np.argsort(line, kind="stable"), draw.streams_of(numbers, plate.seed)
    draw.draw(order, total, line, drugs[sample], streams, *profiles, DRUG_CUT, plate.n_vars, starts, genes, counts, lengths)
    ends = np.cumsum(lengths)
    close = np.empty(ends[-1], np.int32), np.empty(ends[-1], np.float32)
    draw.close_up(starts, lengths, ends, genes, counts, *close)
    codes = {"plate": np.zeros(n, np.int64), "cell_line": line, "sample": sample, "sublibrary": np.full(n, library)}
    barcodes = [
        f"{s + 1:02d}_{k // 256 + 1:03d}_{k % 256 + 1:03d}-{plate.number + 1}-{library}" for k, s in enumerate(sample.tolist(), start)
    ]
    return Block(lengths, *close, {"_index": barcodes, **codes, "gene_count": lengths, "tscp_count": total})


def molecules(random: np.random.Generator, shift: NDArray[np.float64]) -> NDArray[np.int64]:
    """Draw how many molecules each cell has: the fit, shifted, and drawn anew where it is out of bounds."""
    drawn, todo = np.empty(shift.size), np.arange(shift.size)
    while todo.size:
        wide = random.random(todo.size) < WIDE
        mu, sigma = (np.where(wide, there, here) for there, here in zip(WIDE_FIT, NARROW_FIT, strict=True))
        drawn[todo] = np.exp(mu + sigma * random.standard_normal(todo.size) + shift[todo])
        todo = todo[(drawn[todo] < LEAST) | (drawn[todo] > MOST)]
    return np.rint(drawn).astype(np.int64)


def _lines(seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    shares = np.random.default_rng([seed, 7]).permutation(np.array(SHARES)) / sum(SHARES)
    shift = np.random.default_rng([seed, 8]).normal(0, LINE_SD, LINES)
    return shares, shift - float((shares * shift).sum())


def profiles_of(n_vars: int, seed: int) -> Profiles:
    """Make the profiles, over genes in a random order of their own: 100 MB for all lines and 62,710 genes."""
    table_bits = math.ceil(math.log2(SLOTS_PER_GENE * n_vars))
    random = np.random.default_rng([seed, 0xC0DE])
    dtype = np.uint16 if n_vars <= 65_536 else np.uint32
    expressed = min(EXPRESSED, n_vars)
    curve, order = _log_normal(expressed, SIGMA), random.permutation(n_vars)
    faint = _log_normal(n_vars - expressed, FAINT_SIGMA) * FAINT if n_vars > expressed else np.zeros(0)
    shared = random.standard_normal(expressed)
    lines = np.empty((LINES, 1 << table_bits), dtype)
    for line in range(LINES):
        score = LIKENESS * shared + math.sqrt(1 - LIKENESS**2) * random.standard_normal(expressed)
        share = np.zeros(n_vars)
        share[order[np.argsort(-score, kind="stable")]] = curve * (1 - faint.sum())
        share[order[expressed:]] = faint
        lines[line] = _slots(share, table_bits, random)
    drugs, curve = np.empty((DRUGS, 1 << DRUG_BITS), dtype), _log_normal(min(DRUG_GENES, expressed), 1.0)
    for drug in range(DRUGS):
        share = np.zeros(n_vars)
        share[order[random.choice(expressed, curve.size, replace=False)]] = curve
        drugs[drug] = _slots(share, DRUG_BITS, random)
    return Profiles(lines, drugs)


def _log_normal(n: int, sigma: float) -> NDArray[np.float64]:
    """Give n shares at the quantiles of a log-normal, the largest first."""
    from scipy.special import ndtri

    share = np.exp(-sigma * ndtri((np.arange(n) + 0.5) / n))
    return np.asarray(share / share.sum())


def _slots(share: NDArray[np.float64], bits: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Make an inverse CDF of 2^bits slots; parts of slots are rounded at random, so that a rare gene keeps its weight on average."""
    wanted = share / share.sum() * (1 << bits)
    whole = np.floor(wanted).astype(np.int64)
    whole += random.random(share.size) < wanted - whole
    slots = np.repeat(np.arange(share.size), whole)
    missing = (1 << bits) - slots.size
    if missing > 0:
        return np.sort(np.concatenate([slots, random.choice(share.size, missing, p=share / share.sum())]))
    return np.sort(random.permutation(slots)[: 1 << bits])
