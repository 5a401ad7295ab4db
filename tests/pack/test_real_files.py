"""Real files: what is unpacked is the canonical original, and how many bytes a nonzero takes."""

import pytest

from scdl_gpu.archive.raw import open_raw
from scdl_gpu.convert import convert_h5ad
from scdl_gpu.errors import SourceError
from scdl_gpu.pack import pack, unpack

ARRAYS = ("row_ptr.npy", "col_ptr.npy", "data.npy")
COUNTS = ["pbmc_1k_v2", "heart_1k_v2", "mouse_bladder", "mix_sc_celseq2", "mix_sc_dropseq"]


def test_unpacked_is_the_canonical_original(real_file, tmp_path):
    """Pointers, columns and values of every real file come back byte for byte, by way of packed rows."""
    try:
        raw = convert_h5ad(real_file, tmp_path / "raw")
    except SourceError:
        pytest.skip(f"{real_file.name} cannot be converted; tests/convert/test_real_files.py says which those are")
    pack(raw, tmp_path / "packed")

    unpack(tmp_path / "packed", tmp_path / "again")

    before, after = open_raw(raw), open_raw(tmp_path / "again")
    for name in ARRAYS:
        assert (tmp_path / "again" / name).read_bytes() == (raw / name).read_bytes()
    assert after.dtypes == before.dtypes
    assert after.metadata == before.metadata
    assert after.obs.columns == before.obs.columns


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("way", ["pack", "convert"])
def test_counts_take_few_bytes(real_data, tmp_path, name, way):
    """Payload and row table take at most 0.86 bytes a nonzero, whole files at most 1.00, straight from h5ad as well."""
    from scdl_gpu.pack.archive import Options, pack_sources

    source = real_data / f"{name}.h5ad"
    if way == "pack":
        report = pack(convert_h5ad(source, tmp_path / "raw"), tmp_path / "packed")
    else:
        report = pack_sources([source], tmp_path / "packed", Options())

    assert report.bytes_per_nonzero <= 0.86
    assert report.shard_bytes <= 1.00 * report.nnz
