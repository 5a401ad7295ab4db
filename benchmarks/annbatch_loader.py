"""Cells per second of GPUBatchLoader on the CPU, beside annbatch at its best over the same h5ad, in one run.

    python3.12 -m venv ANNBATCH && ANNBATCH/bin/pip install 'annbatch[zarrs]'
    python benchmarks/annbatch_loader.py FILE.h5ad --annbatch ANNBATCH/bin/python [--batch-size 64 1024] [--rounds 5]

annbatch needs Python 3.12, so that it runs in an environment and a process of its own, which waits while ours runs: the two
take turns, epoch by epoch, each with all cores, page cache warm. Its store is made beside FILE once, shuffled, as it
advises, and so is our archive, values as float32, which annbatch yields. annbatch reads chunks of 512 rows through zarrs,
a window of 16,384 rows; ours shuffles all rows. Neither carries obs, but for one line. Without torch in annbatch's
environment it yields SciPy and NumPy, which spares it the way to torch; PyPI's torch for Linux brings all of CUDA along,
the small build is `--index-url https://download.pytorch.org/whl/cpu torch`.
Sums of all values are compared before anything is timed.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CHUNK, WINDOW = 512, 16_384
"""Rows that annbatch reads at once, and those that it shuffles together."""


class Annbatch:
    """The process that serves annbatch over a store, which is made beside the source. Raises PeerError where it fails."""

    def __init__(self, python: Path, source: Path, store: Path, log: Path) -> None:
        from scdl_gpu.bench.peer import Process, script_of

        self._asked = {"sources": [str(source)], "store": str(store)}
        self._process = Process(python, script_of("annbatch"), log)
        made = self._process.ask("convert", **self._asked, settings={})
        self.facts = {**self._process.facts, "seconds_to_convert": made["seconds"]}

    def epoch(self, *, sum: bool = False, **settings: Any) -> dict[str, Any]:
        """Let it run through an epoch."""
        return self._process.ask("epoch", **self._asked, settings={"chunk": CHUNK, **settings}, sum=sum)

    def close(self) -> None:
        """End it."""
        self._process.close()


def ours(archive: Path, batch_size: int, output: str) -> Callable[[], Iterator[Any]]:
    """Make a run through an epoch of GPUBatchLoader."""
    from scdl_gpu import GPUBatchLoader

    loader = GPUBatchLoader(archive, batch_size, device="cpu", output=output, drop_last=True)
    return lambda: (batch.x for batch in loader)


def checked(annbatch: Annbatch, archive: Path, batch_size: int, output: str) -> int:
    """Run both once and give the cells of an epoch. Raises SystemExit where they differ by more than the rows that are dropped."""
    import torch

    from scdl_gpu import SingleCellMemMapDataset

    theirs = annbatch.epoch(batch_size=batch_size, output=output, obs=False, sum=True)
    cells, total = 0, 0.0
    for x in ours(archive, batch_size, output)():
        values = x if x.layout == torch.strided else x.values()
        cells, total = cells + x.shape[0], total + float(values.double().sum())
    n_rows = len(SingleCellMemMapDataset(archive))
    left = max((n_rows - cells) / n_rows, 1e-6)
    if theirs["cells"] != cells or abs(theirs["sum"] - total) > left * total:
        raise SystemExit(f"the loaders disagree: {theirs} of annbatch, {cells} cells with the sum {total} of ours")
    return cells


def compare(annbatch: Annbatch, archive: Path, batch_size: int, output: str, rounds: int) -> None:
    """Let them take turns, and print the results."""
    from dataloader import drain

    from scdl_gpu import SingleCellMemMapDataset, bench

    cells = checked(annbatch, archive, batch_size, output)
    run, dataset = ours(archive, batch_size, output), SingleCellMemMapDataset(archive)
    asked = {"batch_size": batch_size, "output": output}
    alternatives: dict[str, Callable[[], Any]] = {
        f"GPUBatchLoader {output}": lambda: drain(run()),
        "annbatch with obs": lambda: annbatch.epoch(**asked, obs=True),
        "annbatch": lambda: annbatch.epoch(**asked, obs=False),
    }
    row_bytes = 8 * dataset.number_nonzero_values() / len(dataset) if output == "csr" else 4 * dataset.number_of_variables()[0]
    results = bench.interleaved(alternatives, count=cells, rounds=rounds, size_bytes=int(cells * row_bytes))
    for result in results:
        facts = {"batch_size": batch_size, "output": output, "cache": "warm", "chunk": CHUNK, "window": WINDOW}
        print(bench.json_line(result, **facts, annbatch=annbatch.facts))
    print(f"\n{output}, batch size {batch_size}, {cells:,} cells a round\n{bench.table(results)}\n", flush=True)


def main() -> None:
    """Parse the arguments, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="an h5ad file, X being CSR")
    parser.add_argument("--annbatch", type=Path, required=True, help="the interpreter that has annbatch")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--output", nargs="+", default=["csr", "dense"], choices=["csr", "dense"])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    from dataloader import archive_of

    archive = archive_of(arguments.source)
    store = arguments.source.with_suffix(".annbatch.zarr")
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        annbatch = Annbatch(arguments.annbatch, arguments.source, store, Path(log.name))
        try:
            for output in arguments.output:
                for batch_size in arguments.batch_size:
                    compare(annbatch, archive, batch_size, output, arguments.rounds)
        finally:
            annbatch.close()


if __name__ == "__main__":
    main()
