"""How well windows shuffle, beside a true permutation, on rows that are sorted by label: the worst case.

    python benchmarks/shuffle_quality.py [--rows 20000000] [--batch-size 1024] [--windows 256 1024 4096 16384] [--extents 256 1024]
    python benchmarks/shuffle_quality.py --plot docs/shuffle-quality.svg
    python benchmarks/shuffle_quality.py --check

Windows in MiB, extents in KiB. It needs no data, only orders: rows are so many bytes each, in extents as files would be cut, labels
equally many rows each. Of the batches of an epoch, drawn from windows all over it, are told

    entropy     of the labels of a batch, in bits: less than the permutation's where a batch lacks labels
    noise       of the labels' shares in a batch: chi-square per degree of freedom, 1 for rows drawn by chance
    near pairs  two rows of a batch within 50 rows of each other in the dataset: how many times more often than by chance

The permutation is NumPy's. --check makes a small archive and compares GPUBatchLoader(windows=True) over it with what the order alone
gives for rows of its size; --plot needs matplotlib.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scdl_gpu import bench
from scdl_gpu.archive.cuts import Cuts
from scdl_gpu.order import Order
from scdl_gpu.window_order import WindowOrder, WindowRows, extent_bytes_of

Ints = NDArray[np.int64]
NEAR = 50
"""Rows: cells that lie so near each other in a file come from one experiment, and mostly from one cluster."""
ROWS = {"packed": (1_140, 8 << 10), "raw": (10_000, 16 << 10)}
"""Bytes of a row of 1,450 nonzeros, 0.8 or about 7 each, and of what an extent takes beside its rows: two pages for each of its files."""


@dataclass(frozen=True, slots=True)
class Quality:
    """Means over batches. rows_per_window: 0 of a permutation, whose window is the dataset."""

    what: str
    labels: int
    batch_size: int
    rows_per_window: int
    extents_per_window: int
    entropy: float
    noise: float
    near_pairs: float


def entropy_of(labels: Ints) -> float:
    """Give the entropy of the labels of a batch, in bits."""
    shares = np.unique(labels, return_counts=True)[1] / labels.size
    return float(-(shares * np.log2(shares)).sum())


def noise_of(labels: Ints, n_labels: int) -> float:
    """Give chi-square of the counts of labels that are equally many in the dataset, per degree of freedom."""
    expected = labels.size / n_labels
    return float(((np.bincount(labels, minlength=n_labels) - expected) ** 2).sum() / expected / (n_labels - 1))


def near_pairs_of(rows: Ints) -> int:
    """Count the pairs of rows of a batch that lie within NEAR rows of each other."""
    ordered = np.sort(rows)
    return int((np.searchsorted(ordered, ordered + NEAR, side="right") - np.arange(1, rows.size + 1)).sum())


def near_by_chance(n_rows: int, batch_size: int) -> float:
    """Give how many such pairs a batch of a true permutation has on average: of all pairs of rows NEAR x n_rows or so are near."""
    near = sum(max(0, n_rows - apart) for apart in range(1, NEAR + 1))
    return math.comb(batch_size, 2) * near / math.comb(n_rows, 2)


def measured(what: str, batches: Sequence[Ints], n_rows: int, n_labels: int, sizes: tuple[int, int] = (0, 0)) -> Quality:
    """Measure batches of a dataset of n_rows rows that are sorted by n_labels labels of equally many rows."""
    labels = [rows * n_labels // n_rows for rows in batches]
    b = batches[0].size
    near = float(np.mean([near_pairs_of(rows) for rows in batches])) / near_by_chance(n_rows, b)
    entropy, noise = np.mean([entropy_of(one) for one in labels]), np.mean([noise_of(one, n_labels) for one in labels])
    return Quality(what, n_labels, b, *sizes, round(float(entropy), 4), round(float(noise), 3), round(near, 2))


def permutation(n_rows: int, batch_size: int, count: int) -> list[Ints]:
    """Draw batches as a true permutation would give them."""
    rng = np.random.default_rng(0)
    return [rng.choice(n_rows, batch_size, replace=False, shuffle=False) for _ in range(count)]


def windows_of(n_rows: int, row_bytes: float, batch_size: int, *, pad_bytes: int, window_bytes: int, extent_bytes: int) -> WindowOrder:
    """Make the order of one rank over rows of so many bytes each, as if one archive held them."""
    per_extent = max(1, int(extent_bytes / row_bytes))
    first = np.arange(0, n_rows, per_extent, dtype=np.int64)
    counts = np.minimum(per_extent, n_rows - first)
    cuts = Cuts(np.zeros(first.size, np.int32), first, counts, np.ceil(counts * row_bytes).astype(np.int64) + pad_bytes)
    order = Order(n_rows, batch_size, drop_last=True)
    return WindowOrder(order, cuts, np.zeros(1, np.int64), window_bytes=window_bytes, extent_bytes=extent_bytes)


def drawn(order: WindowOrder, count: int, windows: Sequence[WindowRows]) -> tuple[list[Ints], tuple[int, int]]:
    """Draw batches from `windows`, one after the other from each in turn; and tell rows and extents of the first window."""
    steps = ((window, window.step + k) for k in range(max(w.n_steps for w in windows)) for window in windows if k < window.n_steps)
    batches = [order.draw(window, 0, step).rows for _, (window, step) in zip(range(count), steps, strict=False)]
    return batches, (windows[0].n_rows, windows[0].part.size)


def results(arguments: argparse.Namespace) -> Iterator[tuple[Quality, dict[str, Any]]]:
    """Measure all kinds of rows, labels, windows and extents; facts are what beside a Quality belongs to a result."""
    n, b, count = arguments.rows, arguments.batch_size, arguments.batches
    for n_labels in arguments.labels:
        yield measured("permutation", permutation(n, b, count), n, n_labels), {"rows": n}
        for name, (row_bytes, pad_bytes) in ROWS.items():
            for window in arguments.windows:
                default = extent_bytes_of(window << 20) >> 10
                for extent in sorted({*arguments.extents, default}):
                    if window << 10 < 8 * extent or window << 20 > n * row_bytes // 2:
                        continue
                    sizes_of = {"pad_bytes": pad_bytes, "window_bytes": window << 20, "extent_bytes": extent << 10}
                    order = windows_of(n, row_bytes, b, **sizes_of)
                    windows = order.windows(0)
                    batches, sizes = drawn(order, count, windows[:-1])  # the last one may be small
                    facts = {"rows": n, "row_bytes": row_bytes, "window_mib": window, "extent_kib": extent, "is_default": extent == default}
                    yield measured(name, batches, n, n_labels, sizes), facts


def table(found: Sequence[tuple[Quality, dict[str, Any]]]) -> str:
    """Write results for people; * marks the extents that windows of this size have by default."""
    columns = f"{'labels':>6} {'rows':12} {'window':>9} {'extent':>9} {'extents':>8} {'entropy':>8} {'noise':>7} {'near pairs':>10}"
    lines = [columns]
    for quality, facts in found:
        window, extent = (f"{facts['window_mib']:,} MiB", f"{facts['extent_kib']:,} KiB") if "window_mib" in facts else ("", "")
        mark = "*" if facts.get("is_default") else " "
        lines.append(
            f"{quality.labels:6} {quality.what:12} {window:>9} {extent:>9}{mark}{quality.extents_per_window or '':>8} "
            f"{quality.entropy:8.3f} {quality.noise:7.2f} {quality.near_pairs:10.1f}"
        )
    return "\n".join(lines)


def plot(found: Sequence[tuple[Quality, dict[str, Any]]], path: Path) -> None:
    """Draw entropy, noise and near pairs over the size of windows, a line for each size of extents, of packed rows."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "shuffle", "font.size": 9})
    from matplotlib import pyplot

    labels = sorted({quality.labels for quality, _ in found})
    figure, axes = pyplot.subplots(1, len(labels) + 1, figsize=(3.6 * (len(labels) + 1), 3.2), layout="constrained")
    for axis, n_labels in zip(axes, [*labels, labels[0]], strict=True):
        is_near = axis is axes[-1]
        chosen = [(quality, facts) for quality, facts in found if quality.labels == n_labels]
        for extent in sorted({facts["extent_kib"] for _, facts in chosen if "extent_kib" in facts}):
            line = [(f["window_mib"] / 1024, q) for q, f in chosen if q.what == "packed" and f["extent_kib"] == extent]
            heights = [quality.near_pairs if is_near else quality.entropy for _, quality in line]
            axis.plot([window for window, _ in line], heights, marker=".", label=f"extents of {extent:,} KiB")
        (perfect,) = (quality for quality, _ in chosen if quality.what == "permutation")
        axis.axhline(1 if is_near else perfect.entropy, color="black", linestyle=":", label="permutation")
        windows = sorted({facts["window_mib"] / 1024 for _, facts in chosen if facts.get("row_bytes") == ROWS["packed"][0]})
        axis.set(xscale="log", xlabel="window, GiB")
        axis.set_xticks(windows, [f"{window:g}" for window in windows])
        axis.minorticks_off()
        axis.set_title("near pairs, times chance" if is_near else f"entropy of {n_labels:,} labels, bits", fontsize=9)
        axis.set_yscale("log" if is_near else "linear")
    axes[0].legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None, "Creator": None} if path.suffix == ".svg" else None)


def check(cells: int, batch_size: int, window_bytes: int) -> list[tuple[Quality, dict[str, Any]]]:
    """Measure GPUBatchLoader over an archive made for it, its order alone, and a permutation; labels are the archive's 14 plates."""
    import make_data

    from scdl_gpu import GPUBatchLoader, convert_h5ad

    with tempfile.TemporaryDirectory() as folder:
        source, archive = Path(folder) / "sorted.h5ad", Path(folder) / "sorted"
        make_data.write(source, cells, genes=2_000, nnz=200)
        convert_h5ad(source, archive)
        options: dict[str, Any] = {"device": "cpu", "drop_last": True, "obs": ["plate"], "host_budget": 2 * window_bytes}
        with GPUBatchLoader(archive, batch_size, windows=True, **options) as loader:
            batches = [(batch.rows.numpy(), batch.obs["plate"].numpy()) for batch in loader]
            names = loader.categories["plate"]
        size_bytes = sum((archive / name).stat().st_size for name in ("data.npy", "col_ptr.npy"))
    rows = [numbers for numbers, _ in batches]
    plates = np.concatenate([[int(names[code][5:]) for code in codes] for _, codes in batches])
    if not np.array_equal(plates, np.concatenate(rows) * 14 // cells) or np.unique(np.concatenate(rows)).size != len(rows) * batch_size:
        raise SystemExit("the loader's batches hold other labels than their rows, or a row twice")
    extent_bytes = extent_bytes_of(window_bytes)
    sizes_of = {"pad_bytes": ROWS["raw"][1], "window_bytes": window_bytes, "extent_bytes": extent_bytes}
    order = windows_of(cells, size_bytes / cells + 8, batch_size, **sizes_of)
    alone, sizes = drawn(order, len(rows), order.windows(0))
    facts = {"rows": cells, "window_mib": window_bytes >> 20, "extent_kib": extent_bytes >> 10, "is_default": True}
    return [
        (measured("permutation", permutation(cells, batch_size, len(rows)), cells, 14), {"rows": cells}),
        (measured("order alone", alone, cells, 14, sizes), facts),
        (measured("loader", rows, cells, 14), facts),
    ]


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--labels", type=int, nargs="+", default=[50, 1_000])
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--batches", type=int, default=200, help="measured of each order")
    parser.add_argument("--windows", type=int, nargs="+", default=[256, 1024, 4096, 16384], help="MiB")
    parser.add_argument("--extents", type=int, nargs="+", default=[256, 1024, 4096, 16384], help="KiB")
    parser.add_argument("--plot", type=Path, help="where to draw, .svg or .png")
    parser.add_argument("--check", action="store_true", help="measure a real loader over a small archive instead")
    parser.add_argument("--check-cells", type=int, default=40_000)
    arguments = parser.parse_args()
    found = check(arguments.check_cells, min(64, arguments.batch_size), 1 << 20) if arguments.check else list(results(arguments))
    machine = bench.machine()
    for quality, facts in found:
        print(json.dumps({**asdict(quality), **facts, **machine}))
    print(f"\n{table(found)}")
    if arguments.plot:
        plot(found, arguments.plot)


if __name__ == "__main__":
    main()
