"""Where `convert_h5ad_to_scdl` begins; what it does is in `reference`."""

from scdl_gpu.cli import run


def main() -> None:
    """Run `convert_h5ad_to_scdl`."""
    run("scdl_gpu.cli.reference")
