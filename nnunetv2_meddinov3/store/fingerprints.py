"""Fingerprints: SHA-256 of slices and source files, and a perceptual hash for near duplicates."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np

from nnunetv2_meddinov3 import files

_GRID = 32  # cells per side of the area average
_KEPT = 8  # lowest frequencies per side, hence 64 bits

# Number of set bits of every 16-bit number: numpy has no popcount before its version 2.
_POPCOUNT = np.array([bin(number).count("1") for number in range(1 << 16)], dtype=np.uint8)


def slice_sha256(image: np.ndarray) -> str:
    """Return the SHA-256 of one slice: its little-endian int16 values (H, W), row by row."""
    return hashlib.sha256(np.ascontiguousarray(image, dtype="<i2").data).hexdigest()


def turned(image: np.ndarray) -> Iterator[np.ndarray]:
    """Yield a slice (H, W) in the eight symmetries of the square, itself first: views, no copies.

    They are all that mirroring, turning by right angles and transposing can make of it.
    """
    for each in (image, image.T):
        yield from (each, each[::-1], each[:, ::-1], each[::-1, ::-1])


def source_sha256(paths: Sequence[str]) -> str:
    """Return the SHA-256 of the files of one source, whatever their names and their order.

    One file has its own hash, as ``sha256sum`` prints it; several have the hash of theirs, sorted.

    Raises:
        OSError: If a file cannot be read.
    """
    hashes = sorted(files.file_sha256(path) for path in paths)
    return hashes[0] if len(hashes) == 1 else files.sha256("".join(hashes).encode())


def digests(hashes: Iterable[str]) -> np.ndarray:
    """Return SHA-256 hashes (hexadecimal) as (N, 2) uint64: their first 128 bits, which suffice."""
    return np.frombuffer(bytes.fromhex("".join(text[:32] for text in hashes)), "<u8").reshape(-1, 2)


def first_of_equal(found: np.ndarray) -> np.ndarray:
    """Return for each of the digests (N, 2) the number of the first that equals it.

    Returns:
        (N,) int64; a digest that occurs for the first time has its own number.
    """
    order = np.lexsort((found[:, 0], found[:, 1]))  # stable: of equal ones the first comes first
    in_order = found[order]
    is_new = np.ones(len(order), bool)
    is_new[1:] = (in_order[1:] != in_order[:-1]).any(axis=1)
    first = np.empty(len(order), np.int64)
    first[order] = order[is_new][np.cumsum(is_new) - 1]
    return first


def perceptual_hash(image: np.ndarray, low: float, high: float) -> str:
    """Return the 64-bit DCT hash of one slice, as 16 hexadecimal digits.

    The slice is clipped to a window, averaged over 32 x 32 equal areas and transformed by a cosine
    transform. Bit ``8 * row + column`` (the first is the most significant) says whether that one
    of the 8 x 8 lowest frequencies is above their median, the mean of the slice left out of the
    median. Resampling, recompression and noise leave most bits as they are, so slices whose hashes
    differ in few bits look alike; neighbouring slices of one volume often do.

    Args:
        image: (H, W), any numbers.
        low: Lower end of the window, in the units of the image.
        high: Upper end of the window.
    """
    return _bits(_spectrum(image, low, high))


def turned_hashes(image: np.ndarray, low: float, high: float) -> list[str]:
    """Return the perceptual hashes of a slice in its eight symmetries, in the order of ``turned``.

    All come from one cosine transform: a mirror image has the same frequencies with the sign of
    the odd ones changed, a transposed one has them transposed.
    """
    spectrum = _spectrum(image, low, high)
    odd = np.where(np.arange(_KEPT) % 2, -1.0, 1.0)
    return [
        _bits(each * rows[:, None] * columns)
        for each in (spectrum, spectrum.T)
        for rows, columns in ((odd**0, odd**0), (odd, odd**0), (odd**0, odd), (odd, odd))
    ]


def _spectrum(image: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return the lowest frequencies of a windowed slice, (8, 8)."""
    clipped = np.clip(image, low, high).astype(np.float64)
    rows, columns = (_frequencies(length) for length in clipped.shape)
    # rounded, so that what is zero but for the order of a summation is zero everywhere
    return np.round((rows @ clipped @ columns.T) / (high - low), 6)


def _bits(spectrum: np.ndarray) -> str:
    bits = spectrum.ravel() > np.median(spectrum.ravel()[1:])
    return np.packbits(bits).tobytes().hex()


@lru_cache(maxsize=64)
def _frequencies(length: int) -> np.ndarray:
    """Return (8, length): an area average onto 32 cells, then the 8 lowest cosines (DCT-II)."""
    edges = np.linspace(0, length, _GRID + 1)
    pixels = np.arange(length)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    average = np.clip(overlap, 0, None) * (_GRID / length)
    cells = (np.arange(_GRID) + 0.5) / _GRID
    cosines = np.cos(np.pi * np.arange(_KEPT)[:, None] * cells)
    cosines[0] /= np.sqrt(2)  # orthogonal rows of one length, so that the median compares like
    return cosines @ average


def as_numbers(hashes: Iterable[str]) -> np.ndarray:
    """Return perceptual hashes (16 hexadecimal digits) as an array of uint64."""
    return np.array([int(text, 16) for text in hashes], dtype=np.uint64)


def bit_distances(number: np.uint64, others: np.ndarray) -> np.ndarray:
    """Return the number of bits (0 to 64) in which a perceptual hash differs from others (N,)."""
    differing = np.bitwise_xor(others, number)
    if hasattr(np, "bitwise_count"):
        return np.bitwise_count(differing).astype(np.int64)
    words = differing.view(np.uint16).reshape(len(others), 4)
    return _POPCOUNT[words].sum(axis=1, dtype=np.int64)


class NearHashes:
    """Perceptual hashes among which those within a few bits of another are found quickly.

    The 64 bits are dealt out to one part more than bits may differ: of two hashes that near, one
    part is equal, so that only those with an equal part are compared (multi-index hashing: Norouzi,
    Punjani, Fleet, CVPR 2012).

    Args:
        hashes: (N,) uint64.
        bits: How many bits may differ, at most 15.
    """

    def __init__(self, hashes: np.ndarray, bits: int) -> None:
        self.bits = bits
        # every (bits + 1)-th bit: neighbouring frequencies are alike, and should not be one part
        self._masks = [
            np.uint64(sum(1 << place for place in range(part, 64, bits + 1)))
            for part in range(bits + 1)
        ]
        self._sorted = []
        for mask in self._masks:
            keys = hashes & mask
            order = np.argsort(keys)
            self._sorted.append((keys[order], hashes[order]))

    def any_near(self, numbers: np.ndarray) -> bool:
        """Return whether a hash is within so many bits of any of the numbers (M,) uint64."""
        for mask, (keys, hashes) in zip(self._masks, self._sorted, strict=True):
            wanted = numbers & mask
            first = np.searchsorted(keys, wanted, "left")
            last = np.searchsorted(keys, wanted, "right")
            for number, start, stop in zip(numbers, first, last, strict=True):
                candidates = hashes[start:stop]
                if len(candidates) and bit_distances(number, candidates).min() <= self.bits:
                    return True
        return False
