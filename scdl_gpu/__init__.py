"""Single-cell batches assembled where they are needed: the public names, nothing else."""

from scdl_gpu.version import __version__

__all__ = ["__version__"]
