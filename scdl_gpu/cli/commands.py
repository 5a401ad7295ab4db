"""`scdl-gpu`: convert, concat, pack, unpack, info and verify archives from a shell, look at the machine, and measure loaders.

Knows the commands and their order in the help; each is a file of its own, which imports what it works with when it is
run: the help must not wait for it.
"""

import typer

from scdl_gpu.cli.bench import bench
from scdl_gpu.cli.concat import concat
from scdl_gpu.cli.convert import convert
from scdl_gpu.cli.doctor import doctor
from scdl_gpu.cli.example_data import example_data
from scdl_gpu.cli.info import info
from scdl_gpu.cli.pack import pack, unpack
from scdl_gpu.cli.report import SETTINGS, VersionOption
from scdl_gpu.cli.verify import verify

app = typer.Typer(
    name="scdl-gpu",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings=SETTINGS,
)
for command in (convert, concat, pack, unpack, info, verify, doctor, example_data, bench):
    app.command(context_settings=SETTINGS)(command)


@app.callback()
def scdl_gpu(version: VersionOption = False) -> None:
    """Single-cell count matrices as archives that training reads faster than it can compute.

    \b
    scdl-gpu convert pbmc.h5ad pbmc         an h5ad becomes an archive
    scdl-gpu convert plates/ all            so do all h5ad files below a directory, as one
    scdl-gpu info pbmc                      what is in it
    scdl-gpu verify pbmc                    read every byte of it, and name the first fault
    scdl-gpu concat day1 day2 both          archives one after the other
    scdl-gpu pack pbmc pbmc-packed          a fifth to a tenth of the bytes; unpack goes back
    scdl-gpu doctor                         what this machine offers, and lacks
    scdl-gpu example-data                   fetch the example of bionemo-scdl's README
    scdl-gpu bench                          loaders side by side, on cells like Tahoe-100M's

    Raw archives are directories that bionemo-scdl opens too. `scdl-gpu COMMAND --help` says more.
    Results go to stdout, progress and faults to stderr; the exit code is 0 for success, 1 for a fault, 2 for wrong usage.
    """  # noqa: D301
