"""Commands work on this machine, and say so of a URL."""

from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize(
    "words",
    [
        ["info"],
        ["verify"],
        ["pack", "URL", "new"],
        ["unpack", "URL", "new"],
        ["concat", "here", "URL", "new"],
        ["pack", "here", "URL"],
        ["convert", "URL", "new"],
        ["convert", "here", "URL"],
        ["bench", "-i", "URL"],
    ],
)
def test_a_url_is_refused_by_name(run: Any, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what takes a URL and what to do, shows no password, and comes as wrong usage, before anything is written."""
    monkeypatch.chdir(tmp_path)
    url = "https://user:secret@host.invalid/path/archive?signature=abc"
    words = words if "URL" in words else [*words, "URL"]

    result = run(*[url if word == "URL" else word for word in words])

    said = " ".join(result.output.split())
    assert result.exit_code == 2
    assert "https://host.invalid/path/archive is a URL, expected a path: only GPUBatchLoader" in said
    assert "download the whole archive" in said
    assert "secret" not in said
    assert list(tmp_path.iterdir()) == []
