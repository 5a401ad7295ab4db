"""Labels of the blocks of a feature directory: where each block came from, a string or nothing.

Knows labels.json, and the labels.npy of older archives, plain text or pickled paths. A pickle is never run: its
classes are replaced by stand-ins of this module that only collect values, and anything but a list of paths
and strings is refused. Costs a slower reader (pure Python), for a handful of labels.
"""

import io
import json
import os
import pickle
import struct
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from scdl_gpu.archive.npy import read_bytes, read_npy, split_npy, text_items
from scdl_gpu.errors import ArchiveError, MissingFileError

JSON_NAME = "labels.json"
NPY_NAME = "labels.npy"

PATH_MODULES = ("pathlib", "pathlib._local")
POSIX_PATHS = ("PosixPath", "PurePosixPath", "Path", "PurePath")
WINDOWS_PATHS = ("WindowsPath", "PureWindowsPath")
NUMPY_NAMES = (
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
)

PATH_CHARACTERS = 16 << 20
"""All pickled paths together: 100,000 long ones. A pickle holds a string once that it uses in any number of paths."""

PICKLE_FAULTS = (
    pickle.UnpicklingError,
    struct.error,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    NotImplementedError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What the pure Python unpickler raises for damaged bytes."""


class PickledLabelsError(ArchiveError, ValueError):
    """Labels that are pickled, where only plain ones are read."""


def read_labels(directory: Path, *, pickled_paths: bool = False) -> list[str | None]:
    """Read the labels of a feature directory, labels.json before labels.npy.

    pickled_paths: read pickled pathlib paths too, as strings; without it they raise PickledLabelsError.
    Raises MissingFileError where neither file exists, ArchiveError for a damaged one.
    """
    if (directory / JSON_NAME).exists():
        return _read_json(directory / JSON_NAME)
    path = directory / NPY_NAME
    if not path.exists():
        raise MissingFileError(f"No labels file found in {directory}: expected {JSON_NAME} or {NPY_NAME}; copy the archive again")
    dtype, shape, body = split_npy(path, read_bytes(path))
    if not dtype.hasobject:
        return list(text_items(path, read_npy(path))) if shape != (0,) else []
    if not pickled_paths:
        raise PickledLabelsError(
            f"{path} contains pickled objects, which are not run; open the whole archive, which admits pickled paths, or save it anew"
        )
    return unpickle_paths(path, body, shape)


def label_files(labels: Sequence[Any], *, legacy: bool = False) -> dict[str, bytes]:
    """Return the files, content by name, that hold `labels` (strings, paths or None).

    legacy: also an unpickled labels.npy, null as "", so that bionemo-scdl 0.1.3 opens the directory too.
    """
    texts = [None if label is None else os.fspath(label) if isinstance(label, os.PathLike) else str(label) for label in labels]
    files = {JSON_NAME: json.dumps(texts).encode()}
    if legacy:
        buffer = io.BytesIO()
        np.save(buffer, np.array([text or "" for text in texts], dtype=np.str_), allow_pickle=False)
        files[NPY_NAME] = buffer.getvalue()
    return files


def unpickle_paths(path: Path, body: bytes, shape: tuple[int, ...]) -> list[str | None]:
    """Return paths and strings of a pickled one-dimensional object array, without running the pickle.

    body: what follows the npy header of `path`; shape: what that header says. Raises ArchiveError for anything else.
    """
    unpickler = _stand_in_unpickler(body)
    try:
        items = unpickler()
    except PICKLE_FAULTS as error:
        raise ArchiveError(f"{path}: its pickled labels are refused ({error}); only paths and strings are read: save it anew") from error
    if shape != (len(items),):
        raise ArchiveError(f"{path}: holds {len(items)} labels, its header promises shape {shape}; copy the archive again")
    return items


def _read_json(path: Path) -> list[str | None]:
    try:
        labels = json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise ArchiveError(f"{path}: not JSON ({error}); copy the archive again") from error
    if not isinstance(labels, list) or not all(label is None or isinstance(label, str) for label in labels):
        raise ArchiveError(f"{path}: holds {str(labels)[:60]}, expected a list of strings and nulls")
    return labels


def _stand_in_unpickler(body: bytes) -> Callable[[], list[str | None]]:
    """Return a function that loads `body`; its stand-ins are new each time, so that a pickle can change nothing that stays."""
    strings = _counted_strings()

    class Posix:
        def __init__(self, *parts: Any) -> None:
            self.text = str(PurePosixPath(*strings(parts)))

    class Windows:
        def __init__(self, *parts: Any) -> None:
            self.text = str(PureWindowsPath(*strings(parts)))

    class Dtype:
        def __init__(self, *_: Any) -> None: ...

        def __setstate__(self, state: Any) -> None: ...

    class Array:
        def __init__(self, *_: Any) -> None:
            self.items: Any = None

        def __setstate__(self, state: Any) -> None:
            self.items = state[4]

    class Ndarray: ...

    admitted: dict[tuple[str, str], Any] = dict(zip(NUMPY_NAMES, (Array, Array, Ndarray, Dtype), strict=True))
    for module in PATH_MODULES:
        admitted |= {(module, name): Posix for name in POSIX_PATHS} | {(module, name): Windows for name in WINDOWS_PATHS}

    class Unpickler(pickle._Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) not in admitted:
                raise pickle.UnpicklingError(f"{module}.{name} is not admitted")
            return admitted[module, name]

        def get_extension(self, code: int) -> None:
            raise pickle.UnpicklingError(f"extension {code} is not admitted")

    def load() -> list[str | None]:
        loaded = Unpickler(io.BytesIO(body)).load()
        if type(loaded) is not Array or type(loaded.items) is not list:
            raise pickle.UnpicklingError("it is no array of objects")
        return [_label(item.text if type(item) in (Posix, Windows) else item) for item in loaded.items]

    return load


def _counted_strings() -> Callable[[Sequence[Any]], Sequence[str]]:
    """Return a function that passes the parts of a path, if they are strings and not too many by now."""
    left = PATH_CHARACTERS

    def strings(parts: Sequence[Any]) -> Sequence[str]:
        nonlocal left
        if not all(type(part) is str for part in parts):
            raise pickle.UnpicklingError("a path is made of something else than strings")
        left -= sum(len(part) + 1 for part in parts)
        if left < 0:
            raise pickle.UnpicklingError(f"paths of more than {PATH_CHARACTERS:,} characters")
        return parts

    return strings


def _label(item: Any) -> str | None:
    if item is None or type(item) is str:
        return item
    raise pickle.UnpicklingError(f"a label is a {type(item).__name__}")
