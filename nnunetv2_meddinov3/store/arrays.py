"""Compressed arrays of slices: one chunk and one block per slice, so that one can be read alone."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import blosc2
import numpy as np

# One thread: the bytes must not depend on the machine, and workers share the cores already.
_COMPRESSION = {
    "codec": blosc2.Codec.LZ4,
    "clevel": 5,
    "filters": [blosc2.Filter.BITSHUFFLE],
    "filters_meta": [0],
    "typesize": 2,
    "nthreads": 1,
}


def encode(slices: np.ndarray) -> bytes:
    """The bytes of an array file; equal arrays give equal bytes.

    Args:
        slices: (S, H, W) int16.
    """
    one_slice = (1, *slices.shape[1:])
    with _without_variables_of_blosc():
        array = blosc2.asarray(
            np.ascontiguousarray(slices, dtype=np.int16),
            chunks=one_slice,
            blocks=one_slice,
            contiguous=True,
            cparams=_COMPRESSION,
            dparams={"nthreads": 1},  # stands in the file too, by default that of the machine
        )
        return array.to_cframe()


@contextmanager
def _without_variables_of_blosc() -> Iterator[None]:
    """Hide BLOSC_NTHREADS, BLOSC_CLEVEL and the like, which overrule what is asked for."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name[:6] == "BLOSC_"}
    try:
        yield
    finally:
        os.environ.update(hidden)


def decode(data: bytes) -> np.ndarray:
    """All slices (S, H, W) of the bytes of an array file, which must be known to be whole."""
    return blosc2.ndarray_from_cframe(data)[:]


def open_array(path: Path) -> blosc2.NDArray:
    """An array file, memory-mapped; indexing it decompresses only the slices asked for."""
    return blosc2.open(str(path), mode="r", mmap_mode="r", dparams={"nthreads": 1})


def read_slice(array: blosc2.NDArray, index: int) -> np.ndarray:
    """One slice (H, W) int16 of an array of ours, whose chunk it is.

    Raises:
        RuntimeError: If the chunk is damaged or missing.
    """
    image = np.empty(array.shape[1:], np.int16)
    array.schunk.decompress_chunk(index, image)
    return image


def sha256(data: bytes) -> str:
    """Hash of bytes, hexadecimal."""
    return hashlib.sha256(data).hexdigest()
