"""The tree that the house rules are held against."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def list_tree() -> list[Path]:
    """List the files of the repository, relative to its root: what git has or would take; without git, all but hidden and built ones."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
        return sorted(Path(name) for name in set(listed) if name and (ROOT / name).is_file())
    found = []
    for folder, folders, names in os.walk(ROOT):
        here = Path(folder).relative_to(ROOT)
        built = {"__pycache__", "build", "dist", "demo-data"}
        folders[:] = [d for d in folders if d not in built and not d.endswith(".egg-info") and (d == ".ci" or not d.startswith("."))]
        found += [here / name for name in names]
    return sorted(found)


@pytest.fixture(scope="session")
def root() -> Path:
    """Give the root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def tree() -> list[Path]:
    """Give all files of the repository, relative to the root."""
    return list_tree()


@pytest.fixture(scope="session")
def modules(tree: list[Path]) -> list[Path]:
    """Give the Python files of the package, kernels included, relative to the root."""
    return [path for path in tree if path.suffix == ".py" and path.parts[0] in ("scdl_gpu", "kernels")]
