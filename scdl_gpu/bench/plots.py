"""The pictures of a contest: throughput by loader and by batch size, sizes on disk, percent of limit.

Knows the rows that `report.summary` gives. Needs matplotlib, of the extra `bench`. Axes are logarithmic, for loaders differ by a
thousand; so points are drawn, not bars, whose length would mean nothing. Colours are Okabe and Ito's, told apart by all eyes; marks and
dashes tell the same. Names stand beside what they name, and a range shows the rounds.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Facts = dict[str, Any]
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS, DASHES = "osD^vPX", ("-", "--", ":", "-.")
RED = "#B22222"


def write_plots(rows: Sequence[Facts], folder: Path) -> list[Path]:
    """Write the PNG files; returns their paths. Raises ModuleNotFoundError, saying what to install, where matplotlib is not."""
    try:
        import matplotlib as mpl
    except ModuleNotFoundError as error:
        message = "plots need matplotlib: install it, as with pip install '.[bench]' in a checkout, or leave them out with --no-plots"
        raise ModuleNotFoundError(message) from error
    mpl.use("agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for output, batch_size, cache in dict.fromkeys((row["output"], row["batch_size"], row["cache"]) for row in rows):
        here = [row for row in rows if (row["output"], row["batch_size"], row["cache"]) == (output, batch_size, cache)]
        name, title = f"{output}-{batch_size}-{cache}", f"{output} batches of {batch_size:,} rows, {cache} page cache"
        written.append(_throughput(pyplot, here, title, folder / f"throughput-{name}.png"))
        written.append(_limit(pyplot, here, title, folder / f"limit-{name}.png"))
    for output, cache in dict.fromkeys((row["output"], row["cache"]) for row in rows):
        here = [row for row in rows if (row["output"], row["cache"]) == (output, cache)]
        if len({row["batch_size"] for row in here}) > 1:
            path = folder / f"batch-size-{output}-{cache}.png"
            written.append(_by_batch_size(pyplot, here, f"{output} batches, {cache} page cache", path))
    if first := list({row["label"]: row for row in rows}.values()):
        written.append(_disk(pyplot, first, folder / "disk.png"))
    return written


def _family(label: str) -> str:
    """Give whose loader it is: the name before its settings."""
    return label.split(" over ")[0].split(",")[0].removesuffix(" raw").removesuffix(" packed")


def _styles(rows: Sequence[Facts]) -> dict[str, tuple[str, str, str]]:
    """Give each label colour and mark of its family, and a dash of its own within it."""
    labels = sorted({row["label"] for row in rows})
    families = sorted({_family(label) for label in labels}, key=lambda name: (name != "scdl_gpu", name))
    found, seen = {}, dict.fromkeys(families, 0)
    for label in labels:
        family = _family(label)
        number = families.index(family) % len(COLOURS)
        found[label] = COLOURS[number], MARKS[number], DASHES[seen[family] % len(DASHES)]
        seen[family] += 1
    return found


def _digits(number: float) -> str:
    """Give two digits that count: 0.035, 4.2, 130."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def _throughput(pyplot: Any, rows: Sequence[Facts], title: str, path: Path) -> Path:
    def words(row: Facts) -> str:
        ratio = "" if row.get("ratio") is None else f", {_digits(row['ratio'])} x"
        return f"{row['cells_per_second']:,.0f}{ratio}{' (cut short)' if row.get('cut_short') else ''}"

    has_ratio = any(row.get("ratio") is not None for row in rows)
    below = "cells/s, median and range of the rounds" + ("; x: of the baseline" if has_ratio else "")
    return _points(pyplot, rows, "cells_per_second", words, (f"Throughput: {title}", below), path)


def _limit(pyplot: Any, rows: Sequence[Facts], title: str, path: Path) -> Path:
    def words(row: Facts) -> str:
        return f"{_digits(row['percent_of_limit'])} % of {row['limit']}"

    below = "percent of what this machine can do, measured in the same run"
    rows = [row for row in rows if row["percent_of_limit"] is not None]
    return _points(pyplot, rows, "percent_of_limit", words, (f"Percent of limit: {title}", below), path, limit=100.0)


def _disk(pyplot: Any, rows: Sequence[Facts], path: Path) -> Path:
    said = ("Size on disk of what is read", "MB")
    return _points(pyplot, rows, "disk_mb", lambda row: f"{row['disk_mb']:,.1f}", said, path, is_linear=True)


def _points(
    pyplot: Any,
    rows: Sequence[Facts],
    key: str,
    words: Callable[[Facts], str],
    said: tuple[str, str],
    path: Path,
    *,
    limit: float | None = None,
    is_linear: bool = False,
) -> Path:
    """Draw a point a row, the largest on top, its figure beside it. said: title and what the axis means; limit: drawn as a line."""
    ordered, styles = sorted(rows, key=lambda row: row[key]), _styles(rows)
    figure, axes = pyplot.subplots(figsize=(9, 1.4 + 0.32 * len(rows)), layout="constrained")
    values = [row[key] for row in ordered]
    low, high = min(values), max([*values, limit or 0])
    left, right_end = (0.0, 1.3 * high) if is_linear else (low / 1.6, high * max(1.6, (high / low) ** 0.45))
    axes.set(xscale="linear" if is_linear else "log", xlim=(left, right_end), ylim=(-0.7, len(rows) - 0.3))
    if not is_linear:
        axes.set_xticks(_ticks(left, right_end))
        axes.minorticks_off()
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    for number, row in enumerate(ordered):
        colour, mark, _ = styles[row["label"]]
        axes.hlines(number, left, row[key], color=colour, linewidth=1, alpha=0.35)
        right = row.get("highest", row[key]) if key == "cells_per_second" else row[key]
        if key == "cells_per_second" and "lowest" in row:
            axes.hlines(number, row["lowest"], row["highest"], color=colour, linewidth=3, alpha=0.6)
        axes.plot([row[key]], [number], marker=mark, color=colour, markersize=7)
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # a line behind the words does not cross them
        axes.annotate(words(row), (right, number), xytext=(8, 0), textcoords="offset points", va="center", fontsize=8.5, bbox=box)
    if limit is not None:
        axes.axvline(limit, color=RED, linewidth=1.2, zorder=0)
        axes.annotate("the limit", (limit, -0.6), xytext=(-4, 0), textcoords="offset points", ha="right", fontsize=8.5, color=RED)
    axes.set_yticks(range(len(ordered)), [row["label"] for row in ordered])
    for tick, row in zip(axes.get_yticklabels(), ordered, strict=True):
        tick.set_fontweight("bold" if _family(row["label"]) == "scdl_gpu" else "normal")
    return _saved(pyplot, figure, axes, said, path)


def _ticks(low: float, high: float) -> list[float]:
    """Give round numbers for a logarithmic axis: 1, 2 and 5 times powers of ten, or the powers alone where those are many."""
    powers = [10.0**k for k in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    found = [m * power for power in powers for m in (1, 2, 5) if low <= m * power <= high]
    return found if len(found) <= 7 else [power for power in powers if low <= power <= high]


def _by_batch_size(pyplot: Any, rows: Sequence[Facts], title: str, path: Path) -> Path:
    styles = _styles(rows)
    labels = list(dict.fromkeys(row["label"] for row in rows))
    figure, axes = pyplot.subplots(figsize=(9, max(4.5, 0.3 * len(labels))), layout="constrained")
    sizes = sorted({row["batch_size"] for row in rows})
    last = []
    for label in labels:
        here = sorted((row for row in rows if row["label"] == label), key=lambda row: row["batch_size"])
        colour, mark, dash = styles[label]
        rates = [row["cells_per_second"] for row in here]
        is_ours = _family(label) == "scdl_gpu"
        axes.plot([row["batch_size"] for row in here], rates, marker=mark, color=colour, linestyle=dash, linewidth=2.5 if is_ours else 1.3)
        last.append((rates[-1], here[-1]["batch_size"], label))
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    _name_lines(axes, last, sizes[-1], styles)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_ylabel("cells/s, medians")
    return _saved(pyplot, figure, axes, (f"Throughput by batch size: {title}", "rows of a batch"), path)


def _name_lines(axes: Any, last: Sequence[tuple[float, int, str]], right: int, styles: dict[str, tuple[str, str, str]]) -> None:
    """Write the names of lines beyond their last points, in the order of these, so far apart that none covers another."""
    rates = [rate for rate, _, _ in last]
    low, high = axes.get_ylim()
    step = max(1.12, (high / low) ** (1 / max(20, len(last))))
    places: list[float] = []
    for rate in sorted(rates):
        places.append(max(rate, places[-1] * step) if places else rate)
    top = high / step**0.5
    for n in range(len(places) - 1, -1, -1):  # what was pushed out at the top pushes down what is below
        places[n] = min(places[n], top)
        top = places[n] / step
    for place, (rate, size, label) in zip(places, sorted(last), strict=True):
        line = {"arrowstyle": "-", "color": styles[label][0], "alpha": 0.5, "shrinkA": 0, "shrinkB": 4, "relpos": (0, 0.5)}
        weight = "bold" if _family(label) == "scdl_gpu" else "normal"
        axes.annotate(
            label, (size, rate), xytext=(right * 1.25, place), arrowprops=line, color=styles[label][0], fontsize=8.5, va="center",
            fontweight=weight, annotation_clip=False,
        )  # fmt: skip


def _saved(pyplot: Any, figure: Any, axes: Any, said: tuple[str, str], path: Path) -> Path:
    axes.set_title(said[0], loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(said[1])
    axes.grid(axis="x" if axes.get_yscale() == "linear" else "both", which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path
