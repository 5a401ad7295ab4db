"""Logs of calls that change files: which to try, and what a power cut could tear.

Knows one line per call, "op<TAB>path<TAB>second path", paths relative to the watched directory; bytes stored
into mapped memory leave no line. Durability is judged by order alone: a file counts as synced when an fsync
of it follows its last write.
"""

from pathlib import Path

RENAMES = ("rename", "rename_noreplace", "exchange")


def is_hidden(path: str) -> bool:
    """Tell whether no reader looks at a path of the log: it, or a directory it lies in, has a name that begins with a dot."""
    return any(name.startswith(".") for name in Path(path).parts)


def appears(entry: str) -> bool:
    """Tell whether a call of the log is a rename that readers see."""
    op, _, second = entry.split("\t")
    return op in RENAMES and not is_hidden(second)


def spread(log: list[str], points: int) -> list[int]:
    """Choose call numbers of `log`: the first, the last, every rename that readers see, others evenly; `points` in all, 0: every call."""
    n = len(log)
    if points <= 0 or points >= n:
        return list(range(1, n + 1))
    chosen = {1, n} | {i + 1 for i, entry in enumerate(log) if appears(entry)}
    evenly = (1 + round(step * (n - 1) / (4 * points)) for step in sorted(range(4 * points + 1), key=lambda step: (step % 4, step)))
    for i in evenly:
        if len(chosen) >= points:
            break
        chosen.add(i)
    return sorted(chosen)


def undurable(log: list[str]) -> list[str]:
    """List what a power cut could tear: names and bytes not synced when a rename makes them visible, or at the end."""
    dirty: dict[str, str] = {}
    faults = []
    for number, entry in enumerate(log, 1):
        op, first, second = entry.split("\t")
        if op in ("open", "write", "fwrite", "fflush", "fclose", "ftruncate", "truncate", "fallocate", "mmap"):
            dirty[first] = op
        if op in ("open", "mkdir", "symlink"):
            if dirty.get(parent(first), "").split(" ")[0] not in RENAMES:
                dirty[parent(first)] = f"{op} {first}"
        elif op == "link":
            dirty[parent(second)] = f"{op} {second}"
            if first in dirty:
                dirty[second] = dirty[first]
        elif op in ("unlink", "rmdir", "fsync"):
            dirty.pop(first, None)
        elif op == "syncfs":
            dirty.clear()
        elif op in RENAMES:
            moved = {path: dirty.pop(path) for path in list(dirty) if (path + "/").startswith(first + "/")}
            if is_hidden(second):
                dirty |= {second + path.removeprefix(first): cause for path, cause in moved.items()}
            else:
                faults += [f"call {number}, {op} {first} -> {second}: {path} is not synced after {cause}" for path, cause in moved.items()]
            dirty[parent(first)] = dirty[parent(second)] = f"{op} {second}"
    for path, cause in dirty.items():
        op, _, named = cause.partition(" ")
        if not is_hidden(path) and not is_hidden(named) and op in ("write", "mkdir", *RENAMES):
            faults.append(f"at the end: {path} is not synced after {cause}")
    return faults


def parent(path: str) -> str:
    """Return the directory of a path of the log, "." at the top."""
    return str(Path(path).parent)
