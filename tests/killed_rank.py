"""Run a training script and kill a rank of it in the middle: what test_torchrun.py lets torchrun start.

    torchrun ... killed_rank.py RANK BATCHES SCRIPT [ARGUMENT ...]

The process of that rank gets a SIGKILL, from itself, when it asks for one batch more than BATCHES.
"""

import itertools
import os
import runpy
import signal
import sys
from collections.abc import Iterator

import scdl_gpu
from scdl_gpu import Batch, GPUBatchLoader


class Deadly(GPUBatchLoader):
    """A loader that ends its process."""

    given = itertools.count()

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches as long as there may be some."""
        for batch in super().__iter__():
            if next(self.given) == int(batches):
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch


if __name__ == "__main__":
    _, rank, batches, *sys.argv = sys.argv
    if rank == os.environ["RANK"]:
        scdl_gpu.GPUBatchLoader = Deadly  # type: ignore[misc]
    runpy.run_path(sys.argv[0], run_name="__main__")
