"""`scdl-gpu bench`, and `benchmarks/tahoe100m.py`: loaders side by side, with the limits of the machine.

Knows options; the work is `scdl_gpu.bench`'s. Where the flags of bionemo-scdl's speed test mean the same they are called the same.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scdl_gpu.cli.report import path_here, reported

if TYPE_CHECKING:
    from scdl_gpu.bench.source import Source


def _one_of(*known: str) -> Any:
    def check(given: Any) -> Any:
        for one in given if isinstance(given, list) else [given]:
            if one is not None and one not in known:
                raise typer.BadParameter(f"{one!r} is none of {', '.join(known)}")
        return given

    return check


def _listed(given: list[str] | None) -> list[str] | None:
    """Let values of a repeated option also stand in one, parted by commas."""
    return None if given is None else [word for words in given for word in words.split(",") if word]


def _numbers(given: list[str]) -> list[int]:
    try:
        return [int(word) for word in _listed(given) or []]
    except ValueError as error:
        raise typer.BadParameter(f"{','.join(given)!r} is no list of numbers such as 64,1024") from error


Input = Annotated[
    list[Path] | None,
    typer.Option(
        "--input",
        "-i",
        parser=path_here,
        metavar="PATH",
        help="h5ad files, a directory of them, or an archive; may be repeated. Nothing: plates are made.",
    ),
]
Cells = Annotated[int, typer.Option(metavar="N", min=1, help="Cells of the plates that are made, 10,000 to 100,000,000.")]
Plates = Annotated[int, typer.Option(metavar="P", min=1, help="Plates that are made.")]
Genes = Annotated[int, typer.Option(metavar="N", min=100, help="Genes of the plates that are made.")]
Folder = Annotated[Path, typer.Option(metavar="DIR", help="Where plates, stores and environments are kept for the next run.")]
UseX = Annotated[bool, typer.Option("--use-X-not-raw", help="Take X where there is a raw.X too.")]
ScdlPath = Annotated[
    Path | None, typer.Option(metavar="ARCHIVE", help="A raw archive of the input, for bionemo-scdl to read instead of converting.")
]
Sampling = Annotated[
    str,
    typer.Option(
        "--sampling-scheme",
        "-s",
        callback=_one_of("shuffle", "sequential", "random"),
        metavar="shuffle|sequential|random",
        help="random: with replacement, which not all can.",
    ),
]
BatchSizes = Annotated[list[str], typer.Option("--batch-size", metavar="N[,N]", help="Rows of a batch; several are measured in turn.")]
Outputs = Annotated[list[str], typer.Option("--output", metavar="csr|dense", help="What batches are; both with csr,dense.")]
Caches = Annotated[
    list[str], typer.Option("--cache", metavar="warm|cold", help="Page cache; cold: pages dropped, one epoch, its start included.")
]
MaxTime = Annotated[float, typer.Option(metavar="SECONDS", min=0.01, help="Timed seconds of each loader in each round.")]
Warmup = Annotated[
    float, typer.Option("--warmup-time", metavar="SECONDS", min=0, help="Untimed seconds before; the first batch is untimed anyway.")
]
Runs = Annotated[int, typer.Option("--num-runs", metavar="N", min=1, help="Rounds in which all take their turn; figures are medians.")]
Epochs = Annotated[
    int | None,
    typer.Option(
        "--num-epochs", metavar="N", min=1, help="Epochs of a loader in a round at most.", show_default="as many as the time holds"
    ),
]
TurnLimit = Annotated[
    float, typer.Option("--turn-limit", metavar="SECONDS", min=0.1, help="Of one turn of a loader, opening included; then it is cut short.")
]
LoaderLimit = Annotated[
    float, typer.Option("--loader-limit", metavar="SECONDS", min=0.1, help="Of all turns of a loader; it is left out of the rest.")
]
Seed = Annotated[int, typer.Option(metavar="N", help="Of the order of rows, and of the plates that are made.")]
Check = Annotated[
    int, typer.Option(metavar="N", min=0, help="Batches of each loader in each round that are compared with the source; 0: none.")
]
Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda[:N]", help="Where our batches are made.")]
Placement = Annotated[
    str,
    typer.Option(callback=_one_of("auto", "device", "pinned", "host"), metavar="auto|device|pinned|host", help="Where our rows lie."),
]
Windows = Annotated[
    bool | None, typer.Option("--windows/--no-windows", help="Stream windows of rows from disk.", show_default="the loader's choice")
]
Packed = Annotated[bool | None, typer.Option("--packed/--raw", help="One of the two formats only.", show_default="both")]
Workers = Annotated[
    list[str],
    typer.Option("--workers", "--num-workers", metavar="N[,N]", help="Processes of a DataLoader around our loader; 0: the loader itself."),
]
WorldSize = Annotated[int, typer.Option(metavar="N", min=1, help="Ranks that torchrun starts for our loader; cells/s are those of all.")]
Peers = Annotated[
    list[str] | None, typer.Option(metavar="NAME[,NAME]", help="Loaders of others: names of files in benchmarks/peers/, or all.")
]
BuildPeers = Annotated[bool, typer.Option("--build-peers", help="Make the environments that they need with pip.")]
GenerateBaseline = Annotated[bool, typer.Option("--generate-baseline", help="The same as --peers annloader.")]
Baseline = Annotated[
    str | None, typer.Option(metavar="LABEL", help="The line that ratios are to.", show_default="bionemo-scdl, if it takes part")
]
Json = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Every round and all facts.", show_default="results.json beside the plates")
]
Csv = Annotated[
    Path | None, typer.Option("--csv", metavar="FILE", help="A row a line of the tables.", show_default="results.csv beside the plates")
]
Report = Annotated[
    Path | None,
    typer.Option(
        "--report", "-o", metavar="FILE", help="The tables, too; in Markdown, shortened, where it ends in .md.", show_default="stdout only"
    ),
]
Plots = Annotated[bool, typer.Option(help="PNG files beside the results; they need matplotlib.")]


def bench(
    source: Input = None,
    cells: Cells = 20_000,
    plates: Plates = 14,
    genes: Genes = 62_710,
    folder: Folder = Path("bench-data"),
    use_x_not_raw: UseX = False,
    scdl_path: ScdlPath = None,
    sampling: Sampling = "shuffle",
    batch_sizes: BatchSizes = ["64", "1024"],  # noqa: B006 - typer takes lists
    outputs: Outputs = ["csr"],  # noqa: B006
    caches: Caches = ["warm", "cold"],  # noqa: B006
    max_time: MaxTime = 3.0,
    warmup_time: Warmup = 1.0,
    num_runs: Runs = 3,
    num_epochs: Epochs = None,
    turn_limit: TurnLimit = 60.0,
    loader_limit: LoaderLimit = 600.0,
    seed: Seed = 0,
    check: Check = 32,
    device: Device = "auto",
    placement: Placement = "auto",
    windows: Windows = None,
    packed: Packed = None,
    workers: Workers = ["0"],  # noqa: B006
    world_size: WorldSize = 1,
    peers: Peers = None,
    build_peers: BuildPeers = False,
    generate_baseline: GenerateBaseline = False,
    baseline: Baseline = None,
    json_path: Json = None,
    csv_path: Csv = None,
    report_path: Report = None,
    plots: Plots = True,
) -> None:
    """Measure loaders side by side: cells/s beside the limits of the machine, memory, disk, and how well they shuffle.

    Each runs in a process of its own, they take turns round by round, and a sample of the batches of all is compared with the source.
    With --peers others take part: their environments are made on request, their stores by their own converters.

    \b
    scdl-gpu bench                                        20,000 Tahoe-like cells, our loader alone
    scdl-gpu bench --peers bionemo-scdl,annbatch --build-peers
    scdl-gpu bench -i /data/tahoe --use-X-not-raw --max-time 120 --warmup-time 30
    """  # noqa: D301
    with reported():
        given = dict(locals())
        given.update(outputs=_one_of("csr", "dense")(_listed(outputs)), caches=_one_of("warm", "cold")(_listed(caches)))
        given.update(batch_sizes=_numbers(batch_sizes), workers=_numbers(workers), peers=_listed(peers) or [])
        _bench(given)


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _bench(given: dict[str, Any]) -> None:
    from scdl_gpu.bench import report
    from scdl_gpu.bench.contest import Contest, Rules

    source, place = _source(given)
    (logs := place / "logs").mkdir(exist_ok=True)
    rules = Rules(
        batch_sizes=given["batch_sizes"],
        outputs=given["outputs"],
        caches=given["caches"],
        rounds=given["num_runs"],
        max_s=given["max_time"],
        warmup_s=given["warmup_time"],
        epochs=given["num_epochs"],
        check=given["check"],
        turn_s=given["turn_limit"],
        loader_s=given["loader_limit"],
        sampling=given["sampling"],
        seed=given["seed"],
        device=_device(given["device"]),
    )
    start = time.perf_counter()
    table, against = source.table(place, _progress("looking at the source")) if given["check"] else (None, "nothing")
    contenders = _contenders(given, source, place)
    report.check_baseline(given["baseline"], [one.label for one in contenders])
    contest = Contest(source, contenders, rules, logs=logs, say=_say)
    contest.run(table)
    record = contest.record() | {"checked_against": against, "seconds": time.perf_counter() - start}
    rows = report.summary(record, given["baseline"])
    json_path, csv_path = given["json_path"] or place / "results.json", given["csv_path"] or place / "results.csv"
    report.write(record, rows, json_path=json_path, csv_path=csv_path)
    text = report.as_text(record, rows)
    typer.echo(text)
    if given["report_path"] is not None:
        is_page = given["report_path"].suffix == ".md"
        given["report_path"].write_text((report.as_markdown(record, rows) if is_page else text) + "\n")
    _say(f"{record['seconds']:.0f} s; {json_path}, {csv_path}{_plots(given, rows, place)}")
    if contest.failures:
        raise typer.Exit(1)


def _source(given: dict[str, Any]) -> "tuple[Source, Path]":
    """Open what is given, or make plates; returns it with the folder for its stores and results."""
    from scdl_gpu.bench.source import open_source

    paths: list[Path] = given["source"] or []
    if paths:
        source = open_source(paths, use_x=given["use_x_not_raw"])
        place = given["folder"] / f"{paths[0].resolve().stem}-{source.stamp}"
        place.mkdir(parents=True, exist_ok=True)
        return source, place
    from scdl_gpu.bench.plates import write_plates

    sizes = {"n_plates": given["plates"], "n_vars": given["genes"], "seed": given["seed"]}
    place = given["folder"] / f"plates-{given['cells']}-{given['plates']}-{given['genes']}-{given['seed']}"
    start = time.perf_counter()
    paths = write_plates(place / "h5ad", given["cells"], **sizes, told=_progress("making plates"))
    _say(f"{given['cells']:,} cells in {len(paths)} plates below {place / 'h5ad'}, {time.perf_counter() - start:.1f} s")
    return open_source(paths, use_x=given["use_x_not_raw"]), place


def _progress(what: str) -> Any:
    """Make a function that says how far something has come, at most every five seconds."""
    last = time.perf_counter()

    def told(done: int, total: int) -> None:
        nonlocal last
        if time.perf_counter() - last > 5 and done < total:
            last = time.perf_counter()
            _say(f"{what}: {done:,} of {total:,} cells")

    return told


def _device(asked: str) -> str:
    if asked != "auto":
        return asked
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _contenders(given: dict[str, Any], source: "Source", place: Path) -> Any:
    from scdl_gpu.bench import contenders, peer

    stores = place / "stores"
    stores.mkdir(exist_ok=True)
    formats = {None: ["raw", "packed"], True: ["packed"], False: ["raw"]}[given["packed"]]
    settings = {key: given[key] for key in ("device", "placement", "windows")}
    found = contenders.ours(source, stores, formats=formats, workers=given["workers"], world_size=given["world_size"], settings=settings)
    names = peer.names() if given["peers"] == ["all"] else given["peers"]
    names = [*names, *(["annloader"] if given["generate_baseline"] and "annloader" not in names else [])]
    how = {"home": given["folder"] / "peers", "builds": given["build_peers"], "archive": given["scdl_path"], "sampling": given["sampling"]}
    return found + contenders.peers(names, source, stores, say=_say, **how)


def _plots(given: dict[str, Any], rows: list[dict[str, Any]], place: Path) -> str:
    if not given["plots"]:
        return ""
    from scdl_gpu.bench.plots import write_plots

    try:
        return f", {len(write_plots(rows, place / 'plots'))} plots in {place / 'plots'}"
    except ModuleNotFoundError as error:
        return f"; {error}"
