"""Linear changes of axes as matrices with a band of numbers: resampling, loss of resolution.

An output pixel is made of some near input pixels. On a GPU all pictures are multiplied with whole
matrices at once; on the CPU the part of a band that some outputs need is multiplied alone.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

_OUTPUTS = 64  # of a matrix that are multiplied together on the CPU
_ANTIALIASED, _PLAIN = -0.5, -0.75  # the cubic's constant in torch's two kinds of resizing


class Bands(NamedTuple):
    """Matrices of some pictures, one each for an axis.

    Output i of picture n is the sum over taps of ``weights[n, i, tap] * input[first[n, i] + tap]``;
    taps beyond the input have weight 0.
    """

    first: NDArray[np.int64]  # (picture, output)
    weights: NDArray[np.float32]  # (picture, output, tap)

    def moved(self, by: Sequence[int]) -> Bands:
        """Return the same for pictures that begin so many pixels later."""
        return Bands(self.first + np.asarray(by)[:, None], self.weights)

    def mirrored(self, which: Sequence[bool]) -> Bands:
        """Return the same with the outputs of some pictures in reverse."""
        flip = np.asarray(which)[:, None]
        first = np.where(flip, self.first[:, ::-1], self.first)
        return Bands(first, np.where(flip[..., None], self.weights[:, ::-1], self.weights))


def resizing(extents: Sequence[int], size: int) -> Bands:
    """Return the resizing of axes to one size: bicubic with antialiasing, as torch's and PIL's.

    The kernel is widened by the factor of reduction, cut off at the ends of the axis and
    normalised.

    Args:
        extents: Pixels along each axis.
        size: Pixels of the result.
    """
    extent = np.asarray(extents, np.float64)[:, None]
    center, widened = _centers(extent, size), np.maximum(extent / size, 1)
    first = np.clip(np.floor(center - 2 * widened + 0.5), 0, None).astype(np.int64)
    pixel = first[..., None] + np.arange(2 * int(np.ceil(2 * widened.max())) + 1)
    distance = np.abs(pixel + 0.5 - center[..., None]) / widened[..., None]
    return Bands(first, _to_1(_cubic(distance, _ANTIALIASED) * (pixel < extent[..., None])))


def losing_resolution(zooms: Sequence[float], size: int) -> Bands:
    """Return shrinking (bilinear, antialiased) followed by enlarging (bicubic) to the same size.

    Args:
        zooms: Factors of shrinking; at least two pixels remain.
        size: Pixels along the axis.
    """
    small = np.maximum(2, np.round(size * np.asarray(zooms, np.float64)))[:, None]
    # an output is made of four small pixels, the outermost repeated beyond the edges
    center = _centers(small, size) - 0.5
    near = np.floor(center)[..., None] + np.arange(-1, 3)
    enlarge = _cubic(np.abs(near - center[..., None]), _PLAIN)
    near = np.clip(near, 0, small[..., None] - 1)
    # and each of them of the pixels that are nearer than one of its sides
    side = (size / small)[..., None]
    middle = (near + 0.5) * side
    first = np.clip(np.floor(middle[..., 0] - side[..., 0]), 0, None).astype(np.int64)
    last = np.ceil(middle[..., -1] + side[..., 0])
    taps = min(size, int((last - first).max()))
    first = np.minimum(first, size - taps)
    pixel = first[..., None, None] + np.arange(taps)
    shrink = _to_1(np.maximum(0, 1 - np.abs(pixel + 0.5 - middle[..., None]) / side[..., None]))
    return Bands(first, np.einsum("nof,noft->not", enlarge, shrink))


def filtered(
    pictures: Float[Tensor, "picture height width"], rows: Bands, columns: Bands
) -> Float[Tensor, "picture output_height output_width"]:
    """Change pictures along both axes, on any device.

    Args:
        pictures: Of one size.
        rows: What is done along the height of each picture.
        columns: The same along the width.
    """
    lengths = pictures.shape[-2:]
    taps = max(rows.weights.shape[2], columns.weights.shape[2])
    packed = np.concatenate([_packed(each, taps) for each in (rows, columns)], axis=1)
    sent = torch.from_numpy(packed).to(pictures.device, non_blocking=True)
    places = sent[..., :1].long() + torch.arange(taps, device=sent.device)
    whole = sent.new_zeros(*sent.shape[:2], max(lengths) + taps)
    whole.scatter_(2, places, sent[..., 1:])
    down, across = whole.split([rows.first.shape[1], columns.first.shape[1]], dim=1)
    with full_precision():
        changed = torch.bmm(down[..., : lengths[0]], pictures)
        return torch.bmm(changed, across[..., : lengths[1]].mT)


def _packed(bands: Bands, taps: int) -> NDArray[np.float32]:
    """Return first pixels and weights in one array; numbers of pixels are exact in fp32."""
    missing = taps - bands.weights.shape[2]
    weights = np.pad(bands.weights, ((0, 0), (0, 0), (0, missing)))
    return np.concatenate([bands.first[..., None].astype(np.float32), weights], axis=2)


def lose_resolution(picture: Float[Tensor, "size size"], zoom: float) -> None:
    """Shrink and enlarge a picture in place, on the CPU: zeros of a matrix are not multiplied."""
    size = len(picture)
    between = torch.empty_like(picture)
    parts = _parts(max(2, round(size * zoom)), size)
    for source, result in ((picture, between), (between.mT, picture.mT)):
        for outputs, inputs, numbers in parts:
            torch.mm(numbers, source[inputs], out=result[outputs])


@functools.lru_cache(maxsize=256)
def _parts(small: int, size: int) -> list[tuple[slice, slice, Tensor]]:
    """Return some outputs at a time, the inputs that they see, and their (output, input) matrix."""
    (first,), (weights,) = losing_resolution([small / size], size)
    whole = np.zeros((size, size), np.float32)
    np.put_along_axis(whole, first[:, None] + np.arange(weights.shape[1]), weights, axis=1)
    parts = []
    for start in range(0, size, _OUTPUTS):
        rows = slice(start, min(start + _OUTPUTS, size))
        seen = slice(int(first[rows].min()), int(first[rows].max()) + weights.shape[1])
        parts.append((rows, seen, torch.from_numpy(whole[rows, seen].copy())))
    return parts


def _centers(extent: NDArray, size: int) -> NDArray:
    """Return where the middles of a result's pixels are on axes of some extents."""
    return (np.arange(size) + 0.5) * (extent / size)


def _cubic(x: NDArray, a: float) -> NDArray[np.float32]:
    x = x.astype(np.float32)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x < 1, near, np.where(x < 2, far, np.float32(0)))


def _to_1(weights: NDArray) -> NDArray[np.float32]:
    """Return weights whose sums over taps are 1."""
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Compute in fp32: TF32, which training allows, keeps 11 bits, a step of an HU or two."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
