"""SingleCellMemMapDataset: an archive that is opened, made, and changed, with bionemo-scdl's methods.

Knows which change of the archive each method is, and leaves the archive whole at every moment; reading is
`rows`, the disk is `archive`, sources are `convert`. Every change hard-links or rewrites a hidden sibling:
an append costs the bytes of the whole archive, and buys that no crash can harm it.
"""

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scdl_gpu import callers
from scdl_gpu.archive import change
from scdl_gpu.archive.check import check_rows
from scdl_gpu.archive.commit import Staging, space_errors
from scdl_gpu.archive.constants import FLOAT_ORDER, INT_ORDER, FileNames, Mode, NeighborSamplingStrategy
from scdl_gpu.archive.dtypes import DEFAULT_DTYPES
from scdl_gpu.archive.join import common_dtype
from scdl_gpu.archive.packed import PackedArchive, open_archive
from scdl_gpu.archive.parts import Archive
from scdl_gpu.archive.raw import ARRAY_FILES, RawArchive, check_identity, identity, open_raw
from scdl_gpu.archive.remote import ONLY, WAY_OUT
from scdl_gpu.archive.writer import finish
from scdl_gpu.errors import ArchiveError
from scdl_gpu.neighbors import strategy_of
from scdl_gpu.pack.join import concat_packed
from scdl_gpu.rows import ArchiveRows
from scdl_gpu.transport import is_url, shown

if TYPE_CHECKING:
    import pandas as pd

    from scdl_gpu.convert.frames import Frame

DATA = FileNames.DATA.value
OPENED = {"_path", "_archive", "_n_rows", "header", "metadata", "dtypes", "_source", "_var_feature_index", "_obs_feature_index"}
OPENED |= {"_sampler", "_staging", "_canonical"}
"""Attributes that opening an archive makes: a pickle opens it again."""


class SingleCellMemMapDataset(ArchiveRows):
    """Rows of an archive, raw or packed, opened, converted from an h5ad file, or made empty to be filled by hand.

    Where `data_path` exists it is opened, read-only; where not, `h5ad_path` is converted to it, or arrays of
    `num_rows` and `num_elements` are made, which `save` puts there: its length is 0 until features are appended to
    var_features(), since they are what counts rows. All parameters are bionemo-scdl's.

    data_dtype: of the values stored by a conversion, one of uint8/16/32/64, float16/32/64 (None: float32); for an
    archive without header, of the values it holds. data_dtype_tolerance: absolute loss beyond which a conversion warns.
    use_X_not_raw: convert `.X`; otherwise `.raw.X`. load_neighbors: keep or open the graph `neighbor_key` of `.obsp`;
    the default key also stands for the graph in the neighbour files, whatever its key, as every key does where none is recorded.
    paginated_load_cutoff and load_block_row_size are kept for code that passes them: every conversion here reads in
    blocks of bounded memory, whatever the size of the file.
    Raises FileExistsError, FileNotFoundError, ValueError for arguments, ArchiveError and SourceError for files.
    """

    def __init__(
        self,
        data_path: str | os.PathLike[str],
        h5ad_path: str | os.PathLike[str] | None = None,
        num_elements: int | None = None,
        num_rows: int | None = None,
        mode: Mode = Mode.READ_APPEND,
        paginated_load_cutoff: int = 10_000,
        load_block_row_size: int = 1_000_000,
        var_feature_index_name: str = "var_feature_id",
        obs_feature_index_name: str = "obs_feature_id",
        load_neighbors: bool = False,
        neighbor_key: str = "next_cell_ids",
        neighbor_sampling_strategy: NeighborSamplingStrategy | str = NeighborSamplingStrategy.RANDOM,
        fallback_to_identity: bool = True,
        data_dtype: str | None = None,
        data_dtype_tolerance: float = 1e-08,
        use_X_not_raw: bool = False,
    ) -> None:
        if not isinstance(data_path, str | os.PathLike):
            raise TypeError(f"data_path is {data_path!r} ({type(data_path).__name__}), expected the path of an archive")
        if isinstance(data_path, str) and is_url(data_path):
            raise ValueError(f"data_path is a URL, {shown(data_path)}; {ONLY}: {WAY_OUT}")
        if data_dtype is not None and data_dtype not in INT_ORDER + FLOAT_ORDER:
            raise ValueError(f"data_dtype {data_dtype!r} is not storable; expected one of {INT_ORDER + FLOAT_ORDER}")
        self.data_path = data_path
        self._path = Path(data_path).absolute()
        self.mode = mode
        self.paginated_load_cutoff = paginated_load_cutoff
        self.load_block_row_size = load_block_row_size
        self.var_feature_index_name = var_feature_index_name
        self.obs_feature_index_name = obs_feature_index_name
        self.load_neighbors = load_neighbors
        self.neighbor_key = neighbor_key
        self.neighbor_sampling_strategy = strategy_of(neighbor_sampling_strategy) if load_neighbors else NeighborSamplingStrategy.RANDOM
        self.fallback_to_identity = fallback_to_identity
        self.data_dtype_tolerance = data_dtype_tolerance
        self.use_X_not_raw = use_X_not_raw
        self._data_dtype = data_dtype
        self._staging: Staging | None = None
        self._canonical: bool | None = None
        self.dtypes = dict(DEFAULT_DTYPES) | ({DATA: data_dtype} if data_dtype else {})
        try:
            with space_errors(self._path):
                self._obtain(h5ad_path, num_elements, num_rows)
        except BaseException:
            self._drop_staging()
            raise

    def _obtain(self, h5ad_path: str | os.PathLike[str] | None, num_elements: int | None, num_rows: int | None) -> None:
        exists = os.path.lexists(self._path)
        if self.mode == Mode.CREATE_APPEND and exists:
            raise FileExistsError(f"Output directory already exists: {self.data_path}; choose another, or open it in another mode")
        if h5ad_path is not None and exists:
            raise FileExistsError(
                f"Invalid input; both an existing SCMMAP and an h5ad file were passed. {self.data_path} exists already: "
                f"leave out h5ad_path to open it, or choose another data_path to convert {h5ad_path}"
            )
        if exists:
            self.load(self.data_path)
        elif h5ad_path is not None:
            writable = self.mode == Mode.CREATE_APPEND
            self.load_h5ad(h5ad_path)
            if writable:
                self._adopt(open_raw(self._path, writable=True))
                self.mode = Mode.CREATE_APPEND
        elif isinstance(num_elements, int) and isinstance(num_rows, int):
            self._adopt(change.create_empty(self._stage().directory, num_rows, num_elements, self.dtypes))
            self.mode = Mode.CREATE_APPEND
        else:
            raise ValueError(
                f"An np.memmap path, an h5ad path, or the number of elements and rows is required; {self.data_path} does not exist, "
                f"and h5ad_path, or num_elements and num_rows, are not given"
            )

    # Opening, saving, and what is between

    def load(self, stored_path: str | os.PathLike[str]) -> None:
        """Open the archive at `stored_path`, read-only, whatever `mode` says; arrays of this object that are not saved are dropped.

        Raises FileNotFoundError where nothing is there, ArchiveError where an archive is damaged. Writes nothing.
        """
        if not os.path.lexists(stored_path):
            raise FileNotFoundError(f"The specified data path does not exist: {stored_path}")
        self._read(Path(stored_path).absolute(), given=stored_path, warn=True)

    def _read(self, place: Path, *, given: str | os.PathLike[str] | None = None, warn: bool = False) -> None:
        """Open the archive at `place`, an absolute path, in place of what this object reads; `given`: its name from now on.

        warn: where it has no neighbours and they are asked for. The working directory may change afterwards.
        """
        archive = open_archive(place, data_dtype=self._data_dtype)
        self._drop_staging()
        self.data_path = self.data_path if given is None else given
        self._path, self.mode, self._canonical = place, Mode.READ_APPEND, None
        self._adopt(archive, warn=warn)

    def load_h5ad(self, anndata_path: str | os.PathLike[str]) -> None:
        """Convert an h5ad file into this dataset, which must hold no rows yet; rows are stored exactly as they are there.

        Raises FileNotFoundError, SourceError for a file that cannot be converted, ValueError where rows are there already.
        Warns where values do not fit the dtype, naming the cure.
        """
        if not Path(anndata_path).exists():
            raise FileNotFoundError(f"Error: could not find h5ad path {anndata_path}")
        if self._staging is None and os.path.lexists(self._path):
            raise ValueError(f"{self.data_path} holds rows already; convert {anndata_path} into an archive of its own and use concat")
        with space_errors(self._path):
            var, obs = self._convert(Path(anndata_path))
        label = str(anndata_path)
        try:
            self._var_feature_index.append_features(len(obs), var.features(self.var_feature_index_name), label, names=var.names)
            self._obs_feature_index.append_features(obs.features(self.obs_feature_index_name), label, names=obs.names)
            self._commit()
        except BaseException:
            self._drop_staging()
            raise

    def regular_load_h5ad(self, anndata_path: str | os.PathLike[str]) -> tuple["pd.DataFrame", "pd.DataFrame", int]:
        """Convert the matrix of an h5ad file, without features and unsaved; returns var, obs and the number of rows."""
        var, obs = self._convert(Path(anndata_path))
        return var.to_pandas(), obs.to_pandas(), len(obs)

    def paginated_load_h5ad(self, anndata_path: str | os.PathLike[str]) -> tuple["pd.DataFrame", "pd.DataFrame", int]:
        """Do what `regular_load_h5ad` does: every conversion reads blocks of bounded size."""
        return self.regular_load_h5ad(anndata_path)

    def _convert(self, h5ad: Path) -> tuple["Frame", "Frame"]:
        """Convert the matrix and the graph of `h5ad` into the staging; returns var and obs."""
        from scdl_gpu.convert.stored import store

        directory = self._stage().directory
        try:
            for name in ARRAY_FILES:
                (directory / name).unlink(missing_ok=True)  # arrays made empty for this dataset give way
            key = self.neighbor_key if self.load_neighbors else None
            stored = store(h5ad, directory, target=self._path, use_x=self.use_X_not_raw, data_dtype=self.dtypes[DATA], neighbor_key=key)
            written = stored.written
            archive = change.open_staged(directory, {**self.dtypes, **written.dtypes})
            self._adopt(dataclasses.replace(archive, metadata=stored.metadata))
        except BaseException:
            self._drop_staging()
            raise
        self._canonical = written.canonical and self.mode != Mode.CREATE_APPEND
        if written.max_difference > self.data_dtype_tolerance:
            fitting = ", ".join(sorted(written.holding)) or "float64"
            callers.warn(
                f"Downcasted data values for '{DATA}' are not close to original values. Max abs diff: {written.max_difference:g} "
                f"({h5ad} as {self.dtypes[DATA]}); use a data_dtype that holds them ({fitting}), "
                f"or allow the loss with data_dtype_tolerance"
            )
        return stored.var, stored.obs

    def _stage(self) -> Staging:
        """Return the staging of an archive that is not saved yet, made if need be."""
        if self._staging is None:
            self._staging = Staging.create(self._path)
        return self._staging

    def _drop_staging(self) -> None:
        if self._staging is not None:
            self._staging.discard()
            self._staging = None

    def save(self, output_path: str | os.PathLike[str] | None = None) -> bool:
        """Save arrays and features; what was writable is read-only from then on. Returns True.

        output_path: write the whole archive there, which must not exist; one that is saved already stays as it is.
        Raises ValueError where features describe another number of rows, ArchiveError where arrays filled by hand are no
        CSR of their features, another writer changed the archive meanwhile, or the file system refuses; the archive is
        then as it was.
        """
        self._check_described()
        if self._staging is not None:
            self._commit()
        elif self._is_writable or (output_path is None and isinstance(self._archive, RawArchive)):
            archive = self.raw_archive("save")
            canonical = self._check_filled() if self._is_writable else archive.canonical
            change.flush(archive)
            change.describe(self._path, archive, canonical=canonical)
            self._read(self._path)
        if output_path is not None:
            change.copy(self._archive, Path(output_path))
        return True

    @property
    def _is_writable(self) -> bool:
        """Whether the arrays are writable maps."""
        return isinstance(self._archive, RawArchive) and bool(self._archive.data.flags.writeable)

    def _commit(self) -> None:
        """Put a staged archive in place and read it from there."""
        canonical = self._check_filled() if self._canonical is None else self._canonical
        staging = self._stage()
        with space_errors(staging.path):
            change.flush(self.raw_archive("commit"))
            finish(
                staging.directory,
                dtypes=self.dtypes,
                var=self._var_feature_index,
                obs=self._obs_feature_index,
                canonical=canonical,
                extra=self.metadata,
            )
        staging.commit()
        self._read(self._path)

    def _check_described(self) -> None:
        """Raise ValueError unless the features describe every row, or none."""
        self.number_of_rows()
        n_rows, described = self._archive.n_rows, self._obs_feature_index.number_of_rows()
        if described not in (0, n_rows):
            raise ValueError(
                f"{self.data_path}: obs features describe {described} rows, row pointers {n_rows}; append the missing features"
            )

    def _check_filled(self) -> bool:
        """Read arrays that were filled by hand; tell whether their rows are canonical. Raises ArchiveError where they are no CSR."""
        if not self._var_feature_index.number_of_rows():
            return False
        first, last = int(self.row_index[0]), int(self.row_index[-1])
        if first != 0 or last != self.data.size:
            raise ArchiveError(
                f"{self._file(FileNames.ROWPTR)}: runs from {first} to {last}, expected 0 to {self.data.size}, the number of elements; "
                f"fill row_index, or make the dataset with num_elements={last}"
            )
        return check_rows(self.raw_archive("_check_filled"), self._var_feature_index)

    def cast_data_to_dtype(self, dtype: str) -> None:
        """Rewrite the values in `dtype`, one of uint8/16/32/64 and float16/32/64; warns where values change.

        Raises ValueError for another dtype. The archive is the old one or the new one, never a mixture.
        """
        if dtype not in INT_ORDER + FLOAT_ORDER:
            raise ValueError(f"Cannot cast data to {dtype!r}; expected one of {INT_ORDER + FLOAT_ORDER}")
        self._saved("cast_data_to_dtype")
        before = self.dtypes[DATA]
        difference = change.cast(self._path, self.raw_archive("cast_data_to_dtype"), dtype)
        self._data_dtype = None
        self._read(self._path)
        if difference > self.data_dtype_tolerance:
            callers.warn(
                f"Downcasted data values for '{DATA}' are not close to original values. Max abs diff: {difference:g} "
                f"({self.data_path} from {before} to {dtype}); convert the source anew to a dtype that holds them, or accept the loss"
            )

    def concat(
        self,
        other_dataset: "SingleCellMemMapDataset | list[SingleCellMemMapDataset]",
        extend_copy_size: int = 10 * 1024 * 1024,
        output_path: str | os.PathLike[str] | None = None,
        destroy_on_copy: bool = False,
    ) -> None:
        """Append the rows of other datasets, in place or into a new archive at `output_path`, which this dataset then reads.

        destroy_on_copy: remove the archives of the others afterwards, and with output_path this one's old one too; one that
        another writer changed since it was opened holds rows that were not copied, and is kept with a warning.
        extend_copy_size is accepted and not needed: pieces are as large as copies are fastest. Neighbours, obs, var
        and names are kept. Packed archives are joined shard by shard. Raises ValueError for anything but datasets, or integer and
        float values mixed, NotRawError for packed and raw ones mixed.
        """
        del extend_copy_size
        others = [other_dataset] if isinstance(other_dataset, SingleCellMemMapDataset) else other_dataset
        if not isinstance(others, list) or not all(isinstance(other, SingleCellMemMapDataset) for other in others):
            raise ValueError(f"Expecting either a SingleCellMemMapDataset or a list thereof. Actually got: {type(other_dataset)}")
        datasets = [self, *others]
        for dataset in datasets:
            dataset._saved("concat")
            dataset._check_described()
            if dataset.archive.n_rows != dataset.number_of_rows():
                raise ValueError(
                    f"{dataset.data_path} has {dataset.archive.n_rows} rows and no features; append its features and save it first"
                )
        target = self._path if output_path is None else Path(output_path).absolute()
        change.check_outside(target, [dataset._path for dataset in datasets])
        join(datasets, target, "concat with raw ones", replace=output_path is None)
        sources: dict[Path, list[Archive]] = {}
        for dataset in datasets:
            sources.setdefault(Path(os.path.realpath(dataset._path)), []).append(dataset.archive)
        self._data_dtype = None
        self._read(target, given=output_path)
        if destroy_on_copy:
            sources.pop(Path(os.path.realpath(target)), None)
            for source, copied in sources.items():
                change.destroy(source, copied)

    def to_packed(
        self,
        path: str | os.PathLike[str],
        *,
        group_by: str | None = None,
        reorder_var: bool = False,
        progress: bool | None = None,
    ) -> "SingleCellMemMapDataset":
        """Pack this archive into a new one at `path`, a fifth to a tenth of its size, and open it; arguments of `scdl_gpu.pack.pack`."""
        from scdl_gpu.pack import pack

        self._saved("to_packed")
        archive = self.raw_archive("packing")
        pack(archive.path, path, group_by=group_by, reorder_var=reorder_var, stored_dtype=self._data_dtype, progress=progress)
        return SingleCellMemMapDataset(path)

    def _saved(self, action: str) -> None:
        if self._staging is not None:
            raise ValueError(f"{self.data_path} is not saved yet; call save() before {action}")

    def __getstate__(self) -> dict[str, Any]:
        """Carry the path, what tells the archive there, and the options, never the data; ValueError before the first save."""
        self._saved("pickling")
        state = {name: value for name, value in self.__dict__.items() if name not in OPENED}
        return state | {"data_path": type(self.data_path)(str(self._path)), "_pickled": identity(self._archive)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the archive again. Raises ArchiveError where another one, or another state of it, is there now."""
        pickled = state.pop("_pickled")
        self.__dict__.update(state)
        self._staging = None
        self.load(self.data_path)
        check_identity(self._archive, pickled)


def join(datasets: list[SingleCellMemMapDataset], target: Path, action: str, *, replace: bool = False) -> None:
    """Write the rows of all datasets to `target`: raw ones into one raw archive, packed ones, without a look at their rows, as one.

    Raises NotRawError for packed and raw ones mixed, naming the `action` that needs arrays, and ValueError as joining does.
    """
    packed = [dataset.archive for dataset in datasets if isinstance(dataset.archive, PackedArchive)]
    if len(packed) == len(datasets):
        concat_packed(packed, target, replace=replace)
        return
    archives = [dataset.raw_archive(action) for dataset in datasets]
    data_dtype = common_dtype((str(dataset.data_path), dataset.dtypes[DATA]) for dataset in datasets)
    change.join_into(archives, target, data_dtype=data_dtype, replace=replace)
