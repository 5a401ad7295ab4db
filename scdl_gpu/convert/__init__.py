"""Conversion of h5ad files, AnnData objects and SciPy matrices into archives."""
