import hashlib

import numpy as np
import pytest

from nnunetv2_meddinov3 import files
from nnunetv2_meddinov3.store.fingerprints import (
    NearHashes,
    as_numbers,
    bit_distances,
    digests,
    first_of_equal,
    perceptual_hash,
    source_sha256,
    turned,
    turned_hashes,
)


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


def test_a_slice_has_eight_symmetries_and_comes_first_itself():
    image = np.arange(6, dtype=np.int16).reshape(2, 3)
    found = [each.tolist() for each in turned(image)]
    assert found[0] == image.tolist()
    wanted = [np.rot90(each, n).tolist() for each in (image, image[:, ::-1]) for n in range(4)]
    assert sorted(found) == sorted(wanted)


@pytest.mark.parametrize("shape", [(40, 40), (37, 53), (96, 20)])
def test_the_hashes_of_all_symmetries_come_from_one_transform(shape, make_ct):
    image = make_ct(1, 100, seed=4)[0][: shape[0], : shape[1]]
    wanted = [perceptual_hash(each, -500, 500) for each in turned(image)]
    found = turned_hashes(image, -500, 500)
    assert len(set(found)) == 8
    distances = [
        bit_distances(a, np.array([b]))[0]
        for a, b in zip(as_numbers(found), as_numbers(wanted), strict=True)
    ]
    assert max(distances) <= 1  # but for the order of a summation


def test_bits_are_counted_with_and_without_numpys_own_count(monkeypatch):
    others = np.random.default_rng(0).integers(0, 2**64, 50, dtype=np.uint64)
    wanted = [bin(int(others[0]) ^ int(each)).count("1") for each in others]
    assert bit_distances(others[0], others).tolist() == wanted
    monkeypatch.delattr(np, "bitwise_count", raising=False)
    assert bit_distances(others[0], others).tolist() == wanted


def flipped(numbers, bits, rng):
    """The same hashes with so many bits changed."""
    changed = numbers.copy()
    for i in range(len(changed)):
        for place in rng.choice(64, bits, replace=False):
            changed[i] ^= np.uint64(1 << int(place))
    return changed


@pytest.mark.parametrize("bits", [0, 1, 4, 7])
def test_near_hashes_are_those_that_a_look_at_all_finds(bits):
    rng = np.random.default_rng(bits)
    hashes = rng.integers(0, 2**64, 2000, dtype=np.uint64, endpoint=False)
    hashes[1000:] = flipped(hashes[:1000], 3, rng)  # crowded, as those of neighbouring slices
    near = NearHashes(hashes, bits)
    for differing in range(10):
        for each in flipped(hashes[:60], differing, rng):
            wanted = bit_distances(each, hashes).min() <= bits
            assert near.any_near(np.array([each])) == wanted
            assert wanted or differing > bits
    far = [n for n in rng.integers(0, 2**64, 50, dtype=np.uint64) if not near.any_near(n[None])]
    assert all(bit_distances(each, hashes).min() > bits for each in far)


def test_one_of_several_hashes_that_is_near_is_enough():
    near = NearHashes(np.array([0, 2**63], np.uint64), 4)
    far = np.uint64(0x0F0F0F0F0F0F0F0F)
    assert not near.any_near(np.array([far, far]))
    assert near.any_near(np.array([far, np.uint64(2**63 + 15)]))
    assert not near.any_near(np.array([far, np.uint64(2**63 + 31)]))
    assert not NearHashes(np.empty(0, np.uint64), 4).any_near(np.array([far]))
