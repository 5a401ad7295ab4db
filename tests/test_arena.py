"""Memory that processes share: found by name, filled once, gone with the last of them."""

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from scdl_gpu import arena
from scdl_gpu.arena import Arena

SIZE = 10_000
CHILD = """
import os, sys
from scdl_gpu.arena import Arena
held = Arena(int(sys.argv[1]), sys.argv[2])
{work}
print(os.fstat(held._fd).st_ino, held.is_sealed, int(held.memory[7]), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def name(tmp_path: Path) -> str:
    """Give a name that no other test uses."""
    return f"test-{os.getpid()}-{tmp_path.name}"


@pytest.fixture
def processes() -> Iterator[ExitStack]:
    """Give a stack for processes; they end with the test."""
    with ExitStack() as stack:
        yield stack


def start(processes: ExitStack, name: str, work: str = "") -> subprocess.Popen[str]:
    """Start a process that opens the arena, does `work` and stays until its stdin is closed."""
    command = [sys.executable, "-c", CHILD.format(work=work), str(SIZE), name]
    return processes.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))


def said(process: subprocess.Popen[str]) -> list[str]:
    """Give what a process said of its arena: inode, whether it is sealed, one byte."""
    assert process.stdout is not None
    return process.stdout.readline().split()


def test_private_memory_is_zero_and_page_aligned() -> None:
    """Two arenas without a name are two, and empty ones can be made."""
    first, second, empty = Arena(SIZE), Arena(SIZE), Arena(0)

    first.memory[:] = 1

    assert second.memory.tolist() == [0] * SIZE
    assert first.memory.data_ptr() % 4096 == 0
    assert empty.memory.numel() == 0
    for one in (first, second, empty):
        one.close()
        one.close()


def test_a_name_and_a_size_are_one_arena(name: str) -> None:
    """What is opened under the same name and size is the same memory; another name or size is not."""
    first = Arena(SIZE, name)
    same, longer, other = Arena(SIZE, name), Arena(SIZE + 4096, name), Arena(SIZE, f"{name}-other")

    first.memory[7] = 42
    first.seal()

    assert [int(one.memory[7]) for one in (same, longer, other)] == [42, 0, 0]
    assert [one.is_sealed for one in (same, longer, other)] == [True, False, False]
    for one in (first, same, longer, other):
        one.close()


def test_processes_share(name: str, processes: ExitStack) -> None:
    """What one process wrote and sealed another finds, although the first has gone."""
    first = start(processes, name, "with held.locked(): held.memory[7] = 42; held.seal()")
    inode, *_ = said(first)

    second = start(processes, name)
    found = said(second)
    first.kill()
    first.wait()
    third = start(processes, name)

    assert found == [inode, "True", "42"]
    assert said(third) == [inode, "True", "42"]


def test_processes_that_start_together_share(name: str, processes: ExitStack) -> None:
    """Of many that open an arena at the same moment, one makes it."""
    started = [start(processes, name) for _ in range(3)]

    inodes = {said(process)[0] for process in started}

    assert len(inodes) == 1


def test_a_lock_excludes(name: str) -> None:
    """While one has the lock, no other gets it; afterwards it is free."""
    first, second = Arena(SIZE, name), Arena(SIZE, name)

    with first.locked(), pytest.raises(BlockingIOError):
        fcntl.flock(second._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    with second.locked():
        pass
    first.close()
    second.close()


def test_a_holder_holds_until_it_dies(name: str, processes: ExitStack) -> None:
    """An arena is held while anybody else holds it, and no longer than its holders live."""
    own, another = Arena(SIZE, name), Arena(SIZE, name)
    with another.held():
        before = own.is_held
    after = own.is_held
    child = start(processes, name, "hold = held.held(); hold.__enter__()")
    said(child)

    during = own.is_held
    child.kill()
    child.wait()

    assert (before, after) == (True, False)
    assert (during, own.is_held) == (True, False)
    own.close()
    another.close()


def test_a_killed_process_leaves_nothing(name: str, processes: ExitStack) -> None:
    """When the last process is killed the arena is gone, and there was never a file of it."""
    before = set(os.listdir("/dev/shm"))  # noqa: PTH208
    process = start(processes, name, "held.memory[7] = 1")
    said(process)

    existed, files = Arena.exists(SIZE, name), set(os.listdir("/dev/shm")) - before  # noqa: PTH208
    process.send_signal(signal.SIGKILL)
    process.wait()

    assert existed
    assert not any("scdl" in file for file in files)
    assert not Arena.exists(SIZE, name)


def test_a_process_killed_while_it_fills_hands_on(name: str, processes: ExitStack) -> None:
    """The lock of a killed process is free, and what it did not finish is not sealed."""
    process = start(processes, name, "lock = held.locked(); lock.__enter__(); held.memory[7] = 1")
    said(process)
    mine = Arena(SIZE, name)

    process.kill()
    with mine.locked():
        sealed = mine.is_sealed

    assert not sealed
    mine.close()


def test_views_outlive_the_arena() -> None:
    """A tensor over the memory stays readable after `close`."""
    held = Arena(SIZE)
    view = held.memory[5:8]
    view[:] = 3

    held.close()

    assert view.tolist() == [3, 3, 3]


@pytest.mark.parametrize(
    ("files", "available"),
    [
        ({}, 8000 * 1024),
        ({"memory.max": "max\n", "memory.current": "5\n", "memory.stat": "inactive_file 1\n"}, 8000 * 1024),
        ({"memory.max": "1000\n", "memory.current": "900\n", "memory.stat": "active_file 30\ninactive_file 20\nfile 80\n"}, 150),
        ({"job/memory.max": "700\n", "job/memory.current": "900\n", "job/memory.stat": "anon 900\n"}, 0),
        (
            {
                "memory/memory.limit_in_bytes": "5000\n",
                "memory/memory.usage_in_bytes": "900\n",
                "memory/memory.stat": "total_inactive_file 20\n",
            },
            4120,
        ),
    ],
    ids=["none", "no-limit", "container", "job", "v1"],
)
def test_available_memory_obeys_limits(files: dict[str, str], available: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest of what the kernel and each group of this process leave counts, page cache being free."""
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable:    8000 kB\n")
    (proc / "self" / "cgroup").write_text("0::/job\n")
    for file, text in files.items():
        (groups / file).parent.mkdir(parents=True, exist_ok=True)
        (groups / file).write_text(text)
    monkeypatch.setattr(arena, "PROC", proc)
    monkeypatch.setattr(arena, "CGROUPS", groups)

    found = arena.available_bytes()

    assert found == available
