import blosc2
import numpy as np
import pytest

from nnunetv2_meddinov3.store.codec import decode, encode

SLICES = np.random.default_rng(0).integers(-1000, 1000, (3, 40, 48), dtype=np.int16)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_bytes_do_not_depend_on_blosc_threads(threads, monkeypatch):
    # nnU-Net sets them for its process, and clusters set the variables
    expected = encode(SLICES)
    before = blosc2.set_nthreads(threads)
    try:
        assert encode(SLICES) == expected
    finally:
        blosc2.set_nthreads(before)
    monkeypatch.setenv("BLOSC_NTHREADS", str(threads))
    monkeypatch.setenv("BLOSC_CLEVEL", "9")
    assert encode(SLICES) == expected
    assert np.array_equal(decode(expected), SLICES)
