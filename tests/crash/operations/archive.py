# ruff: noqa: D102 - the methods are described once, in operation.py
"""What a person does to archives: convert, fill, cast, join, save.

Knows the package's API and nothing of its files. Expected rows are SciPy matrices made here, features are
lists; an archive is looked at row by row, through a dataset that is opened for it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
from operation import Creation, Operation, TornError

from scdl_gpu.archive.constants import Mode
from scdl_gpu.convert import convert_h5ad
from scdl_gpu.dataset import SingleCellMemMapDataset


@dataclass(frozen=True)
class Part:
    """Rows that come from one source, with what is said of them."""

    matrix: sp.csr_matrix
    batch: list[str]
    genes: list[str]

    @classmethod
    def make(cls, seed: int, n_rows: int, n_vars: int, dtype: str = "float32") -> "Part":
        random = np.random.default_rng(seed)
        dense = random.integers(1, 200, (n_rows, n_vars)) * (random.random((n_rows, n_vars)) < 0.5)
        batch = [f"batch {seed}.{row % 2}" for row in range(n_rows)]
        return cls(sp.csr_matrix(dense.astype(dtype)), batch, [f"gene {i}" for i in range(n_vars)])

    def write(self, path: Path, layout: str = "csr") -> None:
        """Write the rows as an h5ad with a graph in which each row leads to the next."""
        x = {"csr": self.matrix, "csc": self.matrix.tocsc(), "dense": self.matrix.toarray()}[layout]
        n_rows = len(self.batch)
        obs = pd.DataFrame({"batch": pd.Categorical(self.batch)}, index=[f"cell {i}" for i in range(n_rows)])
        var = pd.DataFrame({"symbol": self.genes}, index=[f"id {gene}" for gene in self.genes])
        source = anndata.AnnData(X=x, obs=obs, var=var)
        source.obsm["pca"] = np.arange(2 * n_rows, dtype=np.float32).reshape(n_rows, 2)
        source.obsp["next_cell_ids"] = sp.csr_matrix((np.ones(n_rows), ((np.arange(n_rows)), (np.arange(n_rows) + 1) % n_rows)))
        source.write_h5ad(path)


FIRST, SECOND, THIRD = Part.make(1, 9, 6), Part.make(2, 5, 6), Part.make(3, 4, 8)


def check(dataset: SingleCellMemMapDataset, parts: list[Part], dtype: str = "float32") -> None:
    """Raise TornError unless a dataset holds the rows of `parts`, one after the other, with their features."""
    if len(dataset) != sum(len(part.batch) for part in parts):
        raise TornError(f"{len(dataset)} rows, expected those of {len(parts)} parts")
    row = 0
    for part in parts:
        for i, batch in enumerate(part.batch):
            (values, columns), var, obs = dataset.get_row(row, return_var_features=True, return_obs_features=True)
            expected = part.matrix[i]
            if values.dtype != dtype or not np.array_equal(values, expected.data) or not np.array_equal(columns, expected.indices):
                raise TornError(f"row {row}: {values.dtype} {values} in {columns}, expected {dtype} {expected.data} in {expected.indices}")
            if list(var[0]) != part.genes or obs != [batch]:
                raise TornError(f"row {row}: features {var} {obs}, expected {part.genes} {batch}")
            row += 1


def whole(path: Path, parts: list[Part], dtype: str = "float32") -> bool:
    """Tell whether there is an archive at `path`; raise TornError unless it is whole."""
    if not path.exists():
        return False
    check(SingleCellMemMapDataset(path), parts, dtype)
    return True


def archive_of(part: Part, directory: Path, name: str) -> None:
    """Make an archive of `part` without leaving its source behind."""
    source = directory / f"{name}.h5ad"
    part.write(source)
    SingleCellMemMapDataset(directory / name, h5ad_path=source, use_X_not_raw=True)


class Construct(Creation):
    """The constructor, from an h5ad."""

    options: dict[str, Any] = {}  # noqa: RUF012

    def setup(self, directory: Path) -> None:
        FIRST.write(directory / "source.h5ad")

    def act(self, directory: Path) -> Any:
        return SingleCellMemMapDataset(directory / "archive", h5ad_path=directory / "source.h5ad", use_X_not_raw=True, **self.options)

    def state(self, directory: Path) -> str:
        return "new" if whole(directory / "archive", [FIRST]) else "old"

    def write_next(self, directory: Path) -> None:
        SingleCellMemMapDataset(directory / "archive").save()


class ConstructInBlocks(Construct):
    """The constructor, in blocks of few rows and with a graph."""

    options = {"paginated_load_cutoff": 0, "load_block_row_size": 2, "load_neighbors": True}  # noqa: RUF012

    def state(self, directory: Path) -> str:
        state = super().state(directory)
        if state == "new":
            dataset = SingleCellMemMapDataset(directory / "archive", load_neighbors=True)
            found = [dataset.get_neighbor_indices_for_cell(i).tolist() for i in range(9)]
            if found != [[(i + 1) % 9] for i in range(9)]:
                raise TornError(f"neighbours {found}")
        return state


class Convert(Construct):
    """convert_h5ad, with everything that it can keep."""

    def __init__(self, layout: str) -> None:
        self.layout = layout

    def setup(self, directory: Path) -> None:
        FIRST.write(directory / "source.h5ad", self.layout)

    def act(self, directory: Path) -> Any:
        return convert_h5ad(directory / "source.h5ad", directory / "archive", x="X", obsm=("pca",), obsp=("next_cell_ids",))

    def state(self, directory: Path) -> str:
        return "new" if whole(directory / "archive", [FIRST], "uint8") else "old"


class FillByHand(Construct):
    """Arrays made empty, filled and saved."""

    def setup(self, directory: Path) -> None:
        pass

    def act(self, directory: Path) -> Any:
        matrix = FIRST.matrix
        dataset = SingleCellMemMapDataset(directory / "archive", num_elements=matrix.nnz, num_rows=matrix.shape[0], mode=Mode.CREATE_APPEND)
        dataset.row_index[:] = matrix.indptr
        dataset.col_index[:] = matrix.indices
        dataset.data[:] = matrix.data
        dataset.var_features().append_features(matrix.shape[0], {"symbol": np.array(FIRST.genes)})
        dataset.obs_features().append_features({"batch": np.array(FIRST.batch)})
        dataset.save()
        return dataset


class OnArchive(Operation):
    """An operation on the archive of FIRST."""

    def setup(self, directory: Path) -> None:
        archive_of(FIRST, directory, "archive")

    def open(self, directory: Path) -> Any:
        return SingleCellMemMapDataset(directory / "archive")

    def check_reader(self, reader: Any) -> None:
        check(reader, [FIRST])


class SaveAgain(OnArchive):
    """A save that changes nothing."""

    def act(self, directory: Path) -> Any:
        return SingleCellMemMapDataset(directory / "archive").save()

    def state(self, directory: Path) -> str:
        if not whole(directory / "archive", [FIRST]):
            raise TornError("the archive is gone")
        return "new"


class SaveElsewhere(OnArchive, Creation):
    """A save to another path."""

    def act(self, directory: Path) -> Any:
        return SingleCellMemMapDataset(directory / "archive").save(directory / "copy")

    def state(self, directory: Path) -> str:
        if not whole(directory / "archive", [FIRST]):
            raise TornError("the archive is gone")
        return "new" if whole(directory / "copy", [FIRST]) else "old"


class Cast(OnArchive):
    """Values rewritten in another dtype."""

    def act(self, directory: Path) -> Any:
        return SingleCellMemMapDataset(directory / "archive").cast_data_to_dtype("uint8")

    def state(self, directory: Path) -> str:
        state = "old" if SingleCellMemMapDataset(directory / "archive").dtypes["data.npy"] == "float32" else "new"
        whole(directory / "archive", [FIRST], "float32" if state == "old" else "uint8")
        return state


class Concat(OnArchive):
    """Rows appended in place, from an archive of the same genes and one of others."""

    def setup(self, directory: Path) -> None:
        super().setup(directory)
        archive_of(SECOND, directory, "second")
        archive_of(THIRD, directory, "third")

    def act(self, directory: Path) -> Any:
        others = [SingleCellMemMapDataset(directory / name) for name in ("second", "third")]
        return SingleCellMemMapDataset(directory / "archive").concat(others)

    def state(self, directory: Path) -> str:
        whole(directory / "second", [SECOND])
        whole(directory / "third", [THIRD])
        state = "old" if len(SingleCellMemMapDataset(directory / "archive")) == len(FIRST.batch) else "new"
        whole(directory / "archive", [FIRST] if state == "old" else [FIRST, SECOND, THIRD])
        return state

    def again(self, directory: Path, state: str) -> None:
        if state == "old":
            super().again(directory, state)
        else:
            self.act(directory)
            whole(directory / "archive", [FIRST, SECOND, THIRD, SECOND, THIRD])


class ConcatElsewhere(Concat, Creation):
    """Rows of several archives joined at another path."""

    def act(self, directory: Path) -> Any:
        others = [SingleCellMemMapDataset(directory / name) for name in ("second", "third")]
        return SingleCellMemMapDataset(directory / "archive").concat(others, output_path=directory / "joined")

    def state(self, directory: Path) -> str:
        for name, part in (("archive", FIRST), ("second", SECOND), ("third", THIRD)):
            if not whole(directory / name, [part]):
                raise TornError(f"{name} is gone")
        return "new" if whole(directory / "joined", [FIRST, SECOND, THIRD]) else "old"

    def again(self, directory: Path, state: str) -> None:
        Creation.again(self, directory, state)


class ConcatDestroying(Concat):
    """Rows of several archives joined at another path, and the archives removed."""

    sources = (("archive", FIRST), ("second", SECOND), ("third", THIRD))
    result = "joined"

    def act(self, directory: Path) -> Any:
        others = [SingleCellMemMapDataset(directory / name) for name in ("second", "third")]
        return SingleCellMemMapDataset(directory / "archive").concat(others, output_path=directory / "joined", destroy_on_copy=True)

    def state(self, directory: Path) -> str:
        present = [whole(directory / name, [part]) for name, part in self.sources]
        if whole(directory / self.result, [FIRST, SECOND, THIRD]):
            return "new"
        if not all(present):
            raise TornError(f"the result is not there, and of the sources only {present}")
        return "old"

    def again(self, directory: Path, state: str) -> None:
        try:
            self.act(directory)
        except (FileExistsError, ValueError):  # the result is there, or a source is not
            if state == "old":
                raise
        for name, part in self.sources:  # the next writers, who tidy up
            if (directory / name).exists():
                SingleCellMemMapDataset(directory / name).save()
            else:
                (directory / f"{name}.h5ad").unlink(missing_ok=True)
                archive_of(part, directory, name)


class ConcatInPlaceDestroying(ConcatDestroying):
    """Rows appended in place, and the archives that they come from removed."""

    sources = (("second", SECOND), ("third", THIRD))
    result = "archive"

    def act(self, directory: Path) -> Any:
        others = [SingleCellMemMapDataset(directory / name) for name in ("second", "third")]
        return SingleCellMemMapDataset(directory / "archive").concat(others, destroy_on_copy=True)

    def state(self, directory: Path) -> str:
        present = [whole(directory / name, [part]) for name, part in self.sources]
        if len(SingleCellMemMapDataset(directory / "archive")) == len(FIRST.batch):
            whole(directory / "archive", [FIRST])
            if not all(present):
                raise TornError(f"nothing is joined, and of the sources only {present} are there")
            return "old"
        whole(directory / "archive", [FIRST, SECOND, THIRD])
        return "new"


OPERATIONS: dict[str, Operation] = {
    "construct": Construct(),
    "construct in blocks": ConstructInBlocks(),
    "convert csr": Convert("csr"),
    "convert csc": Convert("csc"),
    "convert dense": Convert("dense"),
    "fill by hand": FillByHand(),
    "save again": SaveAgain(),
    "save elsewhere": SaveElsewhere(),
    "cast": Cast(),
    "concat": Concat(),
    "concat elsewhere": ConcatElsewhere(),
    "concat destroying": ConcatDestroying(),
    "concat in place destroying": ConcatInPlaceDestroying(),
}
