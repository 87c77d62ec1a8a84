"""Compressed arrays of slices: one chunk and one block per slice, so that one can be read alone."""

from __future__ import annotations

import os
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
    """Return the bytes of an array file; equal arrays give equal bytes.

    Args:
        slices: (S, H, W) int16.
    """
    _drop_variables_of_blosc()
    one_slice = (1, *slices.shape[1:])
    array = blosc2.asarray(
        np.ascontiguousarray(slices, dtype=np.int16),
        chunks=one_slice,
        blocks=one_slice,
        contiguous=True,
        cparams=_COMPRESSION,
        dparams={"nthreads": 1},  # stands in the file too, by default that of the machine
    )
    return array.to_cframe()


def _drop_variables_of_blosc() -> None:
    """Remove BLOSC_CLEVEL, BLOSC_NTHREADS and the like from this process for good.

    C-Blosc2 reads them for every array that it compresses, and they overrule the arguments of a
    call. They are not put back: a variable that came and went with each volume would race with
    other threads. A process that only reads never comes here.
    """
    for name in [name for name in os.environ if name.startswith("BLOSC_")]:
        os.environ.pop(name, None)


def decode(data: bytes) -> np.ndarray:
    """Return all slices (S, H, W) of an array file, whose bytes must be known to be whole."""
    return blosc2.ndarray_from_cframe(data)[:]


def open_array(path: Path) -> blosc2.NDArray:
    """Open an array file, memory-mapped; indexing it decompresses only the slices asked for."""
    return blosc2.open(str(path), mode="r", mmap_mode="r", dparams={"nthreads": 1})


def read_slice(array: blosc2.NDArray, index: int) -> np.ndarray:
    """Return one slice (H, W) int16 of an array of ours, whose chunk it is.

    Raises:
        RuntimeError: If the chunk is damaged or missing.
    """
    image = np.empty(array.shape[1:], np.int16)
    array.schunk.decompress_chunk(index, image)
    return image
