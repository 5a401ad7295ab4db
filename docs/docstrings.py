"""Docstrings as pages show them: lines that explain arguments become a list.

The package explains arguments line by line, `name: text` or `name, other: text`, and Markdown would run such lines together.
mkdocstrings loads this when the site is built; the package itself does not know of it.
"""

import re
from typing import Any

from griffe import Extension, Object

ARGUMENT = re.compile(r"^((?:\*{0,2}[a-z_]\w*)(?:, \*{0,2}[a-z_]\w*)*): ")


def listed(text: str) -> str:
    """Make a list of each run of lines that begin with names of arguments; the summary, which comes first, stays."""
    summary, *paragraphs = text.split("\n\n")
    return "\n\n".join([summary, *map(_listed_paragraph, paragraphs)])


def _listed_paragraph(paragraph: str) -> str:
    lines: list[str] = []
    for line in paragraph.splitlines():
        if match := ARGUMENT.match(line):
            lines.append(f"* **{match[1]}**: {line[match.end() :]}")
        elif lines and lines[-1].startswith("* ") and line.startswith(" "):
            lines[-1] += " " + line.strip()
        elif lines and lines[-1].startswith("* "):
            lines += ["", line]
        else:
            lines += ["", line] if lines and not lines[-1] else [line]
    for k in range(len(lines) - 1, 0, -1):
        if lines[k].startswith("* ") and not lines[k - 1].startswith("* "):
            lines.insert(k, "")
    return "\n".join(lines)


class ArgumentLists(Extension):
    """Rewrites every docstring when it is collected."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        """Make lists of the arguments in the docstring of a function, class or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = listed(obj.docstring.value)
