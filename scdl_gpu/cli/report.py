"""What commands say: faults and warnings in one line each, tables of facts, numbers as people read them.

Knows texts and exit codes, not archives. A fault is what files, arguments or the machine are to blame for; anything
else is a mistake in this program and keeps its traceback.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated, Any

import typer

from scdl_gpu.errors import ScdlError
from scdl_gpu.version import __version__

FAULTS = (ScdlError, ValueError, OSError)


def _with_dashes(token: str) -> str:
    return token.replace("_", "-")


SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "token_normalize_func": _with_dashes, "max_content_width": 120}
"""Options may be spelt with underscores as well as with dashes."""


class DataDtype(StrEnum):
    """The dtypes that values are stored in."""

    UINT8 = "uint8"
    UINT16 = "uint16"
    UINT32 = "uint32"
    UINT64 = "uint64"
    FLOAT16 = "float16"
    FLOAT32 = "float32"
    FLOAT64 = "float64"


DTYPE_HELP = "Dtype of the stored values: uint8, uint16, uint32, uint64, float16, float32 or float64."

StoredDtypeOption = Annotated[
    DataDtype | None,
    typer.Option(metavar="DTYPE", help="Dtype of the values of archives that do not record it (errors call it data_dtype=)."),
]


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


VersionOption = Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")]


@contextmanager
def reported() -> Iterator[None]:
    """Turn faults into one line on stderr and exit code 1, and warnings into one line each."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            yield
        except BrokenPipeError:
            raise
        except FAULTS as error:
            complain("error", error)
            raise typer.Exit(1) from error


def complain(kind: str, what: object) -> None:
    """Say on stderr, in one line, what is wrong."""
    text = " ".join(str(what).splitlines()) or type(what).__name__
    typer.echo(f"{kind}: {text.removeprefix('Error: ')}", err=True)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    complain("warning", message)


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
