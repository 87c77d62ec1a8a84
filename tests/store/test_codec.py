import os

import blosc2
import numpy as np
import pytest

from nnunetv2_meddinov3.store.codec import decode, encode, open_array, read_slice

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


def test_variables_of_blosc_do_not_come_and_go_with_each_array(monkeypatch):
    # threads read the environment too, so what was removed once is not put back
    monkeypatch.setenv("BLOSC_CLEVEL", "9")
    monkeypatch.setenv("BLOSCX", "1")
    encode(SLICES)
    assert "BLOSC_CLEVEL" not in os.environ
    assert os.environ["BLOSCX"] == "1"


def test_reading_leaves_the_environment_alone(tmp_path, monkeypatch):
    path = tmp_path / "a.b2nd"
    path.write_bytes(encode(SLICES))
    monkeypatch.setenv("BLOSC_NTHREADS", "4")
    before = dict(os.environ)
    assert np.array_equal(read_slice(open_array(path), 1), SLICES[1])
    assert dict(os.environ) == before
