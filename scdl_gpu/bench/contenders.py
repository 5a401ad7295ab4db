"""Who takes part: our loader in the forms that are asked for, and peers in their variants.

Knows names, stores and settings, not clocks. Everybody's store is made of the same h5ad files by its own converter, and lies in
one folder, so that the next run finds it there.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from scdl_gpu.bench.contest import Contender
from scdl_gpu.bench.peer import OURS, PeerError, build, head_of, python_of, script_of
from scdl_gpu.bench.source import Source


def ours(
    source: Source, stores: Path, *, formats: Sequence[str], workers: Sequence[int], world_size: int, settings: dict[str, Any]
) -> list[Contender]:
    """List our loader, raw and packed, by each number of DataLoader workers (0: none). settings: device, placement, windows."""
    given = None if not source.is_archive else "packed" if _is_packed(source.paths[0]) else "raw"
    found = []
    for kind in formats:
        store = source.paths[0] if kind == given else stores / f"scdl_gpu.{kind}"
        for number in workers:
            words = [kind, *([f"{number} workers"] if number else []), *([f"{world_size} ranks"] if world_size > 1 else [])]
            words += [str(value) for key, value in settings.items() if key == "placement" and value != "auto"]
            words += [{True: "windows", False: "no windows"}[settings["windows"]]] if settings.get("windows") is not None else []
            chosen = {"format": kind, "workers": number, **settings}
            label = f"scdl_gpu {', '.join(words)}"
            found.append(Contender(label, Path(sys.executable), OURS, store, chosen, is_given=kind == given, world_size=world_size))
    return found


def _is_packed(archive: Path) -> bool:
    from scdl_gpu.archive.packed import PackedArchive, open_archive

    return isinstance(open_archive(archive), PackedArchive)


def _unfit(head: ModuleType, source: Source, sampling: str) -> str | None:
    """Say why a peer cannot be measured so, None where it can."""
    if source.is_archive and not (head.READS_ARCHIVES and not _is_packed(source.paths[0])):
        return "it reads h5ad files, or makes its store of them, and an archive is given"
    if head.ONLY_X and not source.is_archive and source.matrix != "X":
        return f"it is measured on X, and the files have a {source.matrix}: give --use-X-not-raw"
    if sampling not in head.SAMPLINGS:
        return f"it has no {sampling} sampling, but {', '.join(head.SAMPLINGS)}"
    return None


def peers(
    names: Sequence[str],
    source: Source,
    stores: Path,
    *,
    home: Path,
    builds: bool,
    archive: Path | None,
    say: Callable[[str], None],
    sampling: str = "shuffle",
) -> list[Contender]:
    """List the variants of peers, those left out told. builds: make environments that are missing, below `home`.

    archive: a raw archive of the source, which those that read such are given; others convert.
    """
    found: list[Contender] = []
    for name in names:
        head, python = head_of(script_of(name)), python_of(name, home)
        if python is None and builds:
            say(f"{name}: making its environment in {home / name}")
            try:
                python = build(name, home)
            except PeerError as error:
                say(f"{name}: left out: {error}")
                continue
        if python is None:
            say(f"{name}: left out: it is not installed; --build-peers makes an environment for it")
            continue
        if (why := _unfit(head, source, sampling)) is not None:
            say(f"{name}: left out: {why}")
            continue
        for variant in head.VARIANTS:
            settings = {key: value for key, value in variant.items() if key not in ("label", "store")}
            given = (archive or (source.paths[0] if source.is_archive else None)) if head.READS_ARCHIVES else None
            store = given or (None if variant["store"] is None else stores / variant["store"])
            found.append(Contender(variant["label"], python, script_of(name), store, settings, is_given=given is not None))
    return found
