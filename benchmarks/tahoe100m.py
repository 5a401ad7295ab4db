"""Loaders side by side on Tahoe-100M, or on plates like it: cells/s beside the limits of the machine, memory, disk, shuffling.

    python benchmarks/tahoe100m.py                                                  20,000 cells, our loader alone
    python benchmarks/tahoe100m.py --peers bionemo-scdl,annbatch --build-peers      others too, in environments made for them
    python benchmarks/tahoe100m.py -i TAHOE --use-X-not-raw --max-time 120 --warmup-time 30   the 14 plates themselves

The same as `scdl-gpu bench`; `--help` has all options, docs/benchmark.md what each figure means.
"""

import typer

from scdl_gpu.cli.bench import bench
from scdl_gpu.cli.report import SETTINGS


def main() -> None:
    """Run the command."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, context_settings=SETTINGS)
    app.command(context_settings=SETTINGS)(bench)
    app()


if __name__ == "__main__":
    main()
