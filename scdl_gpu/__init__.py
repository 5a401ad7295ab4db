"""Single-cell batches assembled where they are needed: the public names, nothing else."""

__version__ = "0.1.0"
