"""`scdl-gpu doctor`: what this machine offers, what works, and what to install or change.

Knows how findings are printed; `machine` and `trial` make them.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scdl_gpu.cli.report import reported

if TYPE_CHECKING:
    from scdl_gpu.cli.machine import Finding

MARKS = {"ok": "ok", "lacking": "--", "fault": "!!"}


def doctor(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where archives lie or will lie: its disk is measured.")] = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
) -> None:
    """Say what this machine offers, and what to install or change.

    Cores, memory with the limits of containers, the speed of a disk (a file of at most 128 MiB, gone afterwards), driver,
    GPUs, torch, CuPy, kvikio and GPUDirect Storage. Then rows are converted, packed and iterated on the CPU and, where there
    is one, on a GPU. Changes no setting. Exit code 0 when the CPU path works.

    \b
    scdl-gpu doctor
    scdl-gpu doctor archives/ --json
    """  # noqa: D301
    with reported():
        from scdl_gpu.cli.machine import findings

        tell = (lambda finding: finding) if as_json else _told
        found = [tell(one) for one in findings(directory)]
        cpu, gpu = trials = [tell(one) for one in _trials()]
        found += trials
        if as_json:
            typer.echo(json.dumps(_document(found, cpu, gpu), indent=2))
        else:
            _advise(found)
    raise typer.Exit(0 if cpu.facts["works"] else 1)


def _trials() -> "Iterator[Finding]":
    import torch

    from scdl_gpu.cli.trial import no_device, try_cpu, try_device

    if sys.stderr.isatty():
        typer.echo("rows are on trial; the first time on a machine kernels are compiled, for about a minute", err=True)
    yield try_cpu()
    yield try_device() if torch.cuda.is_available() else no_device()


def _document(found: "list[Finding]", cpu: "Finding", gpu: "Finding") -> dict[str, Any]:
    return {
        "cpu_works": cpu.facts["works"],
        "gpu_works": gpu.facts["works"],
        "findings": [{"name": one.name, "state": one.state, "words": one.words, "cure": one.cure, **one.facts} for one in found],
    }


def _told(finding: "Finding") -> "Finding":
    """Print a finding as soon as it is made: some take seconds."""
    typer.echo(f"{MARKS[finding.state]}  {finding.name:<10} {finding.words}")
    return finding


def _advise(found: "list[Finding]") -> None:
    """Print what to do, faults first; what only a GPU would need comes last where there is none."""
    has_gpu = any(one.name == "driver" and one.state != "lacking" for one in found)
    cures = [one for state in ("fault", "lacking") for one in found if one.state == state and one.cure]
    now = [one for one in cures if has_gpu or not one.is_for_gpu]
    for title, chosen in (("To install or change:", now), ("With a GPU, also:", [one for one in cures if one not in now])):
        if chosen:
            typer.echo(f"\n{title}")
        for one in chosen:
            typer.echo(f"{MARKS[one.state]}  {one.name:<10} {one.cure}")
