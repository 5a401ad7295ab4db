"""`convert_h5ad_to_scdl`: bionemo-scdl's command, flag for flag.

Knows its flags and defaults; rows are stored exactly as the sources have them. Archives of single files lie in a hidden
sibling of the output while they are made, never on $TMPDIR: twice the space is needed where the output goes, and none
elsewhere. `scdl-gpu convert` is the better command where no script depends on this one.
"""

import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from scdl_gpu.cli.report import FAULTS, SETTINGS, DataDtypeOption, VersionOption, complain, reported, tell

FLAGS = {
    "use_X_not_raw=True": "--use-X-not-raw",
    "data_dtype that": "--data-dtype that",
    ", or allow the loss with data_dtype_tolerance": "",
    "neighbor_key": "--neighbor-key",
}
"""What messages call options, in Python's words, and what they are called here."""

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False, context_settings=SETTINGS)


@app.command()
def convert_h5ad_to_scdl(
    data_path: Annotated[Path, typer.Option(metavar="PATH", help="Directory of h5ad files, directories below it included.")],
    save_path: Annotated[
        Path, typer.Option(metavar="PATH", help="Where the new archive goes; nothing may be there yet. Parents are made.")
    ],
    num_workers: Annotated[int, typer.Option(metavar="N", min=1, help="Files converted side by side.")] = 4,
    use_mp: Annotated[bool, typer.Option("--use-mp", help="Convert in processes instead of threads.")] = False,
    data_dtype: DataDtypeOption = None,
    paginated_load_cutoff: Annotated[int, typer.Option(metavar="MB", help="Accepted; files of any size are read in blocks.")] = 10_000,
    load_block_row_size: Annotated[int, typer.Option(metavar="N", help="Accepted; blocks are as large as is fastest.")] = 1_000_000,
    use_X_not_raw: Annotated[bool, typer.Option("--use-X-not-raw", help="Take X instead of raw.X.")] = False,
    load_neighbors: Annotated[bool, typer.Option("--load-neighbors", help="Keep a neighbour graph (not in bionemo-scdl).")] = False,
    neighbor_key: Annotated[str, typer.Option(metavar="KEY", help="Its key in obsp.")] = "next_cell_ids",
    version: VersionOption = False,
) -> None:
    """Convert a directory of h5ad files into one archive, as bionemo-scdl's command of this name does.

    Rows are stored exactly as the files have them. Flags may be spelt with underscores as well: --data_path.

    \b
    convert_h5ad_to_scdl --data-path plates/ --save-path all
    convert_h5ad_to_scdl --data-path plates/ --save-path all --data-dtype uint16 --use-X-not-raw --num-workers 8 --use-mp
    """  # noqa: D301
    with reported(FLAGS):
        from scdl_gpu.archive.commit import Staging
        from scdl_gpu.cli.convert import summary

        start = time.perf_counter()
        _check_directory(data_path)
        with Staging.create(save_path) as staging:
            _convert(
                data_path,
                staging.directory,
                {"load_neighbors": load_neighbors, "neighbor_key": neighbor_key},
                {
                    "max_workers": num_workers,
                    "use_processes": use_mp,
                    "data_dtype": data_dtype,
                    "paginated_load_cutoff": paginated_load_cutoff,
                    "load_block_row_size": load_block_row_size,
                    "use_X_not_raw": use_X_not_raw,
                },
            )
        tell(summary(save_path, time.perf_counter() - start))


def _check_directory(data_path: Path) -> None:
    """Raise an OSError that says what --data-path is, unless it is a directory of h5ad files."""
    if not data_path.exists():
        raise FileNotFoundError(f"--data-path {data_path} is not there; a directory of h5ad files is expected")
    if not data_path.is_dir():
        raise NotADirectoryError(f"--data-path {data_path} is a file, a directory of h5ad files is expected: give {data_path.parent}")


def _convert(data_path: Path, directory: Path, neighbors: dict[str, Any], options: dict[str, Any]) -> None:
    """Convert all files below `data_path` into one archive in `directory`."""
    from scdl_gpu.archive.change import join_into
    from scdl_gpu.archive.join import size_bytes
    from scdl_gpu.collection import SingleCellCollection
    from scdl_gpu.convert.write import progress_bar

    parts, whole = directory / "parts", directory / "whole"
    collection = SingleCellCollection(parts, **neighbors)
    try:
        collection.load_h5ad_multi(data_path, **options)
    except RuntimeError as error:
        if not isinstance(error.__cause__, FAULTS):
            raise
        complain("error", error, FLAGS)
        raise typer.Exit(1) from error
    archives = [dataset.raw_archive("join") for dataset in collection.fname_to_mmap.values()]
    if len(archives) == 1:
        archives[0].path.rename(whole)
    else:
        data_dtype = options["data_dtype"] or "float32"
        with progress_bar(size_bytes(archives, data_dtype), "B", "join", None) as bar:
            join_into(archives, whole, data_dtype=data_dtype, progress=bar.update)
    shutil.rmtree(parts)
    for file in list(whole.iterdir()):
        file.rename(directory / file.name)
    whole.rmdir()
