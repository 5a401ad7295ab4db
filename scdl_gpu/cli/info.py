"""`scdl-gpu info`: what is in an archive, for people or as JSON.

Knows how facts are put into words. Nothing is read that opening does not read: `verify` does that.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from scdl_gpu.cli.report import StoredDtypeOption, path_here, reported, size, tell

MAX_COLUMNS = 40
"""Columns that are listed for people; JSON lists all."""
NAMES = {"data": "values", "indices": "columns", "indptr": "row pointers"}
"""What people call the arrays."""
MAX_BLOCKS = 5
"""Blocks of different genes that are; JSON lists all."""


def info(
    archive: Annotated[Path, typer.Argument(metavar="ARCHIVE", parser=path_here, help="The directory of an archive.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
    stored_dtype: StoredDtypeOption = None,
) -> None:
    """Say what is in an archive.

    Cells, genes, nonzeros, dtypes, sizes, columns with their kinds, names, neighbours, and the format. Takes
    milliseconds, whatever the size: only headers, footers and file sizes are read.

    \b
    scdl-gpu info pbmc
    scdl-gpu info pbmc --json | jq .cells
    """  # noqa: D301
    with reported():
        from scdl_gpu.archive.packed import open_archive
        from scdl_gpu.cli.describe import facts

        found = facts(open_archive(archive, data_dtype=stored_dtype))
        if as_json:
            typer.echo(json.dumps(found, indent=2))
        else:
            tell(words(found))


def words(found: Mapping[str, Any]) -> dict[str, str]:
    """Put the facts about an archive into words."""
    return {
        "archive": found["path"],
        "cells": f"{found['cells']:,}",
        "genes": genes(found),
        "nonzeros": nonzeros(found),
        "dtypes": ", ".join(f"{NAMES[name]} {dtype}" for name, dtype in found["dtypes"].items()),
        "size": on_disk(found),
        "rows": "canonical" if found["canonical"] else "not marked as canonical (`scdl-gpu verify` tells what they are)",
        "matrix": matrix(found),
        "obs columns": _columns(found["obs"], found["obs_blocks"]),
        "var columns": _columns(found["var"]),
        "names": " and ".join(name for name, known in (("cells", found["obs_names"]), ("genes", found["var_names"])) if known) or "none",
        "neighbours": _neighbors(found["neighbors"]),
        "obsm": ", ".join(f"{key} ({_shape(one['shape'])} {one['dtype']})" for key, one in found["obsm"].items()) or "none",
        "obsp": ", ".join(f"{key} ({one['connections']:,} {one['dtype']})" for key, one in found["obsp"].items()) or "none",
        "format": _format(found),
    }


def genes(found: Mapping[str, Any]) -> str:
    """Say how many genes there are, block by block where they differ."""
    blocks = found["blocks"]
    if not blocks:
        return "unknown (the archive has no var table)"
    if len(blocks) == 1:
        return f"{blocks[0]['genes']:,}"
    lines = [_block(block) for block in blocks[:MAX_BLOCKS]]
    lines += [f"... and {len(blocks) - MAX_BLOCKS:,} more"] if len(blocks) > MAX_BLOCKS else []
    return "\n".join([f"{len(blocks):,} blocks of different genes:", *lines])


def _block(block: Mapping[str, Any]) -> str:
    source = f" from {block['source']}" if block["source"] else ""
    return f"{block['genes']:,} for {block['cells'] or 0:,} cells{source}"


def nonzeros(found: Mapping[str, Any]) -> str:
    """Say how many elements are stored, and of how many."""
    sparsity = "" if found["sparsity"] is None else f" (sparsity {found['sparsity']:.4g})"
    return f"{found['nonzeros']:,}{sparsity}"


def on_disk(found: Mapping[str, Any]) -> str:
    """Say how large the archive is in all, and how large its rows are, per element as well."""
    each = found["bytes_per_nonzero"]
    what = "the arrays of the rows" if found["packed"] is None else "packed rows and their table"
    arrays = f"{size(found['array_bytes'])} in {what}"
    return f"{size(found['size_bytes'])} in all, {arrays}" + ("" if each is None else f": {each:.2f} bytes per nonzero")


def matrix(found: Mapping[str, Any]) -> str:
    """Say which matrix the rows are, and of which files."""
    source = found["source"]
    of = [str(one) for one in source if one is not None] if isinstance(source, list) else []
    more = f" and {len(of) - 1:,} more" if len(of) > 1 else ""
    where = f"{of[0]}{more}" if of else f"{source:,} sources" if isinstance(source, int) else ""
    if found["matrix"]:
        return str(found["matrix"]) + (f" of {where}" if where else "")
    return "not recorded" + (f"; made of {where}" if where else "")


def _columns(kinds: Mapping[str, str], blocks: Mapping[str, Any] | None = None) -> str:
    partial = blocks["partial"] if blocks else {}
    lines = []
    for name, kind in list(kinds.items())[:MAX_COLUMNS]:
        lines.append(f"{name}: {kind}" + (f" (in {partial[name]:,} of {(blocks or {})['count']:,} blocks)" if name in partial else ""))
    return "\n".join(lines + ([f"... and {len(kinds) - MAX_COLUMNS:,} more"] if len(kinds) > MAX_COLUMNS else [])) or "none"


def _neighbors(graph: Mapping[str, Any] | None) -> str:
    if graph is None:
        return "none"
    return f"{graph['connections']:,} connections" + (f" ({graph['key']})" if graph["key"] else "")


def _shape(shape: list[int]) -> str:
    return " x ".join(f"{n:,}" for n in shape)


def _format(found: Mapping[str, Any]) -> str:
    from scdl_gpu.cli.describe import GENERATIONS

    packed = found["packed"]
    if packed is not None:
        shards, orders = (
            f"{packed[name]:,} {word}{'s' * (packed[name] != 1)}" for name, word in (("shards", "shard"), ("gene_orders", "gene order"))
        )
        return f"packed, version {packed['version']}: {shards}, {orders}"
    schema = f"schema {found['schema_version']}, " if found["schema_version"] else ""
    by = f", written by version {found['written_by']}" if found["written_by"] else ""
    return f"raw, generation {found['generation']}: {schema}{GENERATIONS[found['generation']]}{by}"
