"""The notebook runs from top to bottom, on the real file and on made data, and learns something.

Where there are no real files, "real" means made data, too.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "tour.ipynb"
RUN = """
import json, sys
cells = json.load(open(sys.argv[1]))["cells"]
names = {"__name__": "__main__"}
for number, cell in enumerate(cells):
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
print(json.dumps({"accuracy": names["accuracy"], "classes": len(names["classes"]), "left": names["folder"].exists()}))
"""
FILE = "mix_sc_celseq2_5cl_p1.h5ad"
NOTICES = ["Sparse CSR tensor support is in beta state", "Sparse invariant checks are implicitly disabled"]


@pytest.mark.parametrize("data", ["real", pytest.param("made", marks=pytest.mark.exhaustive)])
def test_notebook_runs(real_files: list[Path], tmp_path: Path, data: str) -> None:
    """All cells run in order without a warning, the classifier is right far more often than chance, and no file is left."""
    found = [path.parent for path in real_files if path.name == FILE and data == "real"]
    folder = found[0] if found else tmp_path
    strict = ["-W", "error", *(word for notice in NOTICES for word in ("-W", f"ignore:{notice}:UserWarning"))]
    environment = os.environ | {"SCDL_TEST_DATA": str(folder), "TMPDIR": str(tmp_path)}

    run = subprocess.run(
        [sys.executable, *strict, "-c", RUN, str(NOTEBOOK)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )

    assert run.returncode == 0, run.stdout + run.stderr
    told = json.loads(run.stdout.splitlines()[-1])
    assert told["accuracy"] > 2 / told["classes"]
    assert told["left"] is False


def test_notebook_is_committed_without_outputs() -> None:
    """Outputs would go stale, and may name paths of a machine."""
    notebook = json.loads(NOTEBOOK.read_text())

    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]

    assert len(code) >= 8
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
