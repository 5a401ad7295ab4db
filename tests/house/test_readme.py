"""What the README shows works: its Python blocks run, its commands exist."""

import functools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import anndata
import pytest

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BIN = Path(sys.executable).parent
OUR_COMMANDS = {"scdl-gpu", "convert_h5ad_to_scdl"}
OTHER_COMMANDS = {"git", "cd", "pip", "conda", "torchrun", "export"}
TORCH_NOTICES = ("Sparse CSR tensor support is in beta state", "Sparse invariant checks are implicitly disabled")
STRICT = ["-W", "error", *(word for notice in TORCH_NOTICES for word in ("-W", f"ignore:{notice}:UserWarning"))]


def script_of(text: str) -> str:
    """Give the Python blocks as one script whose line numbers are those of the README."""
    lines = [""] * len(text.splitlines())
    for block in BLOCK.finditer(text):
        if block[1] == "python":
            first = text.count("\n", 0, block.start(2))
            body = block[2].splitlines()
            lines[first : first + len(body)] = body
    return "\n".join(lines) + "\n"


def commands_of(text: str) -> list[list[str]]:
    """Give the words of each command in the bash blocks, without prompts, comments and assignments before them."""
    commands = []
    for block in BLOCK.finditer(text):
        if block[1] in ("bash", "sh", "console"):
            for line in re.sub(r"\\\n", " ", block[2]).splitlines():
                for part in re.split(r"&&|\|\||[;|]", line.removeprefix("$ ")):
                    words = shlex.split(part, comments=True)
                    while words and re.match(r"^\w+=", words[0]):
                        words = words[1:]
                    if words:
                        commands.append(words)
    return commands


@functools.cache
def help_of(*words: str) -> str | None:
    """Give what one of our commands prints for `--help`, None where it fails."""
    environment = {**os.environ, "COLUMNS": "400", "TERM": "dumb", "NO_COLOR": "1"}
    run = subprocess.run([str(BIN / words[0]), *words[1:], "--help"], capture_output=True, text=True, check=False, env=environment)
    return run.stdout if run.returncode == 0 else None


def fault_in_our_command(words: list[str]) -> str | None:
    """Say what is wrong with a call of a command of this package: its name, its subcommand, or a flag."""
    named = words[:2] if words[0] == "scdl-gpu" and len(words) > 1 and not words[1].startswith("-") else words[:1]
    shown = help_of(*named)
    if shown is None:
        return f"{shlex.join(words)}: there is no `{' '.join(named)}`"
    unknown = [word for word in words if word.startswith("--") and word.split("=")[0] not in shown]
    return f"{shlex.join(words)}: {' '.join(unknown)} not in its --help" if unknown else None


def fault_in(words: list[str], root: Path) -> str | None:
    """Say what is wrong with a command, None where nothing is."""
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (root / "Makefile").read_text(), re.MULTILINE)
        unknown = [word for word in words[1:] if "=" not in word and word not in targets]
        return f"{shlex.join(words)}: no target {' '.join(unknown)}" if unknown else None
    if words[0] in ("python", "python3", "bash", "torchrun") and words[1].endswith((".py", ".sh", "/run")):
        return None if (root / words[1]).is_file() else f"{shlex.join(words)}: no such file"
    if words[0] in OUR_COMMANDS:
        return fault_in_our_command(words)
    return None if words[0] in OTHER_COMMANDS else f"{shlex.join(words)}: an unknown command"


def add_obs(h5ad: Path, names: set[str]) -> None:
    """Give a stand-in the obs columns that the README asks for: three categories."""
    adata = anndata.read_h5ad(h5ad)
    for name in names:
        adata.obs[name] = adata.obs["batch"]
    adata.write_h5ad(h5ad)


def test_python_blocks_run(root: Path, real_files: list[Path], make_h5ad: Callable[..., Path], tmp_path: Path) -> None:
    """Every Python block runs, in order, as one script, in a folder with the h5ad files that the README names."""
    text = (root / "README.md").read_text()
    for path in real_files:
        if path.name in text:
            (tmp_path / path.name).symlink_to(path)
    for name in set(re.findall(r"[\w-]+\.h5ad", text)):
        if not (tmp_path / name).exists():
            add_obs(make_h5ad(name, 300, 200), set(re.findall(r'obs(?:_column\(|=\[)"(\w+)"', text)))
    script = tmp_path / "readme.py"
    script.write_text(script_of(text))

    run = subprocess.run([sys.executable, *STRICT, script.name], cwd=tmp_path, capture_output=True, text=True, check=False)

    assert run.returncode == 0, run.stdout + run.stderr


def test_commands_exist(root: Path) -> None:
    """Every command in a bash block exists: make targets, our commands with their flags, scripts."""
    commands = commands_of((root / "README.md").read_text())

    faults = [fault for words in commands if (fault := fault_in(words, root))]

    assert ["make", "demo"] in commands
    assert ["make", "test"] in commands
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    "line", ["make no-such-target", "scdl-gpu no-such-command a b", "python no/such.py", "frobnicate", "make test && bash no/run"]
)
def test_faults_are_found(line: str, root: Path) -> None:
    """A command that does not exist is named."""
    commands = commands_of(f"```bash\n$ X=1 {line}  # a comment\n```\n")

    faults = [fault for words in commands if (fault := fault_in(words, root))]

    assert len(faults) == 1


def test_script_keeps_line_numbers() -> None:
    """A line of a Python block has the same number in the script, and other lines are empty."""
    text = "# Title\n\n```python\nx = 1\n```\n```bash\nls\n```\n```python\ny = x\n```\n"

    lines = script_of(text).splitlines()

    assert [(n, line) for n, line in enumerate(lines, 1) if line] == [(4, "x = 1"), (10, "y = x")]
