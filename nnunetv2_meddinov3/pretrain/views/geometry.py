"""Random resized crops, and their resampling: bicubic with antialiasing, never beyond the box."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

_TRIES = 10


class Box(NamedTuple):
    """A part of a slice in pixels, and whether it is mirrored left to right."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


def draw_box(
    height: int,
    width: int,
    scale: Sequence[float],
    aspect_ratio: Sequence[float],
    flip: float,
    generator: np.random.Generator,
) -> Box:
    """Draw a box as torchvision's RandomResizedCrop does (Inception, sec. 6).

    Args:
        height: Of the slice, in pixels.
        width: Of the slice, in pixels.
        scale: Lowest and highest share of the slice's area.
        aspect_ratio: Lowest and highest width / height, drawn evenly in its logarithm.
        flip: Probability of mirroring.
        generator: The only source of randomness.
    """
    is_flipped = bool(generator.random() < flip)
    low, high = map(math.log, aspect_ratio)
    for _ in range(_TRIES):
        area = height * width * generator.uniform(scale[0], scale[1])
        aspect = math.exp(generator.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(generator.integers(0, height - h, endpoint=True))
            left = int(generator.integers(0, width - w, endpoint=True))
            return Box(top, left, h, w, is_flipped)
    w = min(width, round(height * aspect_ratio[1]))
    h = min(height, round(width / aspect_ratio[0]))
    return Box((height - h) // 2, (width - w) // 2, h, w, is_flipped)


def crop_and_resize(
    slices: Float[Tensor, "slice height width"], numbers: list[int], boxes: list[Box], size: int
) -> Float[Tensor, "crop 1 {size} {size}"]:
    """Cut boxes out of slices and resize them to squares.

    Equal to ``interpolate(mode="bicubic", antialias=True)`` of each box by itself, which is what
    runs on the CPU; on a GPU all boxes are resampled at once by two batched matrix products.

    Args:
        slices: In HU; smaller ones are padded below and to the right.
        numbers: For each crop, which of the slices it is cut from.
        boxes: Within the unpadded slices.
        size: Side of the crops in pixels.
    """
    if slices.device.type == "cpu":
        return torch.stack(
            [_resize(slices[n], box, size) for n, box in zip(numbers, boxes, strict=True)]
        )
    return _resize_all(slices, numbers, boxes, size)


def _resize_all(
    slices: Float[Tensor, "slice height width"], numbers: list[int], boxes: list[Box], size: int
) -> Float[Tensor, "crop 1 {size} {size}"]:
    rows = _matrices([(b.top, b.height, False) for b in boxes], slices.shape[1], size, slices)
    columns = _matrices([(b.left, b.width, b.flip) for b in boxes], slices.shape[2], size, slices)
    chosen = slices[torch.tensor(numbers).to(slices.device, non_blocking=True)]
    with full_precision():
        return torch.bmm(torch.bmm(rows, chosen), columns.mT)[:, None]


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Multiply in fp32: TF32, which training allows, keeps 11 bits of values up to 1000 HU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _resize(
    image: Float[Tensor, "height width"], box: Box, size: int
) -> Float[Tensor, "1 {size} {size}"]:
    top, left, height, width, flip = box
    part = image[None, None, top : top + height, left : left + width]
    out = F.interpolate(part, (size, size), mode="bicubic", antialias=True, align_corners=False)[0]
    return out.flip(-1) if flip else out


def _matrices(
    intervals: list[tuple[int, int, bool]], length: int, size: int, like: Tensor
) -> Float[Tensor, "crop {size} {length}"]:
    """Return the resampling matrices of intervals (start, extent, mirrored) of an axis.

    The kernel is bicubic with a = -0.5, widened by the factor of reduction, cut off at the ends of
    the interval and normalised, as torch's and PIL's antialiased resizing.
    """
    start, extent, flip = (
        torch.tensor(column, dtype=like.dtype).to(like.device, non_blocking=True)[:, None, None]
        for column in zip(*intervals, strict=True)
    )
    out = torch.arange(size, device=like.device, dtype=like.dtype)[None, :, None]
    out = torch.where(flip > 0, size - 1 - out, out)
    pixel = torch.arange(length, device=like.device, dtype=like.dtype)[None, None] - start
    scale = extent / size
    distance = (pixel + 0.5 - (out + 0.5) * scale).abs() / scale.clamp(min=1)
    weight = _cubic(distance) * ((pixel >= 0) & (pixel < extent))
    return weight / weight.sum(-1, keepdim=True)


def _cubic(x: Tensor, a: float = -0.5) -> Tensor:
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
