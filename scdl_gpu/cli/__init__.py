"""Commands: `scdl-gpu` and `convert_h5ad_to_scdl`."""
