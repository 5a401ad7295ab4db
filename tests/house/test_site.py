"""The documentation site: its pages are in its menu, its code runs, its commands exist, and the messages it explains are the package's."""

import ast
import functools
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from house.test_readme import BLOCK, STRICT, add_obs, commands_of, fault_in, script_of

TESTED_ELSEWHERE = {"archive-format.md", "packed-format.md"}  # test_docs.py, archive/test_packed_docs.py
COMMANDS_ELSEWHERE = {"packing.md"}  # a synopsis, with brackets
HOLE = "\0"
RUN = """
import os, pathlib, sys
for page in sys.argv[1:]:
    folder = pathlib.Path(page).resolve().parent
    os.chdir(folder)
    exec(compile((folder / "page.py").read_text(), folder.name, "exec"), {"__name__": "__main__"})
"""


@pytest.fixture(scope="module")
def pages(tree: list[Path]) -> list[Path]:
    """Give the pages, relative to the root."""
    return [path for path in tree if path.parts[0] == "docs" and path.suffix == ".md"]


def menu(entries: list) -> Iterator[str]:
    """Give the pages that a menu names, those of its sections too."""
    for entry in entries:
        for target in entry.values() if isinstance(entry, dict) else [entry]:
            yield from menu(target) if isinstance(target, list) else [target]


def test_menu_has_every_page_once(root: Path, pages: list[Path]) -> None:
    """The menu of the site names each page of docs/ once, and no other."""
    text = (root / "mkdocs.yml").read_text()

    named = list(menu(yaml.safe_load(text)["nav"]))

    assert sorted(named) == sorted(path.relative_to("docs").as_posix() for path in pages)


def test_python_blocks_run(root: Path, pages: list[Path], real_files: list[Path], make_h5ad: Callable[..., Path], tmp_path: Path) -> None:
    """The Python blocks of each page run, in order, as one script, in a folder of their own with the h5ad files that the page names."""
    folders = []
    for page in pages:
        text = (root / page).read_text()
        if page.name in TESTED_ELSEWHERE or not any(block[1] == "python" for block in BLOCK.finditer(text)):
            continue
        folder = tmp_path / page.name
        folder.mkdir()
        code = script_of(text)
        for name in set(re.findall(r"[\w-]+\.h5ad", code)):
            real = [path for path in real_files if path.name == name]
            if real:
                (folder / name).symlink_to(real[0])
            else:
                made = make_h5ad(name, 300, 200)
                add_obs(made, set(re.findall(r'obs(?:_column\(|=\[|\[)"(\w+)"', code)))
                made.rename(folder / name)
        (folder / "page.py").write_text(code)
        folders.append(str(folder / "page.py"))

    run = subprocess.run([sys.executable, *STRICT, "-c", RUN, *folders], cwd=tmp_path, capture_output=True, text=True, check=False)

    assert len(folders) >= 7
    assert run.returncode == 0, run.stdout + run.stderr


def test_commands_exist(root: Path, pages: list[Path]) -> None:
    """Every command in a bash block of a page exists, with its flags."""
    found = {tuple(words) for page in pages if page.name not in COMMANDS_ELSEWHERE for words in commands_of((root / page).read_text())}

    faults = [fault for words in sorted(found) if (fault := fault_in(list(words), root))]

    assert ("scdl-gpu", "doctor") in found
    assert not faults, "\n".join(faults)


@functools.cache
def texts_of(source: str) -> tuple[str, ...]:
    """Give the texts in a source, with HOLE for what is put into them."""
    texts = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            texts.append("".join(str(part.value) if isinstance(part, ast.Constant) else HOLE for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
    return tuple(texts)


def unknown_messages(page: str, texts: list[str]) -> list[str]:
    """List the messages in the first column of the page's tables that no text has; `...` stands for anything."""
    quoted = [code for row in re.findall(r"^\| (.*?) \|", page, re.MULTILINE) for code in re.findall(r"`([^`]+)`", row)]
    quoted += re.findall(r"^`([^`]+)`$", page, re.MULTILINE)
    patterns = {code: re.compile(".*".join(re.escape(part) for part in re.split(r"\s*\.\.\.\s*", code)), re.DOTALL) for code in quoted}
    return [code for code, pattern in patterns.items() if not any(pattern.search(text) for text in texts)]


def test_messages_are_those_of_the_package(root: Path, modules: list[Path]) -> None:
    """Each message that troubleshooting.md explains is one that the package has, but for those of others, which are named so."""
    texts = [text for path in modules for text in texts_of((root / path).read_text())]
    others = {"Too many open files", "cannot cache function ...: no locator available", "Sparse CSR tensor support is in beta state"}

    unknown = unknown_messages((root / "docs" / "troubleshooting.md").read_text(), texts)

    assert sorted(unknown) == sorted(others)


def test_unknown_messages_are_found() -> None:
    """A message that no text has is named; one whose parts a text has, in order, is not."""
    page = "| message | cure |\n| --- | --- |\n| `a ... b` | x |\n| `b ... a` | y |\n"

    unknown = unknown_messages(page, ["a\0b"])

    assert unknown == ["b ... a"]


@pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed here; `make docs` builds the site, in CI too"
)
def test_site_builds_without_warnings(root: Path, tmp_path: Path) -> None:
    """The site builds with warnings as errors, and asks nothing of other hosts."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]

    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})

    assert run.returncode == 0, run.stdout + run.stderr
    loaded = re.compile(r"""<(?:script|img|link)[^>]*(?:src|href)=["']?(https?://[^"'> ]+)""")
    foreign = {found for page in (tmp_path / "site").rglob("*.html") for found in loaded.findall(page.read_text())}
    assert foreign == set()
