"""What holds for every command: help, version, exit codes, faults in one line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import scdl_gpu

COMMANDS = ("convert", "concat", "info", "verify")


def test_help_lists_the_commands(run: Callable) -> None:
    """The help names every command and shows how each is used."""
    result = run("--help")

    assert result.exit_code == 0
    assert all(f"scdl-gpu {command} " in result.stdout for command in (*COMMANDS, "pack", "doctor"))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_has_examples(run: Callable, command: str) -> None:
    """The help of a command shows its arguments and an example."""
    result = run(command, "--help")

    assert result.exit_code == 0
    assert f"\n  scdl-gpu {command} " in result.stdout
    assert "ARCHIVE" in result.stdout


@pytest.mark.parametrize("fixture", ["run", "run_reference"])
def test_version_is_that_of_the_package(request: pytest.FixtureRequest, fixture: str) -> None:
    """Both commands print the version and nothing else."""
    result = request.getfixturevalue(fixture)("--version")

    assert (result.exit_code, result.stdout) == (0, f"{scdl_gpu.__version__}\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ("convert", "a.h5ad"),
        ("convert", "a.h5ad", "b", "--x", "counts"),
        ("convert", "a.h5ad", "b", "--data-dtype", "int8"),
        ("convert", "a.h5ad", "b", "--workers", "0"),
        ("concat", "a"),
        ("info",),
        ("verify", "a", "--unknown"),
        ("pack", "a"),
    ],
)
def test_wrong_usage_ends_with_two(run: Callable, arguments: tuple[str, ...]) -> None:
    """Arguments that make no sense end with code 2 and a usage line on stderr, before any file is looked at."""
    result = run(*arguments)

    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage: scdl-gpu" in result.stderr


@pytest.mark.parametrize("command", ["info", "verify"])
def test_faults_are_one_line(shell: Callable, tmp_path: Path, command: str) -> None:
    """A directory that is no archive: code 1, one line on stderr that names it and the way out, and nothing written into it."""
    empty = tmp_path / "empty"
    empty.mkdir()

    done = shell("scdl-gpu", command, empty)

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {empty}")
    assert done.stderr.count("\n") == 1
    assert "scdl-gpu convert" in done.stderr
    assert list(empty.iterdir()) == []


def test_warnings_are_one_line(shell: Callable, messy: Path) -> None:
    """A warning of the package appears on stderr as one line, without the place in its source."""
    (messy / "header.sch").unlink()
    values = (messy / "data.npy").read_bytes()
    (messy / "data.npy").write_bytes(b"".join(bytes([0, 0, 0, value]) for value in values))

    done = shell("scdl-gpu", "info", messy, "--json")

    assert json.loads(done.stdout)["dtypes"]["data"] == "float32"
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["warning"]
