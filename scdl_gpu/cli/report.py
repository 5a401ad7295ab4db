"""What commands say: faults and warnings in one line each, tables of facts, numbers as people read them.

Knows texts and exit codes, not archives. A fault is what files, arguments or the machine are to blame for; anything
else is a mistake in this program and keeps its traceback.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from scdl_gpu.cli import INTERRUPTED
from scdl_gpu.errors import ScdlError
from scdl_gpu.version import __version__

FAULTS = (ScdlError, ValueError, OSError)
NO_FLAGS: Mapping[str, str] = {}


def _with_dashes(token: str) -> str:
    return token.replace("_", "-")


SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "token_normalize_func": _with_dashes, "max_content_width": 120}
"""Options may be spelt with underscores as well as with dashes."""


DTYPES = ("uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64")
DTYPE_HELP = "Dtype of the stored values: uint8, uint16, uint32, uint64, float16, float32 or float64."


def dtype_of(name: str | None) -> str | None:
    """Check the name of a dtype that values are stored in."""
    if name is not None and name not in DTYPES:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(DTYPES)}")
    return name


DataDtypeOption = Annotated[
    str | None, typer.Option("--data-dtype", callback=dtype_of, metavar="DTYPE", help=DTYPE_HELP, show_default="float32")
]

StoredDtypeOption = Annotated[
    str | None, typer.Option(callback=dtype_of, metavar="DTYPE", help="Dtype of the values of raw archives that do not record it.")
]


def path_here(text: str) -> Path:
    """Take a path. Raises BadParameter for a URL, which would be told to be no directory."""
    if "://" in text:
        from scdl_gpu.archive.remote import ONLY, WAY_OUT
        from scdl_gpu.transport import is_url, shown

        if is_url(text):
            raise typer.BadParameter(f"{shown(text)} is a URL, expected a path: {ONLY}; {WAY_OUT}")
    return Path(text)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


VersionOption = Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")]


@contextmanager
def reported(flags: Mapping[str, str] = NO_FLAGS) -> Iterator[None]:
    """Turn faults into one line on stderr and exit code 1, Ctrl-C into one and 130, and warnings into one line each.

    flags: words of messages, and what this command calls it.
    """
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: complain("warning", message, flags)
        try:
            yield
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            raise
        except FAULTS as error:
            complain("error", error, flags)
            raise typer.Exit(1) from error


def complain(kind: str, what: object, flags: Mapping[str, str] = NO_FLAGS) -> None:
    """Say on stderr, in one line, what is wrong."""
    text = " ".join(str(what).splitlines()) or type(what).__name__
    for word, flag in flags.items():
        text = text.replace(word, flag)
    typer.echo(f"{kind}: {text.removeprefix('Error: ')}", err=True)


def tell(facts: Mapping[str, str]) -> None:
    """Print facts on stdout, a line each, their names in a column; further lines of a fact are indented."""
    width = max(map(len, facts))
    for name, fact in facts.items():
        first, *rest = fact.split("\n")
        typer.echo(f"{name:<{width}}  {first}".rstrip())
        for line in rest:
            typer.echo(f"{'':<{width}}  {line}")


def size(n_bytes: int) -> str:
    """Spell a number of bytes: 1,234 bytes, 1.2 MB."""
    scaled, unit = float(n_bytes), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if scaled < 1000:
            break
        scaled, unit = scaled / 1000, larger
    return f"{n_bytes} bytes" if unit == "bytes" else f"{scaled:.3g} {unit}"
