"""The CUDA sources beside this file, as text.

Knows files and their names, not what they compute or who compiles them.
"""

import re
from pathlib import Path

FOLDER = Path(__file__).parent
INCLUDE = re.compile(r'^#include "(\w+\.cuh)"$', re.MULTILINE)


def stems() -> list[str]:
    """List the sources, without .cu."""
    return sorted(path.stem for path in FOLDER.glob("*.cu"))


def stem_of(name: str) -> str:
    """Give the source of a kernel: its name begins with that of its file. Raises LookupError where there is none."""
    found = [stem for stem in stems() if name.startswith(stem)]
    if not found:
        raise LookupError(f"no CUDA source in {FOLDER} for a kernel named {name}; there are {', '.join(stems())}")
    return max(found, key=len)


def text(stem: str) -> str:
    """Give a source with what it includes in place, so that a compiler needs no include path."""
    return INCLUDE.sub(lambda found: (FOLDER / found[1]).read_text(), (FOLDER / f"{stem}.cu").read_text())
