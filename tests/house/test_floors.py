"""Imports point down: the house has floors, and a module sees only those below its own."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

FLOORS = {
    8: "__init__ cli compat bench lightning",
    7: "loader collection",
    6: "cuda_assembly",
    5: "dataset placement windows",
    4: "rows division obs assembly pack filling budget",
    3: "convert slab collate neighbors shards buffers tables row_source faults runs window window_order peers",
    2: "archive backend device order sampler",
    1: "kernels reader arena",
    0: "errors batch version row_dataset callers arguments transport",
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms.split()}
FREE_WITHIN = {"archive", "convert", "pack", "bench", "cli", "kernels"}
THIN_OVER = {("cli", "bench"), ("convert", "pack")}  # `scdl-gpu bench` and `convert_h5ad(packed=True)` only hand their arguments on
HOME_OF = {
    "cupy": {"scdl_gpu.device", "scdl_gpu.kernels.gpu"},
    "cupyx": {"scdl_gpu.device", "scdl_gpu.kernels.gpu"},
    "kvikio": {"scdl_gpu.reader"},
    "lightning": {"scdl_gpu.lightning"},
}


def module_name(path: Path) -> str:
    """Give the dotted name of a file; that of a package ends in `.__init__`."""
    parts = path.with_suffix("").parts
    return ".".join(("scdl_gpu", *parts) if parts[0] == "kernels" else parts)


def imported(source: str, importer: str) -> Iterator[tuple[int, str]]:
    """Give line and full name of all that a source imports, lazily or for type checkers only as well.

    Of `from a import b` that is `a.b`: whether `b` is a module or a name of one does not matter to what follows.
    """
    for node in ast.walk(ast.parse(source, importer)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = importer.split(".")[: -node.level] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from ((node.lineno, a.value) for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str))


def room_of(name: str) -> str:
    """Give the room of a full name below scdl_gpu: a module at its top, a folder, or `__init__` for a name of the front door."""
    second = name.split(".")[1] if "." in name else "__init__"
    return second if second in FLOOR_OF else "__init__"


def faults_in(source: str, importer: str) -> list[str]:
    """List the imports of a source that a module of this name must not have."""
    room = importer.split(".")[1]
    if room not in FLOOR_OF:
        return [f"{importer}: has no floor; give it one in {Path(__file__).name}"]
    faults = []
    for line, name in imported(source, importer):
        top = name.split(".")[0]
        if top == "kernels":
            faults.append(f"{importer}:{line}: imports {name}; the kernels are imported as scdl_gpu.kernels")
        if importer not in HOME_OF.get(top, {importer}):
            faults.append(f"{importer}:{line}: imports {name}; only {' and '.join(sorted(HOME_OF[top]))} may")
        if top != "scdl_gpu":
            continue
        target = room_of(name)
        inside = target == room and room in FREE_WITHIN
        if not (inside or (room, target) in THIN_OVER or FLOOR_OF[target] < FLOOR_OF[room]):
            faults.append(f"{importer}:{line}: floor {FLOOR_OF[room]} imports {name}, floor {FLOOR_OF[target]}")
    return faults


def test_imports_point_down(root: Path, modules: list[Path]) -> None:
    """No module imports from its own floor or from one above, nor CuPy or kvikio outside their homes."""
    faults = [fault for path in modules for fault in faults_in((root / path).read_text(), module_name(path))]

    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md"])
def test_pages_draw_the_floors(root: Path, page: str) -> None:
    """The tables of floors in the README and in architecture.md are the one that is tested."""
    drawn = re.findall(r"^(\d)  (\w.*)$", (root / page).read_text(), re.MULTILINE)

    floors = {int(floor): sorted(rooms.replace("/", "").split()) for floor, rooms in drawn}

    assert floors == {floor: sorted(rooms.split()) for floor, rooms in FLOORS.items()}


def test_pages_describe_every_room(root: Path) -> None:
    """Each room has a line in the tree of the README, and stands in bold in architecture.md."""
    tree, rooms = (root / "README.md").read_text(), (root / "docs" / "architecture.md").read_text()

    missing = {room for room in FLOOR_OF if not re.search(rf"^  {room}(\.py|/| ->)", tree, re.MULTILINE)} - {"kernels"}
    missing |= {room for room in FLOOR_OF if not re.search(rf"\*\*{room}/?\*\*", rooms)}

    assert missing == set()


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("scdl_gpu.archive.raw", "from scdl_gpu.dataset import SingleCellMemMapDataset"),
        ("scdl_gpu.archive.raw", "def f():\n    from ..loader import GPUBatchLoader"),
        ("scdl_gpu.archive.raw", "from .. import collate"),
        ("scdl_gpu.archive.__init__", "from ..backend import x"),
        ("scdl_gpu.archive.raw", "from scdl_gpu import __version__"),
        ("scdl_gpu.batch", "if TYPE_CHECKING:\n    import scdl_gpu.errors"),
        ("scdl_gpu.reader", "import importlib\nimportlib.import_module('scdl_gpu.order')"),
        ("scdl_gpu.dataset", "from scdl_gpu.collection import SingleCellCollection"),
        ("scdl_gpu.loader", "import cupy"),
        ("scdl_gpu.backend", "from kvikio import CuFile"),
        ("scdl_gpu.backend", "from kernels import cpu"),
        ("scdl_gpu.utils", ""),
    ],
)
def test_faults_are_found(importer: str, source: str) -> None:
    """Each planted import that points up, sideways or at the wrong library is named."""
    faults = faults_in(source, importer)

    assert len(faults) == 1
    assert faults[0].startswith(importer)


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("scdl_gpu.__init__", "from scdl_gpu.dataset import SingleCellMemMapDataset\nfrom .errors import ScdlError"),
        ("scdl_gpu.archive.raw", "from scdl_gpu.archive.header import SCDLHeader\nfrom . import codec\nfrom ..errors import ArchiveError"),
        ("scdl_gpu.archive.__init__", "from .header import SCDLHeader"),
        ("scdl_gpu.dataset", "from scdl_gpu import collate\nfrom scdl_gpu.kernels import cpu"),
        ("scdl_gpu.kernels.gpu", "import cupy\nimport numpy"),
        ("scdl_gpu.cli.bench", "from scdl_gpu.bench import measure"),
    ],
)
def test_imports_that_point_down_pass(importer: str, source: str) -> None:
    """Imports from lower floors, and within archive/, convert/ and cli/, are no faults."""
    faults = faults_in(source, importer)

    assert faults == []
