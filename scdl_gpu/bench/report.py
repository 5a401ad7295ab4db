"""What came of a contest, for people and for programs: a table, JSON, CSV.

Knows the record that `contest` leaves, not how it came about. A figure is the median over the rounds, its spread (largest -
smallest) / median; none is without its limit: what crosses memory in batches, against a copy of memory, or a fill where batches are
dense (a copy within the GPU or over the bus, by where the rows lie), or what a cold loader must read, against the disk. Percent of
limit is the median of each round's share of that round's limit. Of a turn that was cut short the figure is what was delivered by then.
"""

import csv
import io
import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Facts = dict[str, Any]
# fmt: off
COLUMNS = (
    "cells_per_second", "lowest", "highest", "spread", "ratio", "gb_per_second", "limit", "percent_of_limit", "first_s", "p50_ms", "p99_ms",
    "wait_percent", "peak_pss_mb", "peak_private_mb", "device_mb", "entropy", "perfect_entropy", "near_pairs", "rows_checked", "disk_mb",
    "resident",
)
# fmt: on
PLACED = {"device": "device copy", "pinned": "host to device", "host": "host to device"}


def check_baseline(baseline: str | None, labels: Sequence[str]) -> None:
    """Raise ValueError where nobody is called as the baseline, before anything is measured."""
    if baseline is not None and baseline not in labels:
        raise ValueError(f"no contender is called {baseline!r}; there are {', '.join(dict.fromkeys(labels))}")


def summary(record: Facts, baseline: str | None = None) -> list[Facts]:
    """Give a row for each line of the record, in its order.

    baseline: label that ratios are to; None: the first bionemo-scdl, if any. Where it has no line there are no ratios.
    """
    labels = [line["label"] for line in record["lines"]]
    base = baseline if baseline is not None else next((label for label in labels if label.startswith("bionemo-scdl")), None)
    rows = [_row(record, line) for line in record["lines"]]
    for row in rows:
        same = [other for other in rows if other["label"] == base and _kind(other) == _kind(row)]
        row["ratio"] = row["cells_per_second"] / same[0]["cells_per_second"] if same else None
    return rows


def _kind(row: Facts) -> tuple[Any, ...]:
    return row["output"], row["batch_size"], row["cache"]


def _row(record: Facts, line: Facts) -> Facts:
    rounds, source = line["rounds"], record["source"]
    rates = [one["cells"] / one["seconds"] for one in rounds]
    batch_bytes = 8 * source["nonzeros"] / source["cells"] + 8 if line["output"] == "csr" else 4 * source["genes"]
    read_bytes = record["sizes"][line["label"]] / source["cells"]
    limit = "disk read" if line["cache"] == "cold" else _limit_of(rounds[0].get("loader", ""), line["output"])
    cell_bytes = read_bytes if line["cache"] == "cold" else batch_bytes
    limits = [record["limits"][one["round"]][limit] for one in rounds]  # 0 of a disk whose pages cannot be dropped
    shares = [rate * cell_bytes / 1e9 / most for rate, most in zip(rates, limits, strict=True) if most]
    rate = statistics.median(rates)
    return {
        **{key: line[key] for key in ("label", "output", "batch_size", "cache")},
        "rounds": len(rounds),
        "cut_short": sum(one["cut_s"] is not None for one in rounds),
        "cells_per_second": rate,
        "lowest": min(rates),
        "highest": max(rates),
        "spread": (max(rates) - min(rates)) / rate if len(rates) > 1 else None,
        "gb_per_second": rate * batch_bytes / 1e9,
        "limit": limit,
        "percent_of_limit": 100 * statistics.median(shares) if shares else None,
        "first_s": _median(rounds, "first_s"),
        "p50_ms": _median(rounds, "p50_s", 1e3),
        "p99_ms": _median(rounds, "p99_s", 1e3),
        "wait_percent": _median(rounds, "wait_share", 100),
        "peak_pss_mb": max(one["peak_pss_bytes"] for one in rounds) / 1e6,
        "peak_private_mb": max(one["peak_private_bytes"] for one in rounds) / 1e6,
        "device_mb": max(one["device_bytes"] for one in rounds) / 1e6,
        "entropy": _median(rounds, "entropy"),
        "perfect_entropy": _median(rounds, "perfect_entropy"),
        "near_pairs": _median(rounds, "near_pairs"),
        "rows_checked": sum(one.get("rows", 0) for one in rounds),
        "disk_mb": record["sizes"][line["label"]] / 1e6,
        "resident": _median(rounds, "resident"),
    }


def _limit_of(words: str, output: str) -> str:
    """Give the limit of a warm loader: of memory, or by the placement that ours names where a GPU is in use."""
    placed = None if "on the cpu" in words else re.search(r"placement (\w+):", words)
    memory = "memory copy" if output == "csr" else "memory fill"
    return PLACED.get(placed[1], memory) if placed else memory


def _median(rounds: Sequence[Facts], key: str, scale: float = 1.0) -> float | None:
    values = [one[key] for one in rounds if one.get(key) is not None]
    return scale * statistics.median(values) if values else None


def as_text(record: Facts, rows: Sequence[Facts]) -> str:
    """Write the tables for people: one for each output, batch size and state of the cache, then stores and limits."""
    parts, source = [], record["source"]
    for kind in dict.fromkeys(_kind(row) for row in rows):
        output, batch_size, cache = kind
        lines = [_words(row) for row in rows if _kind(row) == kind]
        parts.append(f"{output}, batch size {batch_size:,}, {cache} page cache\n{_aligned(_without_empty([HEAD, *lines]))}")
    conversions = [
        [facts["store"], f"{facts['size_bytes'] / 1e6:,.0f}", f"{facts['size_bytes'] / source['nonzeros']:.2f}",
         "was there" if facts["seconds"] is None else f"{facts['seconds']:.1f}", _number(facts.get("peak_private_bytes"), 1e-6)]
        for facts in record["conversions"]
    ]  # fmt: skip
    if conversions:
        parts.append(f"stores, each made once\n{_aligned([['', 'MB', 'bytes/nonzero', 'conversion s', 'private MB'], *conversions])}")
    limits = [_limit_words(name, [one[name] for one in record["limits"]]) for name in (record["limits"] or [{}])[0]]
    if limits:
        parts.append(f"limits of this machine in this run, medians\n{_aligned([['', 'GB/s', 'spread'], *limits])}")
    parts += _failures(record)
    parts += [_cut_words(label, counts, record["rules"]) for label, counts in record["cuts"].items()]
    return "\n\n".join([_head(record), *parts])


def _failures(record: Facts) -> list[str]:
    return [f"{label}: failed: {why.splitlines()[0]}" for label, why in record["failures"].items()]


def _head(record: Facts) -> str:
    """Say what was measured where, and how figures are to be read."""
    source, machine, rules = record["source"], record["machine"], record["rules"]
    shape = f"{source['cells']:,} cells x {source['genes']:,} genes, {source['nonzeros']:,} nonzeros"
    return (
        f"{shape}; rows checked against {record['checked_against']}\n"
        f"{machine['cpu']}, {machine['cores']} cores, {rules['device']}; commit {machine['commit']}; {record['time']}\n"
        f"medians of {rules['rounds']} interleaved rounds, spread (largest - smallest) / median; docs/benchmark.md says what each column is"
    )


def _limit_words(name: str, rates: Sequence[float]) -> list[str]:
    middle = statistics.median(rates)
    return [name, f"{middle:.2f}", _spread((max(rates) - min(rates)) / middle if len(rates) > 1 else None)]


def _spread(spread: float | None) -> str:
    return "-" if spread is None else f"{100 * spread:.0f}%"


def _cut_words(label: str, counts: Facts, rules: Facts) -> str:
    """Say of a loader that was too slow what became of its turns."""
    words = {
        "cut_short": f"cut short after {rules['turn_s']:g} s, or what was left, with figures of what was delivered by then",
        "without_a_batch": "without a batch in that time",
        "left_out": f"left out, the {rules['loader_s']:g} s of all its turns being used up",
    }
    return f"{label}, turns: {'; '.join(f'{counts[how]} {what}' for how, what in words.items() if counts[how])}"


def _without_empty(lines: Sequence[Sequence[str]]) -> list[list[str]]:
    """Leave out columns in which nothing stands below the head."""
    kept = [n for n, column in enumerate(zip(*lines[1:], strict=True)) if set(column) != {"-"}]
    return [[line[n] for n in kept] for line in lines]


HEAD = ["", "cells/s", "rounds", "spread", "ratio", "GB/s", "% of limit", "first s", "p50 ms", "p99 ms", "wait %", "PSS MB", "private MB",
        "GPU MB", "entropy", "near x", "disk MB", "in cache"]  # fmt: skip


def _words(row: Facts) -> list[str]:
    entropy = "-" if row["entropy"] is None else f"{row['entropy']:.2f}/{row['perfect_entropy']:.2f}"
    return [
        row["label"], f"{row['cells_per_second']:,.0f}", f"{row['rounds']}{' cut' if row['cut_short'] else ''}",
        _spread(row["spread"]), _number(row["ratio"], digits=2),
        f"{row['gb_per_second']:.2f}", _share(row), _number(row["first_s"], digits=2),
        _number(row["p50_ms"], digits=2),
        _number(row["p99_ms"], digits=2), _number(row["wait_percent"]), _number(row["peak_pss_mb"]), _number(row["peak_private_mb"]),
        _number(row["device_mb"]) if row["device_mb"] else "-", entropy, _number(row["near_pairs"], digits=1), _number(row["disk_mb"]),
        f"{100 * row['resident']:.0f}%",
    ]  # fmt: skip


def _share(row: Facts) -> str:
    """Give the percent of which limit, two digits that count below ten: 0.034, 7.3, 85; "-" where there is no limit."""
    share = row["percent_of_limit"]
    return "-" if share is None else f"{share:.0f} {row['limit']}" if share >= 10 else f"{share:.2g} {row['limit']}"


def _number(value: float | None, scale: float = 1.0, digits: int = 0) -> str:
    return "-" if value is None else f"{value * scale:,.{digits}f}"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(f"{word:{'<' if n == 0 else '>'}{width}}" for n, (word, width) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


def as_markdown(record: Facts, rows: Sequence[Facts]) -> str:
    """Write what a page of results needs as tables in Markdown: speed, spread, limit and shuffling of each kind of batch."""
    parts = ["\n".join(f"{line}  " for line in _head(record).splitlines())]
    for kind in dict.fromkeys(_kind(row) for row in rows):
        lines = [
            ["", "cells/s", "spread", "ratio", "% of limit", "entropy / perfect", "near x", "disk MB"],
            ["---"] * 8,
            *([words[n] for n in (0, 1, 3, 4, 6, 14, 15, 16)] for words in (_words(row) for row in rows if _kind(row) == kind)),
        ]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"**{kind[0]}, batch size {kind[1]:,}, {kind[2]} page cache**\n\n{table}")
    parts += [f"* {failure}" for failure in _failures(record)]
    parts += [f"* {_cut_words(label, counts, record['rules'])}" for label, counts in record["cuts"].items()]
    return "\n\n".join(parts)


def as_csv(rows: Sequence[Facts]) -> str:
    """Write the summary as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, ["label", "output", "batch_size", "cache", "rounds", "cut_short", *COLUMNS], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write(record: Facts, rows: Sequence[Facts], *, json_path: Path | None, csv_path: Path | None) -> None:
    """Write the files that are wanted; JSON holds every round."""
    if json_path is not None:
        json_path.write_text(json.dumps(record | {"summary": list(rows)}, indent=1) + "\n")
    if csv_path is not None:
        csv_path.write_text(as_csv(rows))
