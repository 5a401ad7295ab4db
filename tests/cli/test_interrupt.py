"""Ctrl-C and kill -9, at any time: one line, or none, and no process or file is left."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import anndata
import numpy as np
import pytest
import scipy.sparse

SECONDS = 60
"""Long enough for a process to start on a busy machine."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder of four files, of a second or so each: gzipped, 6 M elements."""
    folder = tmp_path_factory.mktemp("in")
    counts = np.random.default_rng(1).integers(1, 9, 6_000_000).astype("float32")
    matrix = scipy.sparse.csr_matrix((counts, np.tile(np.arange(2000), 3000), np.arange(0, counts.size + 1, 2000)), shape=(3000, 2000))
    anndata.AnnData(matrix).write_h5ad(folder / "0.h5ad", compression="gzip")
    for k in range(1, 4):
        os.link(folder / "0.h5ad", folder / f"{k}.h5ad")
    return folder


@pytest.fixture
def start() -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Give the function that starts a command in a session of its own, so that a signal can go to all of it."""
    started: list[subprocess.Popen[str]] = []

    def begin(*words: object) -> "subprocess.Popen[str]":
        command = [str(Path(sys.executable).with_name(str(words[0]))), *map(str, words[1:])]
        started.append(
            subprocess.Popen(
                command,
                start_new_session=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a CI in the background ignores it
            )
        )
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def wait_for(what: Callable[[], object]) -> None:
    """Return when something holds."""
    end = time.monotonic() + SECONDS
    while not what():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.02)


def members(session: int) -> list[int]:
    """List the processes of a session that run, zombies left out."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (OSError, IndexError):
            continue
        if entry.name.isdigit() and int(fields[3]) == session and fields[0] not in "ZX":
            found.append(int(entry.name))
    return found


COMMANDS = [("scdl-gpu", "convert", "IN", "OUT", "--workers", "2"), ("convert_h5ad_to_scdl", "--data-path", "IN", "--save-path", "OUT")]
COMMANDS.append((*COMMANDS[1], "--use-mp", "--use-X-not-raw"))
COMMANDS[1] = (*COMMANDS[1], "--use-X-not-raw")


def begun(target: Path) -> bool:
    """Tell whether values are being written."""
    return any(file.stat().st_size for file in target.rglob("data.npy"))


@pytest.mark.parametrize("words", COMMANDS, ids=["convert", "threads", "processes"])
def test_an_interrupt_ends_in_one_line(start: Callable, sources: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    """Ctrl-C in the middle of a conversion: one line, exit code 130, no process and no file left."""
    target = tmp_path / "out"
    target.mkdir()
    process = start(*({"IN": sources, "OUT": target / "archive"}.get(word, word) for word in words))
    wait_for(lambda: begun(target))

    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=SECONDS)

    assert (process.returncode, stderr) == (130, "interrupted\n")
    assert list(target.iterdir()) == []
    wait_for(lambda: not members(process.pid))


@pytest.mark.parametrize("command", ["scdl_gpu.cli", "scdl_gpu.cli.convert_h5ad_to_scdl"])
def test_an_interrupt_of_the_start_ends_in_one_line(command: str) -> None:
    """Ctrl-C while modules are still being imported is no traceback either."""
    code = f"""
import sys
class Interrupted:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupted())
from {command} import main
main()
"""

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_workers_end_with_their_parent(start: Callable, sources: Path, tmp_path: Path) -> None:
    """After kill -9 of the command its workers notice that they are alone, and end."""
    target = tmp_path / "out"
    target.mkdir()
    process = start("scdl-gpu", "convert", sources, target / "archive", "--workers", "2")
    wait_for(lambda: begun(target))

    process.kill()

    wait_for(lambda: not members(process.pid))
    assert not (target / "archive").exists()
