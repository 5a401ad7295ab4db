"""Where commands begin: `scdl-gpu` here, `convert_h5ad_to_scdl` in its module.

Knows what Ctrl-C does, at any time: all that a command needs is imported after that is settled.
"""

import sys
from importlib import import_module

INTERRUPTED = 130
"""The exit code of a command that was interrupted, as shells have it: 128 and the number of the signal."""


def main() -> None:
    """Run `scdl-gpu`."""
    run("scdl_gpu.cli.commands")


def run(module: str) -> None:
    """Run the `app` of a module of commands; Ctrl-C ends it with one line and exit code 130."""
    try:
        import_module(module).app()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(INTERRUPTED)
