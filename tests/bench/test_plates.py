"""Plates like Tahoe's: their figures, and that they follow from their arguments alone."""

from pathlib import Path

import anndata
import numpy as np
import pytest

from scdl_gpu.bench import plates
from scdl_gpu.bench.plates import Plate, write_plates

GENES = 2_000


def read(path: Path) -> anndata.AnnData:
    """Read a plate, whatever its name."""
    return anndata.read_h5ad(path)


def test_plates_hold_what_was_asked_for(tmp_path: Path) -> None:
    """Cells are shared out as Tahoe's are, each with its four labels; rows are canonical counts whose sums obs names."""
    told: list[tuple[int, int]] = []

    paths = write_plates(tmp_path, 3_000, n_plates=2, n_vars=GENES, told=lambda *progress: told.append(progress))

    first, second = map(read, paths)
    assert [path.name for path in paths] == ["plate01.h5ad", "plate02.h5ad"]
    assert first.n_obs == 3_000 * 5481420 // (5481420 + 8064658)
    assert first.n_obs + second.n_obs == 3_000
    assert first.shape[1] == GENES
    assert set(second.obs["plate"]) == {"plate2"}
    assert {"drug", "cell_line", "sample"} <= set(first.obs.columns)
    assert first.obs_names.is_unique
    assert first.obs["sample"].cat.codes.is_monotonic_increasing
    assert first.X.has_canonical_format
    assert first.X.data.min() >= 1
    np.testing.assert_array_equal(np.asarray(first.X.sum(axis=1)).ravel(), first.obs["tscp_count"])
    np.testing.assert_array_equal(np.diff(first.X.indptr), first.obs["gene_count"])
    assert told[-1] == (3_000, 3_000)


def test_plates_follow_from_their_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same arguments give the same file, however many threads draw it; another seed gives another."""
    [one] = write_plates(tmp_path / "one", 1_500, n_plates=1, n_vars=GENES)
    monkeypatch.setattr(plates.os, "sched_getaffinity", lambda _: range(5))
    [again] = write_plates(tmp_path / "again", 1_500, n_plates=1, n_vars=GENES)
    [other] = write_plates(tmp_path / "other", 1_500, n_plates=1, n_vars=GENES, seed=1)

    same, different = (read(one).X != read(path).X for path in (again, other))

    assert same.nnz == 0
    assert different.nnz > 1_000


def test_molecules_follow_the_published_mean() -> None:
    """With the offsets of cell lines and samples the mean of molecules is that of the fit, within 2 %."""
    random = np.random.default_rng(0)
    offsets = random.normal(0, plates.LINE_SD, 200_000) + random.normal(0, plates.SAMPLE_SD, 200_000)

    drawn = plates.molecules(random, offsets)

    assert drawn.min() >= plates.LEAST
    assert drawn.max() <= plates.MOST
    assert abs(drawn.mean() - plates.MEAN) < 0.02 * plates.MEAN


def test_rows_are_draws_of_the_profile() -> None:
    """A block's counts over genes agree with what the tables of its cell lines and drugs give, by chi-square."""
    profiles, plate = plates.profiles_of(300, 3), Plate(0, 2_000, 300, 3)
    block = plates.draw_block(plate, profiles, (0, 0), np.zeros(1_000, np.int64))
    total = np.bincount(block.obs["cell_line"], weights=block.obs["tscp_count"], minlength=plates.LINES)
    expected = sum(total[line] * np.bincount(profiles.lines[line], minlength=300) / profiles.lines.shape[1] for line in range(plates.LINES))

    seen = np.bincount(block.genes, weights=block.counts, minlength=300)

    assert seen.sum() == total.sum()
    assert (seen[expected == 0] == 0).all()
    likely = expected > 5
    chi_square = ((seen[likely] - expected[likely]) ** 2 / expected[likely]).sum()
    degrees = likely.sum() - 1
    assert abs(chi_square - degrees) < 5 * np.sqrt(2 * degrees)


def test_a_plate_that_is_there_is_kept(tmp_path: Path) -> None:
    """A second call writes what is missing only."""
    first, second = write_plates(tmp_path, 40, n_plates=2, n_vars=GENES)
    kept = first.stat().st_mtime_ns
    second.unlink()

    write_plates(tmp_path, 40, n_plates=2, n_vars=GENES)

    assert first.stat().st_mtime_ns == kept
    assert second.exists()


@pytest.mark.parametrize(("cells", "n_plates"), [(3, 4), (3, 0)])
def test_plates_without_cells_are_refused(cells: int, n_plates: int, tmp_path: Path) -> None:
    """There is a cell for each plate."""
    with pytest.raises(ValueError, match="plates of 3 cells"):
        write_plates(tmp_path, cells, n_plates=n_plates)
