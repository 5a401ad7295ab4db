"""Every public name of bionemo-scdl is in scdl_gpu.compat, and is the kind of thing that it is there."""

import dataclasses
import enum
import importlib
import inspect
import pkgutil
from typing import Any

import pytest

from scdl_gpu import compat

NAMES = {
    "io.single_cell_memmap_dataset": ["SingleCellMemMapDataset"],
    "io.single_cell_collection": ["FileNames", "SingleCellCollection"],
    "index.row_feature_index": ["ObservedFeatureIndex", "RowFeatureIndex", "VariableFeatureIndex", "are_dicts_equal"],
    "api.single_cell_row_dataset": ["SingleCellRowDataset", "SingleCellRowDatasetCore"],
    "util.scdl_constants": ["ArrayDType", "Backend", "FileNames", "Mode", "NeighborSamplingStrategy", "INT_ORDER", "FLOAT_ORDER"],
    "util.torch_dataloader_utils": ["collate_sparse_matrix_batch", "collate_neighbor_sparse_matrix_batch"],
    "util.memmap_utils": [
        "smallest_uint_dtype",
        "determine_dtype",
        "_pad_sparse_array",
        "_create_row_memmaps",
        "_create_data_col_memmaps",
        "_create_compressed_sparse_row_memmaps",
        "_extract_features",
    ],
    "schema.magic": ["SCDL_MAGIC_NUMBER"],
    "schema.version": ["Version", "SCDLVersion", "CurrentSCDLVersion"],
    "schema.headerutil": ["BinaryHeaderCodec", "Endianness", "HeaderSerializationError"],
    "schema.header": [
        "ArrayInfo",
        "FeatureIndexInfo",
        "SCDLHeader",
        "HeaderReader",
        "create_header_from_arrays",
        "validate_header_compatibility",
        "merge_headers",
    ],
}
PAIRS = [(module, name) for module, names in NAMES.items() for name in names]


def theirs(module: str, name: str) -> Any:
    """Give the reference's object, or skip where it is not installed."""
    pytest.importorskip("bionemo.scdl", reason="bionemo-scdl is not installed: pip install -e '.[dev]'")
    return getattr(importlib.import_module(f"bionemo.scdl.{module}"), name)


def parameters(function: Any) -> list[tuple[str, Any]]:
    """List the positional parameters of a function with their defaults, enum members by value; `self` and what is keyword-only left out."""
    found = inspect.signature(function).parameters.values()
    positional = [p for p in found if p.name != "self" and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [(p.name, p.default.value if isinstance(p.default, enum.Enum) else p.default) for p in positional]


def test_all_names_are_there() -> None:
    """Each name of the table can be imported flat, and `__all__` holds them and no others."""
    names = {name for _, name in PAIRS}

    assert set(compat.__all__) == names
    assert all(hasattr(compat, name) for name in names)


def test_the_table_is_complete() -> None:
    """No public class, function or constant that the reference's own modules define is missing from the table."""
    scdl = pytest.importorskip("bionemo.scdl", reason="bionemo-scdl is not installed: pip install -e '.[dev]'")
    skipped = ("scripts", "data", "util.async_worker_queue", "util.filecopyutil")

    modules = [info.name.removeprefix("bionemo.scdl.") for info in pkgutil.walk_packages(scdl.__path__, "bionemo.scdl.") if not info.ispkg]

    missing = []
    for module in (name for name in modules if not name.startswith(skipped)):
        namespace = vars(importlib.import_module(f"bionemo.scdl.{module}"))
        own = {
            name
            for name, value in namespace.items()
            if not name.startswith("_") and getattr(value, "__module__", None) == f"bionemo.scdl.{module}"
        }
        missing += sorted(f"{module}.{name}" for name in own - set(NAMES.get(module, [])))
    assert missing == []


@pytest.mark.parametrize(("module", "name"), PAIRS)
def test_a_name_is_the_same_kind_of_thing(module: str, name: str) -> None:
    """Classes are classes with the public members of theirs, enums have their members and values, constants are equal."""
    ours, other = getattr(compat, name), theirs(module, name)

    assert isinstance(ours, type) == isinstance(other, type)
    assert callable(ours) == callable(other)
    if isinstance(other, enum.EnumMeta):
        assert {member: ours[member].value for member in other.__members__} == {
            member: value.value for member, value in other.__members__.items()
        }
    elif isinstance(other, type):
        members = {member for cls in other.__mro__ if cls.__module__.startswith("bionemo") for member in vars(cls)}
        public = {member for member in members if not member.startswith("_")}
        fields = {field.name for field in dataclasses.fields(ours)} if dataclasses.is_dataclass(ours) else set()
        left_to_children = {"append_features"} if inspect.isabstract(ours) else set()
        assert public - set(dir(ours)) - fields - left_to_children == set()
    elif not callable(other):
        assert ours == other


def same_default(ours: Any, other: Any) -> bool:
    """Compare two defaults; None that becomes an empty list is one that a factory makes."""
    return ours == other or repr(ours) == repr(other) or (other is None and repr(ours) == "<factory>")


METHODS = [
    ("io.single_cell_memmap_dataset", "SingleCellMemMapDataset"),
    ("io.single_cell_collection", "SingleCellCollection"),
    ("index.row_feature_index", "ObservedFeatureIndex"),
    ("index.row_feature_index", "VariableFeatureIndex"),
    ("schema.header", "SCDLHeader"),
    ("schema.header", "ArrayInfo"),
    ("schema.header", "FeatureIndexInfo"),
    ("schema.headerutil", "BinaryHeaderCodec"),
]


@pytest.mark.parametrize(("module", "name"), METHODS)
def test_methods_take_the_same_arguments(module: str, name: str) -> None:
    """Constructor and public methods have the reference's positional parameters, in order, with its defaults; more may follow."""
    ours, other = getattr(compat, name), theirs(module, name)
    functions = [member for member, value in inspect.getmembers(other, callable) if not member.startswith("_")] + ["__init__"]

    different = []
    for member in functions:
        found, expected = parameters(getattr(ours, member)), parameters(getattr(other, member))
        if [p[0] for p in found[: len(expected)]] != [p[0] for p in expected]:
            different.append((member, found, expected))
        defaults = zip(found, expected, strict=False)
        different += [(member, *ours_, *theirs_) for ours_, theirs_ in defaults if not same_default(ours_[1], theirs_[1])]

    assert different == []


@pytest.mark.parametrize("name", [name for module, name in PAIRS if module in ("util.memmap_utils", "util.torch_dataloader_utils")])
def test_functions_take_the_same_arguments(name: str) -> None:
    """Parameters and defaults of free functions are the reference's."""
    module = next(module for module, names in NAMES.items() if name in names)

    found, expected = parameters(getattr(compat, name)), parameters(theirs(module, name))

    assert found == expected


def test_the_dataset_is_a_torch_dataset() -> None:
    """And an instance of both abstract classes, as there; the collection is one of the core only."""
    from torch.utils.data import Dataset

    assert issubclass(compat.SingleCellMemMapDataset, compat.SingleCellRowDataset)
    assert issubclass(compat.SingleCellRowDataset, (compat.SingleCellRowDatasetCore, Dataset))
    assert issubclass(compat.SingleCellCollection, compat.SingleCellRowDatasetCore)
    assert not issubclass(compat.SingleCellCollection, Dataset)
    for abstract in (compat.SingleCellRowDataset, compat.SingleCellRowDatasetCore):
        with pytest.raises(TypeError, match="abstract"):
            abstract()
