"""SingleCellCollection: a directory of archives, one for each h5ad file, on their way to being one.

Knows which archives there are and in which order; each is whole on its own, so a conversion of many files
that dies half-way keeps those that were done, and the directory can be opened again.
"""

import contextlib
import itertools
import json
import logging
import os
import warnings
from collections.abc import Iterable
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from scdl_gpu import callers
from scdl_gpu.archive import change
from scdl_gpu.archive.commit import make_directory, rewrite, space_errors, sync, tidy
from scdl_gpu.archive.constants import FileNames
from scdl_gpu.archive.features import VariableFeatureIndex
from scdl_gpu.convert.workers import Processes
from scdl_gpu.dataset import SingleCellMemMapDataset, join
from scdl_gpu.errors import ArchiveError
from scdl_gpu.row_dataset import SingleCellRowDatasetCore
from scdl_gpu.version import __version__

logger = logging.getLogger(__name__)


class SingleCellCollection(SingleCellRowDatasetCore):
    """Archives below `data_path`, which is made; archives that are there already are opened, in order of their names.

    `fname_to_mmap` maps the path of each archive to its dataset, in the order in which they were added. load_neighbors,
    neighbor_key and data_dtype are passed on to each dataset.
    """

    def __init__(
        self,
        data_path: str | os.PathLike[str],
        *,
        load_neighbors: bool = False,
        neighbor_key: str = "next_cell_ids",
        data_dtype: str | None = None,
    ) -> None:
        self.data_path = Path(data_path)
        self._path = self.data_path.absolute()
        self.load_neighbors = load_neighbors
        self.neighbor_key = neighbor_key
        self.data_dtype = data_dtype
        self.metadata: dict[str, int] = {}
        self.fname_to_mmap: dict[Path, SingleCellMemMapDataset] = {}
        self._var_feature_index = VariableFeatureIndex()
        is_new = not self._path.exists()
        try:
            with space_errors(self._path):
                make_directory(self._path)
            for archive in self._remembered():
                self._add(archive, self._open(archive))
            self._remember()
        except BaseException:
            if is_new:
                with contextlib.suppress(OSError, ArchiveError):  # the first error is the one to tell
                    self._forget()
            raise

    def _open(self, archive: Path) -> SingleCellMemMapDataset:
        return SingleCellMemMapDataset(self._path / archive.name, load_neighbors=self.load_neighbors, neighbor_key=self.neighbor_key)

    def _add(self, archive: Path, dataset: SingleCellMemMapDataset) -> None:
        self.fname_to_mmap[archive] = dataset
        self._var_feature_index.concat(dataset.var_features())

    def _remember(self) -> None:
        """Write which archives there are, in order, for who opens the collection again; nothing where that is written already.

        Archives that another process has written down meanwhile keep their order, and come first.
        """
        metadata, version = self._path / FileNames.METADATA.value, self._path / FileNames.VERSION.value
        tidy(self._path)
        if self._written() != self._merged():
            rewrite(metadata, lambda: json.dumps({"archives": self._merged()}))
        if not version.exists():
            rewrite(version, lambda: json.dumps(__version__))

    def _forget(self) -> list[str]:
        """Remove the directory if nothing but the files of the collection is in it; return what else there is."""
        own = [self._path / name.value for name in (FileNames.METADATA, FileNames.VERSION)]
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if not self._present():
                for file in own:
                    rewrite(file, lambda: None)
            left = sorted(entry.name for entry in self._path.iterdir())
            if left:
                return [name for name in left if self._path / name not in own]
            self._path.rmdir()
            sync(self._path.parent)
        return []

    def _present(self) -> set[str]:
        return {file.name for file in self._path.iterdir() if (file / FileNames.METADATA.value).exists() and file.name[0] != "."}

    def _written(self) -> list[str] | None:
        """Return the names that are written down, None where none are."""
        try:
            document = json.loads((self._path / FileNames.METADATA.value).read_bytes())
            return list(dict.fromkeys(document["archives"]))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
            raise ArchiveError(
                f'{self.data_path / FileNames.METADATA.value}: expected an object {{"archives": [names]}} of a collection; '
                f"choose another directory, or remove that file to take the archives in order of their names"
            ) from error

    def _merged(self) -> list[str]:
        """Return the names to write down: those that are, without those that are gone, then this object's others."""
        present = self._present()
        written = [name for name in self._written() or () if name in present]
        return list(dict.fromkeys([*written, *(archive.name for archive in self.fname_to_mmap)]))

    def _remembered(self) -> list[Path]:
        """Return the archives that are there: in the order written down, then those that were not."""
        present = self._present()
        order = [name for name in self._written() or () if name in present]
        return [self.data_path / name for name in (*order, *sorted(present - set(order)))]

    def _vacant(self, h5ad: Path, taken: Iterable[Path] = ()) -> Path:
        """Return a path for the archive of `h5ad`: its stem, numbered where another file of that name came first."""
        stem = h5ad.stem.lstrip(".") or "archive"
        names = (stem if number == 1 else f"{stem}-{number}" for number in itertools.count(1))
        used = {*self.fname_to_mmap, *taken, *(self.data_path / name for name in (FileNames.METADATA.value, FileNames.VERSION.value))}
        return next(self.data_path / name for name in names if self.data_path / name not in used)

    def _holding(self, h5ad: Path) -> Path | None:
        """Return the archive that `h5ad` was converted to, None where there is none: the labels of the genes tell."""
        archives = self.fname_to_mmap.items()
        return next((archive for archive, dataset in archives if str(h5ad) in dataset.var_features()._labels), None)

    def load_h5ad(
        self,
        h5ad_path: str | os.PathLike[str],
        paginated_load_cutoff: int = 10_000,
        load_block_row_size: int = 1_000_000,
        use_X_not_raw: bool = False,
    ) -> None:
        """Convert one h5ad file into an archive of this collection.

        Raises as SingleCellMemMapDataset does, FileExistsError for a file that is in the collection already.
        """
        options = self._options(self.data_dtype, paginated_load_cutoff, load_block_row_size, use_X_not_raw)
        h5ad = Path(h5ad_path).absolute()
        present = self._holding(h5ad)
        if present is not None:
            raise FileExistsError(f"{h5ad} is in {self.data_path} already, as {present.name}; remove {present} to convert it again")
        archive = self._vacant(h5ad)
        _convert(self._path / archive.name, h5ad, options)
        self._add(archive, self._open(archive))
        self._remember()

    def _options(self, data_dtype: str | None, cutoff: int, block_rows: int, use_x: bool) -> dict[str, Any]:
        return {
            "paginated_load_cutoff": cutoff,
            "load_block_row_size": block_rows,
            "use_X_not_raw": use_x,
            "data_dtype": data_dtype,
            "load_neighbors": self.load_neighbors,
            "neighbor_key": self.neighbor_key,
        }

    def load_h5ad_multi(
        self,
        directory_path: str | os.PathLike[str],
        max_workers: int = 5,
        use_processes: bool = False,
        data_dtype: str | None = None,
        paginated_load_cutoff: int = 10_000,
        load_block_row_size: int = 1_000_000,
        use_X_not_raw: bool = False,
        *,
        executor: Executor | None = None,
    ) -> None:
        """Convert every h5ad file below a directory, in order of their paths, `max_workers` at a time.

        Files that are in the collection already, from a run that failed, are passed over. executor: any
        concurrent.futures.Executor to use instead (a Dask client's, say); it stays open.
        Raises FileNotFoundError where there are none, FileExistsError for one that was changed after it was converted,
        RuntimeError naming the first file that failed, its error as the cause; files that were converted stay.
        """
        files = [file.absolute() for file in sorted(Path(directory_path).rglob("*.h5ad"))]
        if not files:
            raise FileNotFoundError(f"There a no h5ad files in {directory_path}.")
        archives: dict[Path, Path] = {}
        for file in files:
            if not self._is_converted(file):
                archives[file] = self._vacant(file, archives.values())
        options = self._options(data_dtype or self.data_dtype, paginated_load_cutoff, load_block_row_size, use_X_not_raw)
        failed: list[tuple[Path, BaseException]] = []
        with contextlib.ExitStack() as stack:
            workers = stack.enter_context(_workers(max_workers, use_processes=use_processes)) if executor is None else executor
            convert = _convert_apart if executor is None and use_processes else _convert
            futures = [workers.submit(convert, self._path / archive.name, file, options) for file, archive in archives.items()]
            for future in () if isinstance(workers, Processes) else futures:
                stack.callback(future.cancel)  # on an interrupt: what has not begun need not be waited for
            for (file, archive), future in zip(archives.items(), futures, strict=True):
                error = future.exception()
                if error is None:
                    for message in future.result() or ():
                        callers.warn(message)
                    self._add(archive, self._open(archive))
                else:
                    failed.append((file, error))
        self._remember()
        if failed:
            raise RuntimeError(f"Error in processing file {failed[0][0]}: {failed[0][1]}") from failed[0][1]

    def _is_converted(self, h5ad: Path) -> bool:
        present = self._holding(h5ad)
        if present is None:
            return False
        if h5ad.stat().st_mtime_ns > (self._path / present.name / FileNames.HEADER.value).stat().st_mtime_ns:
            raise FileExistsError(f"{h5ad} was changed after it was converted to {present}; remove {present} to convert it again")
        logger.info("%s is in %s already, as %s", h5ad, self.data_path, present.name)
        return True

    def number_nonzero_values(self) -> int:
        """Count the stored elements of all archives, explicit zeros included."""
        return sum(dataset.number_nonzero_values() for dataset in self.fname_to_mmap.values())

    def number_of_values(self) -> int:
        """Count the elements of the dense matrices."""
        return sum(dataset.number_of_values() for dataset in self.fname_to_mmap.values())

    def number_of_rows(self) -> int:
        """Count the rows of all archives. Raises ValueError where the features of the collection describe another number."""
        n = sum(dataset.number_of_rows() for dataset in self.fname_to_mmap.values())
        if n != self._var_feature_index.number_of_rows():
            raise ValueError(f"{self.data_path}: archives hold {n} rows, features describe {self._var_feature_index.number_of_rows()}")
        return n

    def number_of_variables(self) -> list[int]:
        """Return the number of variables of each block of archives with the same genes; [0] where there are none."""
        return self._var_feature_index.column_dims() or [0]

    def shape(self) -> tuple[int, list[int]]:
        """Return the number of rows, and the number of variables of each block."""
        return self.number_of_rows(), self.number_of_variables()

    def __repr__(self) -> str:
        genes = " + ".join(map(str, self.number_of_variables()[:4])) + (" + ..." if len(self._var_feature_index) > 4 else "")
        rows = self._var_feature_index.number_of_rows()
        size = f"{len(self.fname_to_mmap)} archives, {rows} rows x {genes} genes, {self.number_nonzero_values()} nonzeros"
        return f"{type(self).__name__}({str(self.data_path)!r}: {size})"

    def version(self) -> str:
        """Return the version of this package."""
        return __version__

    def flatten(self, output_path: str | os.PathLike[str], destroy_on_copy: bool = False, extend_copy_size: int = 10 * 1024 * 1024) -> None:
        """Write all rows, in the order of `fname_to_mmap`, as one archive to `output_path`, which must not exist.

        Features, names and neighbours are kept. destroy_on_copy: remove the archives afterwards, and the directory
        if nothing else is in it; archives that other writers added or changed since they were opened, and other files, stay,
        with a warning. extend_copy_size is accepted and not needed. Packed archives, of the same genes, share their shards with the
        new one, which is packed. Raises FileExistsError, ValueError for an empty collection, an output inside one of its archives, or
        integer and float values mixed; NotRawError for packed and raw ones mixed.
        """
        del extend_copy_size
        if not self.fname_to_mmap:
            raise ValueError(f"{self.data_path} holds no archives to flatten; load h5ad files into it first")
        if destroy_on_copy and Path(output_path).resolve().is_relative_to(self._path.resolve()):
            raise ValueError(f"{output_path} lies in {self.data_path}, which destroy_on_copy removes; choose a path outside")
        datasets = list(self.fname_to_mmap.values())
        join(datasets, Path(output_path), "flatten together with raw ones")
        if destroy_on_copy:
            self.fname_to_mmap, self._var_feature_index = {}, VariableFeatureIndex()
            self._destroy(datasets)

    def _destroy(self, datasets: list[SingleCellMemMapDataset]) -> None:
        """Remove the archives of `datasets`, and the directory if nothing else is in it."""
        for dataset in datasets:
            if dataset._path.is_symlink():
                dataset._path.unlink()  # what it leads to is not this collection's
            else:
                change.destroy(dataset._path, [dataset.archive])
        left = self._forget()
        if left:
            if self._present():
                self._remember()
            names = ", ".join(left[:8]) + (f" and {len(left) - 8} more" if len(left) > 8 else "")
            callers.warn(f"{self.data_path} is kept: besides what was flattened it holds {names}; move them, or remove the directory")


def _convert(archive: Path, h5ad: Path, options: dict[str, Any]) -> None:
    """Convert one file; the dataset stays where it was made, only the archive counts."""
    SingleCellMemMapDataset(archive, h5ad_path=h5ad, **options)


def _convert_apart(archive: Path, h5ad: Path, options: dict[str, Any]) -> list[str]:
    """Convert one file in a process of its own; return its warnings, which are the caller's to give."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _convert(archive, h5ad, options)
    return [str(warning.message) for warning in caught]


def _workers(max_workers: int, *, use_processes: bool) -> Executor:
    """Make threads or processes."""
    if use_processes:
        return Processes(max_workers)
    return ThreadPoolExecutor(max_workers)
