import hashlib

import numpy as np
import pytest

from nnunetv2_meddinov3 import files
from nnunetv2_meddinov3.store.fingerprints import digests, first_of_equal, source_sha256


def test_the_first_of_equal_hashes_is_found_by_hand():
    hashes = [hashlib.sha256(text.encode()).hexdigest() for text in "abacbda"]
    assert first_of_equal(digests(hashes)).tolist() == [0, 1, 0, 3, 1, 5, 0]


def test_hashes_that_share_half_their_digits_differ():
    head, tail = "0123456789abcdef", "fedcba9876543210"
    hashes = [head + head + "0" * 32, head + tail + "0" * 32, tail + head + "0" * 32]
    assert first_of_equal(digests(hashes)).tolist() == [0, 1, 2]


def test_without_hashes_there_are_no_first_ones():
    assert first_of_equal(digests([])).tolist() == []


@pytest.mark.parametrize("seed", range(3))
def test_the_first_of_equal_hashes_is_the_one_that_numpy_finds(seed):
    numbers = np.random.default_rng(seed).integers(0, 40, 300)
    hashes = [hashlib.sha256(bytes([number])).hexdigest() for number in numbers]
    _, first, inverse = np.unique(numbers, return_index=True, return_inverse=True)
    assert first_of_equal(digests(hashes)).tolist() == first[inverse].tolist()


def test_the_hash_of_a_source_knows_neither_names_nor_order(tmp_path):
    paths = [str(tmp_path / name) for name in "ab"]
    for path, data in zip(paths, (b"1", b"2"), strict=True):
        files.write_bytes(tmp_path / path, data)
    assert source_sha256(paths[:1]) == files.sha256(b"1")
    assert source_sha256(paths) == source_sha256(paths[::-1])
    assert source_sha256(paths) != source_sha256(paths[:1])
