"""How the code reads, as far as a machine can tell."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
BANNED_NAMES = {"utils", "util", "common", "helpers", "helper", "manager", "config", "misc"}
MACHINE_PATH = re.compile(r"(?<![\w.])/(work|farm|root|home|Users)/")
CATCH_ALL = {"Exception", "BaseException"}
CHECKS = re.compile(r"\b(assert\w*|raises|warns|check\w*|expect\w*)\b")


def functions_of(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Give every function of a module, methods and inner ones too."""
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def catches_all(handler: ast.ExceptHandler) -> bool:
    """Tell whether a handler takes whatever comes; `except BaseException` that tidies up and ends in `raise` does not."""
    if isinstance(handler.type, ast.Name) and handler.type.id == "BaseException" and ast.unparse(handler.body[-1]) == "raise":
        return False
    return handler.type is None or any(isinstance(n, ast.Name) and n.id in CATCH_ALL for n in ast.walk(handler.type))


def faults_in_module(path: Path, source: str) -> list[str]:
    """List what breaks a rule in one file of scdl_gpu/ or kernels/."""
    tree = ast.parse(source, str(path))
    n_lines = len(source.splitlines())
    faults = [f"{path}: {n_lines} lines, at least {MAX_FILE_LINES}"] if n_lines >= MAX_FILE_LINES else []
    if not ast.get_docstring(tree):
        faults.append(f"{path}: no module docstring")
    if BANNED_NAMES & {part.lower().strip("_") for part in path.with_suffix("").parts}:
        faults.append(f"{path}: a name that says nothing; a helper lives with its caller")
    for function in functions_of(tree):
        length = (function.end_lineno or 0) - function.lineno + 1
        if length > MAX_FUNCTION_LINES:
            faults.append(f"{path}:{function.lineno}: {function.name} has {length} lines, more than {MAX_FUNCTION_LINES}")
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and catches_all(node):
            faults.append(f"{path}:{node.lineno}: catches everything")
        if isinstance(node, ast.Assert):
            faults.append(f"{path}:{node.lineno}: assert; raise an error that says what was wrong")
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print" and path.parts[:2] != ("scdl_gpu", "cli"):
            faults.append(f"{path}:{node.lineno}: prints outside cli/")
    return faults


def faults_in_tests(path: Path, source: str) -> list[str]:
    """List the tests of one file that have no docstring or check nothing, neither themselves nor through a function of the file."""
    functions = list(functions_of(ast.parse(source, str(path))))
    tests = [function for function in functions if function.name.startswith("test_")]
    checkers = {function.name for function in functions if CHECKS.search(code_of(function))}
    faults = [f"{path}:{test.lineno}: {test.name} has no docstring" for test in tests if not ast.get_docstring(test)]
    idle = [test for test in tests if not {test.name, *re.findall(r"\w+", code_of(test))} & checkers]
    return faults + [f"{path}:{test.lineno}: {test.name} checks nothing" for test in idle]


def code_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Give the body of a function without its docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return "\n".join(ast.unparse(node) for node in body)


def machine_paths(path: Path, text: str) -> list[str]:
    """List the lines that name a path of somebody's machine."""
    lines = enumerate(text.splitlines(), 1)
    return [f"{path}:{n}: a path of one machine: {line.strip()}" for n, line in lines if MACHINE_PATH.search(line)]


def test_modules_keep_the_rules(root: Path, modules: list[Path]) -> None:
    """Files and functions are short, modules have docstrings and a noun for a name, nothing catches everything, asserts or prints."""
    faults = [fault for path in modules for fault in faults_in_module(path, (root / path).read_text())]

    assert not faults, "\n".join(faults)


def test_tests_keep_the_rules(root: Path, tree: list[Path]) -> None:
    """Every test says in a sentence what holds, and checks something."""
    tests = [path for path in tree if path.parts[0] == "tests" and path.suffix == ".py"]

    faults = [fault for path in tests for fault in faults_in_tests(path, (root / path).read_text())]

    assert not faults, "\n".join(faults)


def test_no_file_names_a_machine(root: Path, tree: list[Path]) -> None:
    """No text file of the repository names a path of one machine."""
    faults = []
    for path in tree:
        content = (root / path).read_bytes()
        if b"\0" not in content:
            faults += machine_paths(path, content.decode(errors="replace"))

    assert not faults, "\n".join(faults)


def test_readme_names_every_module(root: Path, tree: list[Path]) -> None:
    """The tree in the README has a clause for every module at the top of the package and for every folder of code."""
    readme = (root / "README.md").read_text()
    modules = [path for path in tree if path.parts[0] == "scdl_gpu" and path.suffix == ".py"]
    package = {path.parts[1] + ("/" if len(path.parts) > 2 else "") for path in modules}
    folders = {path.parts[0] + "/" for path in tree if len(path.parts) > 1 and not path.parts[0].startswith(".")}

    missing = sorted(name for name in package | folders if not re.search(rf"^\s*{re.escape(name)}\s+\S", readme, re.MULTILINE))

    assert missing == []


LONG = "def f() -> None:\n" + "    f()\n" * MAX_FUNCTION_LINES


@pytest.mark.parametrize(
    ("path", "source", "fault"),
    [
        ("scdl_gpu/a.py", '"""A."""\n' + "x = 1\n" * MAX_FILE_LINES, "401 lines"),
        ("scdl_gpu/a.py", "x = 1", "no module docstring"),
        ("scdl_gpu/utils.py", '"""A."""', "says nothing"),
        ("scdl_gpu/archive/_helpers.py", '"""A."""', "says nothing"),
        ("scdl_gpu/a.py", '"""A."""\n' + LONG, "f has 61 lines"),
        ("kernels/a.py", '"""A."""\ntry:\n    f()\nexcept:\n    pass', "catches everything"),
        ("kernels/a.py", '"""A."""\ntry:\n    f()\nexcept (OSError, Exception) as e:\n    pass', "catches everything"),
        ("kernels/a.py", '"""A."""\ntry:\n    f()\nexcept BaseException:\n    g()', "catches everything"),
        ("scdl_gpu/a.py", '"""A."""\nassert x', "assert"),
        ("scdl_gpu/a.py", '"""A."""\nprint(1)', "prints"),
    ],
)
def test_faults_are_found(path: str, source: str, fault: str) -> None:
    """Each planted breach of a rule is named, once."""
    faults = faults_in_module(Path(path), source)

    assert len(faults) == 1
    assert fault in faults[0]


def test_tidying_up_is_no_fault() -> None:
    """A handler of BaseException that ends in `raise` passes."""
    source = '"""A."""\ntry:\n    f()\nexcept BaseException:\n    g()\n    raise'

    faults = faults_in_module(Path("scdl_gpu/a.py"), source)

    assert faults == []


def test_faults_of_tests_are_found() -> None:
    """A test without a docstring and one that checks nothing are named."""
    source = (
        "def test_a():\n    assert 1\n"
        "def test_b():\n    'Assert that raises.'\n    f()\n"
        "def g():\n    assert 1\n"
        "def test_c():\n    'Check by g.'\n    g()"
    )

    faults = faults_in_tests(Path("tests/test_x.py"), source)

    assert faults == ["tests/test_x.py:1: test_a has no docstring", "tests/test_x.py:3: test_b checks nothing"]


def test_machine_paths_are_found() -> None:
    """A path below somebody's home is named; a relative one and a web address are not."""
    text = "cd /" + "home/me\n../work/x\nhttps://example.org/root/x"

    faults = machine_paths(Path("a.md"), text)

    assert [fault.split(": ")[0] for fault in faults] == ["a.md:1"]
