"""benchmarks/annbatch_loader.py lets two processes take turns; a stand-in for annbatch serves the rows of the same file."""

import json
import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
STAND_IN = """
    import anndata

    class DatasetCollection:
        def __init__(self, path):
            self.path = path

        def add_adatas(self, paths):
            anndata.AnnData(X=anndata.read_h5ad(paths[0]).X * {factor}).write_h5ad(self.path)

    class Loader:
        def __init__(self, *, batch_size, drop_last, shuffle, chunk_size, preload_nchunks, preload_to_gpu, to):
            assert (drop_last, shuffle, chunk_size * preload_nchunks, preload_to_gpu) == (True, True, 16384, False)
            self.batch_size = batch_size

        def use_collection(self, collection, **options):
            self.x = anndata.read_h5ad(collection.path).X
            return self

        def __iter__(self):
            for start in range(0, self.x.shape[0] - self.batch_size + 1, self.batch_size):
                yield {{"X": self.x[start : start + self.batch_size]}}
"""


@pytest.fixture
def run(tmp_path: Path, make_h5ad: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Give a function that runs the script on a small file, beside an annbatch that multiplies values by a factor."""
    packages, python = tmp_path / "packages", tmp_path / "python"
    (packages / "annbatch-0.0.dist-info").mkdir(parents=True)
    (packages / "annbatch-0.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: annbatch\nVersion: 0.0\n")
    python.write_text(f'#!/bin/sh\nPYTHONPATH={packages}{os.pathsep}$PYTHONPATH exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.syspath_prepend(BENCHMARKS)
    import annbatch_loader

    def run(factor: int) -> None:
        (packages / "annbatch.py").write_text(textwrap.dedent(STAND_IN.format(factor=factor)))
        source = make_h5ad(n_rows=61)
        monkeypatch.setattr(sys, "argv", ["x", str(source), "--annbatch", str(python), "--batch-size", "5", "--rounds", "2"])
        annbatch_loader.main()

    return run


def test_both_take_turns(run: Callable[[int], None], capsys: pytest.CaptureFixture[str]) -> None:
    """Each output has a line of JSON for ours and two for annbatch, with the versions of its environment, and a table."""
    run(1)

    out = capsys.readouterr().out
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert [line["what"] for line in lines] == [
        "GPUBatchLoader csr", "annbatch with obs", "annbatch", "GPUBatchLoader dense", "annbatch with obs", "annbatch",
    ]  # fmt: skip
    assert all(line["cells_per_second"] > 0 and len(line["seconds"]) == 2 for line in lines)
    assert lines[0]["annbatch"]["versions"]["annbatch"] == "0.0"
    assert out.count("60 cells a round") == 2


def test_loaders_that_disagree_are_not_compared(run: Callable[[int], None]) -> None:
    """Where the sums of all values differ, nothing is timed."""
    with pytest.raises(SystemExit, match="the loaders disagree"):
        run(2)
