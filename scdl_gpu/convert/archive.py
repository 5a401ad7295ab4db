"""Sources into whole archives: one at a time here, or many through an executor, then joined.

Knows the order of the work and the names of files; reading, casting and writing rows is done below. A source
is converted in one process; processes share nothing but the staging directory.
"""

import dataclasses
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scdl_gpu.archive.commit import Staging
from scdl_gpu.archive.constants import FileNames
from scdl_gpu.archive.features import ObservedFeatureIndex, VariableFeatureIndex
from scdl_gpu.archive.join import join
from scdl_gpu.archive.join import size_bytes as joined_bytes
from scdl_gpu.archive.raw import RawArchive, open_raw
from scdl_gpu.archive.writer import finish
from scdl_gpu.convert.archive_source import convert_archive, is_archive, open_archive
from scdl_gpu.convert.extras import write_extras
from scdl_gpu.convert.source import Source, check_x, open_source
from scdl_gpu.convert.values import EVERY, holding, narrowest
from scdl_gpu.convert.workers import Processes
from scdl_gpu.convert.write import Written, check_data_dtype, check_tolerance, progress_bar, size_bytes, write_matrix
from scdl_gpu.errors import MissingMatrixError, SourceError

logger = logging.getLogger(__name__)

MAX_WORKERS = 8
PIECE = 1 << 20
WORTH_A_PROCESS_BYTES = 64 << 20
"""Files that are smaller together are converted before worker processes would have started."""


@dataclass(frozen=True, slots=True)
class Options:
    """What is asked of each source; see `convert_h5ad`. stored_dtype: of the values of archives that do not record it."""

    x: str = "auto"
    data_dtype: str = "auto"
    tolerance: float | None = 0.0
    canonical: bool = True
    obs: bool = True
    obsm: tuple[str, ...] = ()
    obsp: tuple[str, ...] = ()
    progress: bool | None = None
    part: bool = False
    stored_dtype: str | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """One converted source: where it lies, which matrix was taken (None: an archive that does not say), what was written."""

    directory: Path
    label: str | None
    x: str | None
    written: Written


@dataclass(frozen=True, slots=True)
class Survey:
    """What a look at a source tells: the bytes it will take, and the shape of one row of each array of obsm asked for."""

    label: str
    size_bytes: int
    vectors: dict[str, tuple[int, ...]]


def convert(sources: Sequence[Any], archive: Path, options: Options, executor: Executor | None) -> None:
    """Convert sources into one archive at `archive`, which must not exist."""
    check_x(options.x)
    check_data_dtype(options.data_dtype)
    check_tolerance(options.tolerance, options.data_dtype)
    if os.path.lexists(archive):
        raise FileExistsError(f"{archive} exists already; choose another path, or remove it first")
    surveys = [_survey(source, options) for source in sources]
    _check_same_widths(surveys, options.obsm)
    needed = sum(survey.size_bytes for survey in surveys)
    if len(sources) == 1:
        with Staging.create(archive, needed_bytes=needed) as staging:
            _say(convert_source(sources[0], _label(sources[0]), staging.directory, options))
        return
    with Staging.create(archive, needed_bytes=2 * needed) as staging:
        _convert_many(sources, staging.directory, options, executor)


def _survey(source: Any, options: Options) -> Survey:
    """Open a source to see whether all is there that is asked for, before hours are spent on another one."""
    label = _label(source) or "an object in memory"
    if is_archive(source):
        archive, matrix = open_archive(Path(source), options.stored_dtype)
        _check_keys(archive, options)
        return Survey(label, size_bytes(matrix, options.data_dtype), {key: archive.obsm[key].shape[1:] for key in options.obsm})
    with open_source(source, options.x) as opened:
        for key in options.obsp:
            opened.obsp(key)
        widths = {key: opened.obsm(key).shape[1:] for key in options.obsm}
        return Survey(label, size_bytes(opened.matrix, options.data_dtype), widths)


def _check_keys(archive: RawArchive, options: Options) -> None:
    """Raise MissingMatrixError unless an archive has what is asked for; it keeps all else that it has as well."""
    graphs = {*archive.obsp, *filter(None, [archive.metadata.get("neighbor_key")])}
    for kind, keys, available in (("obsm", options.obsm, set(archive.obsm)), ("obsp", options.obsp, graphs)):
        for key in keys:
            if key not in available:
                has = ", ".join(sorted(available)) or "none"
                raise MissingMatrixError(f"{archive.path} has no {kind}[{key!r}]; it has {has}", tuple(sorted(available)))


def _check_same_widths(surveys: Sequence[Survey], keys: Sequence[str]) -> None:
    for key in keys:
        first = {survey.vectors[key]: survey.label for survey in reversed(surveys)}
        if len(first) > 1:
            found = ", ".join(f"{' x '.join(map(str, width)) or 'one number'} in {label}" for width, label in sorted(first.items()))
            raise SourceError(f"obsm[{key!r}] is not equally wide in all sources: {found} a row; leave {key!r} out, or make it so")


def convert_source(source: Any, label: str | None, directory: Path, options: Options) -> Part:
    """Convert one source into an archive in `directory`, which must exist and be empty."""
    if not directory.is_dir():
        raise SourceError(f"{directory} is not visible to this process; every worker of the executor must see the archive's file system")
    if is_archive(source):
        return _convert_archive(Path(source), label, directory, options)
    with open_source(source, options.x, obs=options.obs, scratch=directory) as opened:
        opened.label = label
        var, obs = features(opened)
        written = write_matrix(
            opened.matrix,
            directory,
            data_dtype=options.data_dtype,
            tolerance=options.tolerance,
            canonical=options.canonical,
            progress=options.progress,
        )
        extra = write_extras(opened, directory, options.obsm, options.obsp, always_exact=options.part)
        extra |= {"x": opened.x, "source": [label]}
        finish(directory, dtypes=written.dtypes, var=var, obs=obs, canonical=written.canonical, extra=extra)
        return Part(directory, label, opened.x, written)


def _convert_archive(path: Path, label: str | None, directory: Path, options: Options) -> Part:
    x, written = convert_archive(
        path,
        directory,
        x=options.x,
        data_dtype=options.data_dtype,
        tolerance=options.tolerance,
        canonical=options.canonical,
        obs=options.obs,
        progress=options.progress,
        stored_dtype=options.stored_dtype,
    )
    return Part(directory, label, x, written)


def features(source: Source) -> tuple[VariableFeatureIndex, ObservedFeatureIndex]:
    """Read var and obs into feature indices of one block each."""
    var, obs = VariableFeatureIndex(), ObservedFeatureIndex()
    frame = source.var()
    var.append_features(source.matrix.shape[0], frame.features("var_feature_id"), source.label, names=frame.names)
    frame = source.obs()
    obs.append_features(frame.features("obs_feature_id"), source.label, names=frame.names)
    return var, obs


def _convert_many(sources: Sequence[Any], directory: Path, options: Options, executor: Executor | None) -> None:
    folders = [directory / "parts" / f"{k:06d}" for k in range(len(sources))]
    for folder in folders:
        folder.mkdir(parents=True)
    part_options = dataclasses.replace(options, progress=False, part=True)
    with progress_bar(len(sources), "files", str(directory.parent), options.progress) as bar:
        parts = []
        for part in _parts(sources, folders, part_options, executor):
            parts.append(part)
            bar.update(1)
    parts.sort(key=lambda part: part.directory)
    _check_same_matrix(parts)
    _join_parts(parts, directory, options)
    _remove_parts(directory / "parts")


def _parts(sources: Sequence[Any], folders: Sequence[Path], options: Options, executor: Executor | None) -> Iterator[Part]:
    """Convert each source into its folder; files in the executor, objects in memory here."""
    files = [k for k, source in enumerate(sources) if isinstance(source, str | os.PathLike)]
    size = sum(Path(sources[k]).stat().st_size for k in files)
    with _executor(executor, len(files), size) as pool:
        remote = set() if pool is None else set(files)
        futures: list[Future[Part]] = []
        try:
            for k in remote:
                path = Path(sources[k]).absolute()
                futures.append(pool.submit(convert_source, path, _label(sources[k]), folders[k], options))  # type: ignore[union-attr]
            for k in sorted(set(range(len(sources))) - remote):
                yield convert_source(sources[k], _label(sources[k]), folders[k], options)
            for future in futures:
                yield future.result()
        except BrokenExecutor as error:
            cure = "out of memory? Use fewer workers (--workers), or another executor="
            raise SourceError(f"a worker died while converting ({error}); {cure}") from error
        except (KeyboardInterrupt, GeneratorExit):
            if isinstance(pool, Processes):
                pool.stop()
            raise
        finally:
            stopped = isinstance(pool, Processes) and pool.stopped
            wait([future for future in futures if stopped or not future.cancel()])


@contextmanager
def _executor(executor: Executor | None, n_files: int, size_bytes: int) -> Iterator[Executor | None]:
    """Give the caller's executor, or processes where they are worth their start, or None."""
    workers = min(n_files, os.cpu_count() or 1, MAX_WORKERS)
    if executor is not None:
        yield executor
    elif workers < 2 or size_bytes < WORTH_A_PROCESS_BYTES:
        yield None
    else:
        with Processes(workers) as pool:
            yield pool


def _check_same_matrix(parts: Sequence[Part]) -> None:
    kinds = {part.x: part.label for part in parts if part.x is not None}
    if len(kinds) > 1:
        found = ", ".join(f"{x} in {label}" for x, label in kinds.items())
        raise SourceError(
            f"the sources do not have the same matrix ({found}); say which with x (--x): counts and other values must not be mixed"
        )


def _join_parts(parts: Sequence[Part], directory: Path, options: Options) -> None:
    data_dtype = options.data_dtype
    if data_dtype == "auto":
        fitting = frozenset.intersection(EVERY, *(part.written.holding for part in parts))
        if not fitting:
            dtypes = ", ".join(f"{part.written.dtypes[FileNames.DATA.value]} in {part.label}" for part in parts)
            cure = "choose a data_dtype (--data-dtype) and a tolerance (--tolerance)"
            raise SourceError(f"no storable dtype holds the values of all sources exactly ({dtypes}); {cure}")
        data_dtype = narrowest(fitting)
    archives = [open_raw(part.directory) for part in parts]
    first = options.obsp[0] if options.obsp else None
    if first is not None and all(first not in one.obsp or _float32_holds(one.obsp[first].data) for one in archives):
        archives = [dataclasses.replace(one, obsp={key: graph for key, graph in one.obsp.items() if key != first}) for one in archives]
    x = next((part.x for part in parts if part.x is not None), None)
    extra = {"x": x, "source": [part.label for part in parts]}
    with progress_bar(joined_bytes(archives, data_dtype), "B", f"{directory.parent}: join", options.progress) as bar:
        join(archives, directory, data_dtype=data_dtype, extra=extra, progress=bar.update)
    logger.info("%s: %s of %d sources, values stored as %s", directory, x, len(parts), data_dtype)


def _float32_holds(values: Any) -> bool:
    return all("float32" in holding(np.asarray(values[start : start + PIECE])) for start in range(0, values.size, PIECE))


def _remove_parts(folder: Path) -> None:
    for file in sorted(folder.rglob("*"), reverse=True):
        if file.is_dir():
            file.rmdir()
        else:
            file.unlink()
    folder.rmdir()


def _say(part: Part) -> None:
    written = part.written
    dtype = written.dtypes[FileNames.DATA.value]
    logger.info("%s: took %s, %d rows, %d elements, values stored as %s", part.label, part.x, written.n_rows, written.nnz, dtype)


def _label(source: Any) -> str | None:
    return str(source) if isinstance(source, str | os.PathLike) else None
