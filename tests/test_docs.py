"""The pages in docs/ say what is: the example archive of archive-format.md is built and compared with what the page shows."""

import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = (DOCS / "archive-format.md").read_text()


def blocks(language: str) -> list[str]:
    """Give the code blocks of the page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the example archive, made by the page's own code."""
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    exec(compile(code, "archive-format.md", "exec"), {})
    return tmp_path / "tiny"


def test_arrays_are_as_shown(tiny: Path) -> None:
    """The flat arrays hold the bytes that the page shows."""
    shown = {name: bytes.fromhex(text) for name, text in re.findall(r"^(\w+\.npy)([ \n0-9a-f]+)$", blocks("hex")[0], re.MULTILINE)}

    found = {name: (tiny / name).read_bytes() for name in shown}

    assert len(shown) == 6
    assert found == shown


def test_header_is_as_shown(tiny: Path) -> None:
    """header.sch holds the bytes that the page shows, at the places it gives."""
    lines = blocks("hex")[1].splitlines()

    found = (tiny / "header.sch").read_bytes()

    assert [int(line[:4], 16) for line in lines] == list(range(0, len(found), 16))
    assert b"".join(bytes.fromhex(line[6:54]) for line in lines) == found


def test_metadata_is_as_shown(tiny: Path) -> None:
    """metadata.json is the document that the page shows."""
    (shown,) = blocks("json")

    found = json.loads((tiny / "metadata.json").read_text())

    assert found == json.loads(shown)


def test_columns_are_as_shown(tiny: Path) -> None:
    """The fields of the obs table carry the metadata that the page shows."""
    (text,) = blocks("text")
    shown = {line.split()[0]: json.loads(line.split(maxsplit=1)[1]) for line in text.splitlines()}

    schema = pq.read_schema(tiny / "obs_features" / "dataframe_0.parquet")

    assert {field.name: json.loads(field.metadata[b"scdl_gpu"]) for field in schema} == shown


def test_every_file_is_described(tiny: Path) -> None:
    """No file of the example lacks a name on the page."""
    names = {re.sub(r"_\d+\.", "_<i>.", path.name) for path in tiny.rglob("*") if path.is_file()}

    missing = sorted(name for name in names if f"`{name}`" not in PAGE and f"  {name}  " not in PAGE)

    assert missing == []


def test_pages_link_to_pages_that_exist() -> None:
    """Every file that a page links to, or names in backquotes with its folder, is there."""
    root = DOCS.parent
    faults = []
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text()
        linked = [page.parent / target for target in re.findall(r"\]\((?!https?:)([^)#]+)", text)]
        named = [root / name for name in re.findall(r"`((?:scdl_gpu|kernels|tests|docs|benchmarks|examples)/[\w./-]+)`", text)]
        faults += [f"{page.name}: {path}" for path in (*linked, *named) if not path.exists()]

    assert faults == []


def test_every_module_has_its_place() -> None:
    """architecture.md names every module of the package, those of folders in backquotes."""
    text = (DOCS / "architecture.md").read_text()
    package = DOCS.parent / "scdl_gpu"
    tracked = [path for folder in ("archive", "convert", "pack") for path in (package / folder).glob("*.py") if path.stem != "__init__"]

    missing = sorted(f"{path.parent.name}/{path.stem}" for path in tracked if f"`{path.stem}`" not in text)

    assert missing == []
