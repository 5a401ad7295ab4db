"""The public names and their signatures are those of the committed snapshot.

A name leaves or changes only with a deprecation. After a change that is meant run
`python tests/house/test_public_names.py`, and read the diff.
"""

import difflib
import enum
import importlib
import importlib.util
import inspect
import re
import types
from collections.abc import Iterator
from pathlib import Path

SNAPSHOT = Path(__file__).with_name("public_api.txt")
FRONTS = ("scdl_gpu", "scdl_gpu.compat")
PROTOCOL = {"__call__", "__contains__", "__enter__", "__eq__", "__exit__", "__getitem__", "__getitems__", "__iter__", "__len__", "__next__"}


def signature(function: object) -> str:
    """Give the parameters and defaults of a callable; annotations are left to mypy, their text depends on the Python version."""
    try:
        found = inspect.signature(function)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return "(...)"
    bare = [p.replace(annotation=p.empty) for p in found.parameters.values()]
    spelled = [p if p.default is p.empty else p.replace(default=Spelled(p.default)) for p in bare]
    return str(found.replace(parameters=spelled, return_annotation=found.empty))


class Spelled:
    """A default value that prints itself as one would write it, the same in every run and Python version."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __repr__(self) -> str:
        if isinstance(self.value, enum.Enum):
            return str(self.value.__class__.__name__) + "." + self.value.name
        if isinstance(self.value, type | types.FunctionType):
            return self.value.__qualname__
        return re.sub(r" at 0x[0-9a-f]+", "", repr(self.value))


def members_of(cls: type) -> Iterator[str]:
    """Give a line for each public member of a class that this package defines."""
    if issubclass(cls, enum.Enum):
        yield from (f"    {name} = {Spelled(member.value)!r}" for name, member in cls.__members__.items())
    ours = [base for base in cls.__mro__ if base.__module__.split(".")[0] == "scdl_gpu"]
    names = {name for base in ours for name in (*vars(base), *vars(base).get("__dataclass_fields__", ()))}
    for name in sorted(names):
        if (name.startswith("_") and name not in PROTOCOL) or name in getattr(cls, "__members__", ()):
            continue
        member = inspect.getattr_static(cls, name, None)
        if isinstance(member, staticmethod | classmethod):
            yield f"    {type(member).__name__} {name}{signature(getattr(cls, name))}"
        elif inspect.isfunction(member):
            yield f"    {name}{signature(member)}"
        else:
            yield f"    {name}"


def describe(name: str, value: object) -> Iterator[str]:
    """Give the lines for one public name."""
    if isinstance(value, type):
        bases = ", ".join(base.__name__ for base in value.__bases__ if base is not object)
        init = "" if issubclass(value, enum.Enum | BaseException) else signature(value)
        yield f"class {name}{init}" + (f"  < {bases}" if bases else "")
        yield from members_of(value)
    elif callable(value):
        yield f"def {name}{signature(value)}"
    else:
        yield f"{name}: {type(value).__name__}"


def public_api() -> str:
    """Describe the public names of the front doors as they are now."""
    lines = []
    for front in FRONTS:
        lines.append(f"# {front}")
        if importlib.util.find_spec(front) is None:
            lines.append("(not there)")
            continue
        module = importlib.import_module(front)
        for name in sorted(getattr(module, "__all__", ())):
            lines += describe(name, getattr(module, name))
    return "\n".join(lines) + "\n"


def test_public_names_are_those_of_the_snapshot() -> None:
    """Names, signatures, defaults, members and enum values are the committed ones."""
    now = public_api()

    diff = "".join(difflib.unified_diff(SNAPSHOT.read_text().splitlines(True), now.splitlines(True), "committed", "now"))

    assert not diff, f"{diff}\nIf that is meant: python tests/house/{Path(__file__).name}"


def test_front_door_has_no_other_names() -> None:
    """`scdl_gpu` shows the names of its `__all__`, its modules, and nothing else."""
    module = importlib.import_module("scdl_gpu")
    public = {name for name, value in vars(module).items() if not name.startswith("_") and not isinstance(value, types.ModuleType)}

    stray = public - {*module.__all__, "Any", "TYPE_CHECKING", "import_module"}

    assert stray == set()


if __name__ == "__main__":
    SNAPSHOT.write_text(public_api())
