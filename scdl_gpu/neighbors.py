"""A neighbour for a row: of which graph, which one, and what is said where there is none.

Knows graphs and the strategy, not values of rows. RANDOM draws with `numpy.random.choice`, looked up in
its module at every call, because existing code seeds and replaces it there; weights play no part.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scdl_gpu import callers
from scdl_gpu.archive.constants import NeighborSamplingStrategy
from scdl_gpu.archive.graphs import NEIGHBOR_FILES, Graph, graph_directory
from scdl_gpu.archive.parts import Archive

DEFAULT_KEY = "next_cell_ids"
"""bionemo-scdl's default, which stands for the neighbour files of any archive: it has no other graphs."""
HOW = "convert the source with its graph (convert_h5ad(..., obsp=[key])) and open the archive with load_neighbors=True, neighbor_key=key"


def strategy_of(value: NeighborSamplingStrategy | str) -> NeighborSamplingStrategy:
    """Return the strategy that `value` names. Raises ValueError."""
    try:
        return NeighborSamplingStrategy(value)
    except ValueError as error:
        known = ", ".join(repr(strategy.value) for strategy in NeighborSamplingStrategy)
        raise ValueError(f"Unsupported neighbor_sampling_strategy: {value!r}; expected one of {known}") from error


def graph_of(archive: Archive, key: str, *, strict: bool) -> tuple[Graph | None, Path]:
    """Return the graph `key` of an archive, unchecked, None where there is none; and the file that a fault in it is to name.

    The neighbour files where `key` is the one that metadata.json records for them, else the graph under obsp/. The
    default key stands for the neighbour files as well, and where none is recorded every key does, as in bionemo-scdl.
    strict: raise ValueError, naming the keys that are there, for another key than those.
    """
    recorded = archive.metadata.get("neighbor_key")
    if key != recorded and key in archive.obsp:
        return archive.obsp[key], archive.path / graph_directory(key)
    if key in (DEFAULT_KEY, recorded) or recorded is None:
        return archive.neighbors, archive.path / NEIGHBOR_FILES[0]
    there = dict.fromkeys([*([] if archive.neighbors is None else [repr(recorded)]), *map(repr, archive.obsp)])
    if strict and there:
        raise ValueError(
            f"{archive.path} holds no graph {key!r}, but {', '.join(there)}; open it with one of these as neighbor_key, "
            f"or convert the source anew with obsp=[{key!r}]"
        )
    return None, archive.path / NEIGHBOR_FILES[0]


@dataclass(slots=True)
class NeighborSampler:
    """Neighbours of rows 0 <= row < n_rows. `graph` is None where none was loaded; `enabled` whether one was asked for."""

    graph: Graph | None
    n_rows: int
    enabled: bool
    strategy: NeighborSamplingStrategy
    fallback_to_identity: bool

    def indices(self, row: int) -> NDArray[Any]:
        """Return the neighbours of `row`, (k,) in the stored dtype; (0,) int64 where neighbours are off."""
        self._check(row)
        return self._graph().neighbors(row) if self.enabled else np.array([], dtype=np.int64)

    def weights(self, row: int) -> NDArray[Any]:
        """Return the weights of the neighbours of `row`, (k,) in the stored dtype; (0,) float64 where neighbours are off."""
        if not self.enabled:
            return np.array([], dtype=np.float64)
        graph = self._graph()
        self._check(row)
        return graph.weights(row)

    def sample(self, row: int) -> Any:
        """Return one neighbour of `row` (a NumPy integer), or `row` itself where it has none or neighbours are off."""
        found = self.indices(row)
        if not self.enabled:
            return row
        if found.size == 0:
            if not self.fallback_to_identity:
                callers.warn(f"Cell {row} has no neighbors and fallback_to_identity=False. Returning cell index itself anyway.")
            return row
        return np.random.choice(found) if self.strategy is NeighborSamplingStrategy.RANDOM else found[0]  # noqa: NPY002

    def stats(self) -> dict[str, Any]:
        """Count connections; `{"has_neighbors": False}` where there is no graph."""
        return {"has_neighbors": False} if self.graph is None else self.graph.stats()

    def _check(self, row: int) -> None:
        if not 0 <= row < self.n_rows:
            raise IndexError(f"Cell index {row} out of bounds for dataset with {self.n_rows} cells")

    def _graph(self) -> Graph:
        if self.graph is None:
            raise ValueError(f"Neighbor functionality was enabled but no neighbor data is available; {HOW}")
        return self.graph
