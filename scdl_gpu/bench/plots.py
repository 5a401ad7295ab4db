"""The pictures of a contest: throughput by loader and by batch size, sizes on disk, percent of limit.

Knows the rows that `report.summary` gives. Needs matplotlib, of the extra `bench`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Facts = dict[str, Any]
OURS, OTHERS = "#1b7837", "#9aa5b1"


def write_plots(rows: Sequence[Facts], folder: Path) -> list[Path]:
    """Write the PNG files; returns their paths. Raises ModuleNotFoundError, saying what to install, where matplotlib is not."""
    try:
        import matplotlib as mpl
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need matplotlib: pip install 'scdl-gpu[bench]', or leave them out with --no-plots") from error
    mpl.use("agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for output, batch_size, cache in dict.fromkeys((row["output"], row["batch_size"], row["cache"]) for row in rows):
        here = [row for row in rows if (row["output"], row["batch_size"], row["cache"]) == (output, batch_size, cache)]
        name, title = f"{output}-{batch_size}-{cache}", f"{output}, batch size {batch_size:,}, {cache} page cache"
        written.append(_bars(pyplot, here, "cells_per_second", f"cells/s: {title}", folder / f"throughput-{name}.png"))
        written.append(_bars(pyplot, here, "percent_of_limit", f"percent of limit: {title}", folder / f"limit-{name}.png"))
    for output, cache in dict.fromkeys((row["output"], row["cache"]) for row in rows):
        here = [row for row in rows if (row["output"], row["cache"]) == (output, cache)]
        if len({row["batch_size"] for row in here}) > 1:
            written.append(_by_batch_size(pyplot, here, f"{output}, {cache} page cache", folder / f"batch-size-{output}-{cache}.png"))
    if first := list({row["label"]: row for row in rows}.values()):
        written.append(_bars(pyplot, first, "disk_mb", "MB on disk", folder / "disk.png"))
    return written


def _bars(pyplot: Any, rows: Sequence[Facts], key: str, title: str, path: Path) -> Path:
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.38 * len(rows)), layout="constrained")
    ordered = sorted(rows, key=lambda row: row[key])
    colours = [OURS if row["label"].startswith("scdl_gpu") else OTHERS for row in ordered]
    bars = axes.barh([row["label"] for row in ordered], [row[key] for row in ordered], color=colours)
    words = [f"{row[key]:,.0f}" + (f" % of {row['limit']}" if key == "percent_of_limit" else "") for row in ordered]
    axes.bar_label(bars, words, padding=4, fontsize=8)
    axes.margins(x=0.25)
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _by_batch_size(pyplot: Any, rows: Sequence[Facts], title: str, path: Path) -> Path:
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for label in dict.fromkeys(row["label"] for row in rows):
        here = sorted((row for row in rows if row["label"] == label), key=lambda row: row["batch_size"])
        style = {"linewidth": 2.5} if label.startswith("scdl_gpu") else {"linewidth": 1, "linestyle": "--"}
        axes.plot([row["batch_size"] for row in here], [row["cells_per_second"] for row in here], marker="o", label=label, **style)
    axes.set(xscale="log", yscale="log", xlabel="batch size", ylabel="cells/s")
    sizes = sorted({row["batch_size"] for row in rows})
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.set_title(f"cells/s by batch size: {title}", loc="left", fontsize=10)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
