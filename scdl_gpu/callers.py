"""Warnings to whoever called this package, whatever lies between.

Knows frames and file names, not what is warned of. A fixed `stacklevel` would count functions that come and go; looking
for the first frame outside the package costs a walk up the stack, once a warning.
"""

import os
import sys
import warnings
from pathlib import Path

_INSIDE = str(Path(__file__).parent) + os.sep


def warn(message: str) -> None:
    """Raise a UserWarning that points at the innermost line outside this package."""
    level, frame = 2, sys._getframe(1)
    while frame.f_code.co_filename.startswith(_INSIDE) and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)
