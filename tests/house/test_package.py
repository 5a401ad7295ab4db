"""What is built from the tree has everything in it, and the lists that name dependencies agree."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

CONDA_NAMES = {"torch": "pytorch", "isal": "python-isal", "xxhash": "python-xxhash"}


def build(source: Path, kind: str, target: Path) -> Path:
    """Build a wheel or an sdist from a source tree, without isolation, and give its path."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(target)!r}))"
    run = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return target / run.stdout.splitlines()[-1]


def names_in(archive: Path) -> set[str]:
    """Give the names of the files in a wheel, or those in an sdist below its top folder."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return set(wheel.namelist())
    with tarfile.open(archive) as sdist:
        return {member.name.split("/", 1)[1] for member in sdist if member.isfile()}


@pytest.fixture(scope="module")
def expected(tree: list[Path]) -> set[str]:
    """Give the files that an installed package must have, as they are named in the wheel."""
    package = {path for path in tree if path.parts[0] == "scdl_gpu" and (path.suffix == ".py" or path.name == "py.typed")}
    kernels = {Path("scdl_gpu") / path for path in tree if path.parts[0] == "kernels"}
    return {path.as_posix() for path in package | kernels}


@pytest.fixture(scope="module")
def sdist(root: Path, tree: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build an sdist from a copy of the tree."""
    copy = tmp_path_factory.mktemp("copy")
    for path in tree:
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / path, copy / path)
    (copy / "scdl_gpu" / "kernels").symlink_to("../kernels")
    return build(copy, "sdist", tmp_path_factory.mktemp("sdist"))


def test_sdist_is_complete(sdist: Path, expected: set[str]) -> None:
    """The sdist has every module, every kernel and the licence."""
    names = names_in(sdist)

    assert not expected - names
    assert {"LICENSE", "README.md", "pyproject.toml"} <= names


def test_wheel_is_complete(sdist: Path, expected: set[str], tmp_path: Path) -> None:
    """A wheel built from the unpacked sdist has every module, py.typed, every kernel and the licence, and nothing else."""
    with tarfile.open(sdist) as packed:
        packed.extractall(tmp_path / "unpacked", filter="data")

    names = names_in(build(next((tmp_path / "unpacked").iterdir()), "wheel", tmp_path))

    meta = {name for name in names if ".dist-info/" in name}
    assert names - meta == expected
    assert any(name.endswith("LICENSE") for name in meta)


def test_editable_install_is_this_tree(root: Path, tmp_path: Path) -> None:
    """The package that the tests import is the one of this tree, from whatever folder they run, kernels included."""
    code = "import scdl_gpu, scdl_gpu.kernels as k; print(scdl_gpu.__file__); print(*k.__path__)"

    printed = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split("\n")

    assert Path(printed[0]) == root / "scdl_gpu" / "__init__.py"
    assert Path(printed[1]).resolve() == root / "kernels"


def test_environments_name_the_same_dependencies(root: Path) -> None:
    """environment.yml asks for every run-time dependency of pyproject.toml with the same floor, and for CuPy and kvikio."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    wanted = {re.sub(r"^[\w-]+", lambda m: CONDA_NAMES.get(m[0], m[0]), line) for line in project["dependencies"]}

    listed = {line for line in yaml.safe_load((root / "environment.yml").read_text())["dependencies"] if isinstance(line, str)}

    assert not wanted - listed
    assert {"cupy", "kvikio"} <= {re.split(r"[<>=]", line)[0] for line in listed}


def test_ci_runs_make_test(root: Path) -> None:
    """`.ci/run` can be executed, fails on any error and calls `make test`."""
    script = root / ".ci" / "run"

    lines = script.read_text().splitlines()

    assert script.stat().st_mode & 0o111
    assert {"set -euo pipefail", "make test"} <= set(lines)
