"""Seconds and private memory of converting h5ad files, beside bionemo-scdl on the same files.

    python benchmarks/convert.py FILE.h5ad ... [--rounds 3] [--out DIRECTORY]

Every conversion runs in a process of its own, in turn; page cache warm (each file is read once before). Seconds are of the
call alone, imports apart; ours ends with everything fsynced, bionemo-scdl's does not. Memory is the largest RssAnon above
that after the imports, worker processes included. The first rows of every result are compared with the file.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from scdl_gpu import bench

CHILD = "--child"


def convert(which: str, source: Path, target: Path) -> None:
    """Convert `source` once."""
    if which == "bionemo-scdl":
        from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset

        SingleCellMemMapDataset(str(target), h5ad_path=str(source), use_X_not_raw=True)
    else:
        from scdl_gpu import convert_h5ad

        convert_h5ad(source, target, x="X", data_dtype=which.rpartition(" ")[2], progress=False)


def child(which: str, source: Path, target: Path) -> None:
    """Convert in this process and print seconds and memory as JSON."""
    if which == "bionemo-scdl":
        import bionemo.scdl.io.single_cell_memmap_dataset  # noqa: F401
    else:
        import scdl_gpu.convert.archive  # noqa: F401
    with bench.PeakMemory() as memory:
        start = time.perf_counter()
        convert(which, source, target)
        seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "bytes": memory.growth_bytes}))


def check(source: Path, archive: Path) -> None:
    """Raise SystemExit unless the first rows of the archive are those of the file."""
    import anndata
    import numpy as np

    from scdl_gpu import SingleCellMemMapDataset

    backed = anndata.read_h5ad(source, backed="r")
    head = backed.X[:50]
    head = head.toarray() if hasattr(head, "toarray") else np.asarray(head)
    if not np.array_equal(SingleCellMemMapDataset(archive).rows(slice(0, 50)).toarray(), head):
        raise SystemExit(f"{archive}: rows differ from {source}")
    backed.file.close()


def measure(which: str, source: Path, out: Path) -> dict[str, Any]:
    """Run one conversion in a child and return what it printed."""
    target = out / "archive"
    shutil.rmtree(target, ignore_errors=True)
    done = subprocess.run([sys.executable, __file__, CHILD, which, str(source), str(target)], capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1]}
    check(source, target)
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    shutil.rmtree(target)
    return json.loads(done.stdout.splitlines()[-1]) | {"size": size}


def main() -> None:
    """Parse the arguments, compare, print."""
    if len(sys.argv) > 1 and sys.argv[1] == CHILD:
        child(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="where archives are written; a temporary directory beside the first file otherwise")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.out or arguments.files[0].parent) as directory:
        for source in arguments.files:
            while_reading = source.open("rb")
            with while_reading:
                while while_reading.read(1 << 26):
                    pass
            alternatives = ["scdl_gpu auto", "scdl_gpu float32", "bionemo-scdl"]
            runs: dict[str, list[dict[str, Any]]] = {which: [] for which in alternatives}
            for _ in range(arguments.rounds):
                for which in alternatives:
                    runs[which].append(measure(which, source, Path(directory)))
            results = []
            for which, found in runs.items():
                if "failed" in found[0]:
                    print(f"{which}: {found[0]['failed']}")
                    continue
                result = bench.Result(which, tuple(run["seconds"] for run in found), 1, source.stat().st_size)
                results.append(result)
                peak = max(run["bytes"] for run in found)
                print(bench.json_line(result, "files", file=source.name, peak_private_bytes=peak, archive_bytes=found[0]["size"]))
            print(f"\n{source.name}, {source.stat().st_size / 1e9:.2f} GB; GB/s of the file\n{bench.table(results, 'files')}\n")


if __name__ == "__main__":
    main()
