"""Labels of blocks: the forms they have on disk, and pickles that must not run."""

import copyreg
import json
import pickle
import random
from collections import OrderedDict
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import pytest

from scdl_gpu.archive.labels import label_files, read_labels
from scdl_gpu.errors import ArchiveError, MissingFileError

PATHS = np.array([Path("/data/a.h5ad"), Path("b.h5ad"), "text", None], dtype=object)


def save_npy(directory: Path, array: Any) -> Path:
    """Write labels.npy the way NumPy does."""
    np.save(directory / "labels.npy", array, allow_pickle=True)
    return directory / "labels.npy"


def save_pickle(directory: Path, body: bytes, *, n_labels: int = 1) -> None:
    """Write labels.npy with the header of an object array and any bytes for a pickle."""
    path = save_npy(directory, np.array([None] * n_labels, dtype=object))
    content = path.read_bytes()
    start = content.index(b"\n") + 1
    path.write_bytes(content[:start] + body)


@pytest.mark.parametrize("legacy", [False, True])
def test_labels_come_back(tmp_path: Path, legacy: bool) -> None:
    """Strings, paths and None are written and read back, paths as strings."""
    for name, content in label_files(["a", Path("/b/c"), None, "é"], legacy=legacy).items():
        (tmp_path / name).write_bytes(content)

    assert json.loads((tmp_path / "labels.json").read_text()) == ["a", "/b/c", None, "é"]
    assert read_labels(tmp_path) == ["a", "/b/c", None, "é"]
    assert (tmp_path / "labels.npy").exists() == legacy


def test_legacy_labels_are_plain_text(tmp_path: Path) -> None:
    """The labels.npy beside labels.json needs no pickle; null is the empty string."""
    (tmp_path / "labels.npy").write_bytes(label_files(["a", None], legacy=True)["labels.npy"])

    array = np.load(tmp_path / "labels.npy", allow_pickle=False)

    assert array.dtype.kind == "U"
    assert array.tolist() == ["a", ""]
    assert read_labels(tmp_path) == ["a", ""]


def test_no_blocks_have_no_labels(tmp_path: Path) -> None:
    """An empty list of labels comes back from either file, also as bionemo-scdl writes it (an array of floats)."""
    save_npy(tmp_path, np.array([]))

    assert read_labels(tmp_path) == []


def test_missing_labels_are_named(tmp_path: Path) -> None:
    """Without either file the error is a FileNotFoundError that names the directory."""
    with pytest.raises(FileNotFoundError, match=r"No labels file found in .*labels\.json") as caught:
        read_labels(tmp_path)

    assert isinstance(caught.value, MissingFileError)


def test_pickled_labels_are_refused_unless_admitted(tmp_path: Path) -> None:
    """Pickled labels are a ValueError naming the file, and an ArchiveError, where they are not asked for."""
    save_npy(tmp_path, PATHS)

    with pytest.raises(ValueError, match=r"labels\.npy contains pickled objects") as caught:
        read_labels(tmp_path)

    assert isinstance(caught.value, ArchiveError)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_pickled_paths_are_read_as_strings(tmp_path: Path, protocol: int) -> None:
    """Paths, strings and None in an object array of any pickle protocol that NumPy has used are read."""
    save_pickle(tmp_path, pickle.dumps(PATHS, protocol=protocol), n_labels=4)

    labels = read_labels(tmp_path, pickled_paths=True)

    assert labels == ["/data/a.h5ad", "b.h5ad", "text", None]
    assert {type(label) for label in labels} == {str, type(None)}


@pytest.mark.parametrize(
    ("modern", "older"),
    [(b"numpy._core.multiarray", b"numpy.core.multiarray"), (b"pathlib", b"pathlib._local"), (b"PosixPath", b"PurePath")],
)
def test_other_versions_of_python_and_numpy_spell_names_differently(tmp_path: Path, modern: bytes, older: bytes) -> None:
    """Names of NumPy 1 and of pathlib in Python 3.13 are admitted."""
    save_pickle(tmp_path, pickle.dumps(PATHS, protocol=3).replace(modern, older), n_labels=4)

    assert read_labels(tmp_path, pickled_paths=True) == ["/data/a.h5ad", "b.h5ad", "text", None]


def test_windows_paths_are_read_anywhere(tmp_path: Path) -> None:
    """A path pickled on Windows is read as text, with its backslashes."""
    body = pickle.dumps(np.array([PureWindowsPath("C:/x/y.h5ad")], dtype=object), protocol=3)
    save_pickle(tmp_path, body.replace(b"PureWindowsPath", b"WindowsPath"))

    assert read_labels(tmp_path, pickled_paths=True) == ["C:\\x\\y.h5ad"]


class Call:
    """Pickles as a call of `function(*arguments)`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def hostile(marker: Path) -> dict[str, bytes]:
    """Return pickles that would write `marker`, or smuggle in something else than paths and strings."""
    touch = f"open({str(marker)!r}, 'w').close()"
    loose = pickle.dumps(PATHS, protocol=3)
    return {
        "exec": pickle.dumps(np.array([Call(exec, touch)], dtype=object)),
        "exec alone": pickle.dumps(Call(exec, touch)),
        "open": pickle.dumps(np.array([Call(open, str(marker), "w")], dtype=object)),
        "protocol 0": b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR.",
        "method of a path": b"cpathlib\nPath.touch\n(cpathlib\nPosixPath\n(S'" + str(marker).encode() + b"'\ntRtR.",
        "extension": b"\x80\x02\x82\x01.",
        "persistent": b"Pid\n.",
        "set": pickle.dumps(np.array([{1}], dtype=object)),
        "number": pickle.dumps(np.array([1], dtype=object)),
        "nested": pickle.dumps(np.array([[Path("a")], 1], dtype=object)[:1]),
        "ordered dict": pickle.dumps(np.array([OrderedDict()], dtype=object)),
        "no array": pickle.dumps([Path("a")]),
        "numbers": pickle.dumps(np.arange(3)),
        "path of a number": pickle.dumps(np.array([Call(PurePosixPath, 1)], dtype=object)),
        "class itself": pickle.dumps(np.array([Path], dtype=object)),
        "not enough": loose[: len(loose) // 2],
        "nothing": b"",
        "deep": b"(" * 100_000,
    }


@pytest.mark.parametrize("name", hostile(Path("x")))
def test_hostile_pickles_are_refused(tmp_path: Path, name: str) -> None:
    """Nothing of a pickle is called, whatever it names; the error names the file."""
    marker = tmp_path / "marker"
    save_pickle(tmp_path, hostile(marker)[name])

    with pytest.raises(ArchiveError, match=r"labels\.npy"):
        read_labels(tmp_path, pickled_paths=True)

    assert not marker.exists()


def test_an_extension_is_refused_though_python_knows_it(tmp_path: Path) -> None:
    """A registered and cached extension, which Python finds without asking for its name, is not called."""
    calls: list[str] = []
    code = 0xF0
    copyreg.add_extension(__name__, "recorder", code)  # type: ignore[no-untyped-call]
    copyreg._extension_cache[code] = calls.append  # type: ignore[attr-defined]
    save_pickle(tmp_path, b"\x80\x02\x82\xf0X\x01\x00\x00\x00a\x85R.")

    try:
        with pytest.raises(ArchiveError, match=r"labels\.npy.*extension 240"):
            read_labels(tmp_path, pickled_paths=True)
    finally:
        copyreg.remove_extension(__name__, "recorder", code)  # type: ignore[no-untyped-call]

    assert calls == []


def repeated_paths(size: int, count: int) -> bytes:
    """Return a pickle of `count` paths that are all made of one string of `size` bytes, which it holds once."""
    text = "a" * size
    return pickle.dumps(np.array([Call(PurePosixPath, text) for _ in range(count)], dtype=object))


def test_paths_longer_than_their_file_are_refused(tmp_path: Path) -> None:
    """A pickle that names one long string again and again is refused before it fills the memory; a few are read."""
    save_pickle(tmp_path, repeated_paths(1000, 3), n_labels=3)
    assert read_labels(tmp_path, pickled_paths=True) == ["a" * 1000] * 3
    save_pickle(tmp_path, repeated_paths(100_000, 1000), n_labels=1000)

    with pytest.raises(ArchiveError, match=r"labels\.npy.*paths of more than 16,777,216 characters"):
        read_labels(tmp_path, pickled_paths=True)


def test_a_pickle_changes_nothing_that_stays(tmp_path: Path) -> None:
    """A pickle that sets attributes of an admitted class is forgotten: the next one is read as ever."""
    body = b"cpathlib\nPosixPath\n(N}S'__init__'\nI5\ns\x86b0" + pickle.dumps(PATHS, protocol=3)
    save_pickle(tmp_path, body, n_labels=4)
    with pytest.raises(ArchiveError):
        read_labels(tmp_path, pickled_paths=True)
    save_pickle(tmp_path, pickle.dumps(PATHS), n_labels=4)

    assert read_labels(tmp_path, pickled_paths=True) == ["/data/a.h5ad", "b.h5ad", "text", None]


@pytest.mark.parametrize("content", [b"", b"{", b"1", b"[1]", b'{"a": 1}', b'["\xff"]', b"[" * 100_000, b'["a", ["b"]]'])
def test_damaged_json_is_named(tmp_path: Path, content: bytes) -> None:
    """A labels.json that is no list of strings and nulls is an ArchiveError naming it."""
    (tmp_path / "labels.json").write_bytes(content)

    with pytest.raises(ArchiveError, match=r"labels\.json"):
        read_labels(tmp_path)


@pytest.mark.parametrize("array", [PATHS, np.array(["one", "two"])], ids=["pickled", "text"])
def test_damaged_npy_is_named_or_read(tmp_path: Path, array: Any) -> None:
    """Cut short or with bytes changed, labels.npy is an ArchiveError naming it, or yields strings; never anything else."""
    path = save_npy(tmp_path, array)
    whole, generator = path.read_bytes(), random.Random(0)
    for _ in range(2000):
        damaged = bytearray(whole[: generator.randrange(len(whole))] if generator.random() < 0.2 else whole)
        for _ in range(generator.choice([1, 3]) if damaged else 0):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        path.write_bytes(damaged)

        try:
            labels = read_labels(tmp_path, pickled_paths=True)
        except ArchiveError as error:
            assert "labels.npy" in str(error)  # noqa: PT017
        else:
            assert all(label is None or type(label) is str for label in labels)
