"""Warnings to whoever called this package, whatever lies between.

Knows frames and file names, not what is warned of. A fixed `stacklevel` would count functions that come and go; looking
for the first frame outside the package costs a walk up the stack, once a warning. Which warnings are shown is a state of the
whole process: whoever silences others' warnings, and whoever warns, take turns, or warnings of one thread would be lost
while another one reads.
"""

import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TURN = threading.RLock()
_INSIDE = str(Path(__file__).parent) + os.sep


def warn(message: str) -> None:
    """Raise a UserWarning that points at the innermost line outside this package."""
    level, frame = 2, sys._getframe(1)
    while frame.f_code.co_filename.startswith(_INSIDE) and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    with _TURN:
        warnings.warn(message, UserWarning, stacklevel=level)


@contextmanager
def silenced() -> Iterator[None]:
    """Show none of the warnings that other packages raise in here; no other thread warns meanwhile."""
    with _TURN, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
