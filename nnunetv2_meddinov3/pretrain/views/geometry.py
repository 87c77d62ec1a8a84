"""Random resized crops, and their resampling: bicubic with antialiasing, never beyond the box."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Num
from torch import Tensor
from torch.nn import functional as F

from nnunetv2_meddinov3.pretrain.views.bands import filtered, resizing

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
    slices: Num[Tensor, "slice height width"], numbers: list[int], boxes: list[Box], size: int
) -> Float[Tensor, "crop 1 {size} {size}"]:
    """Cut boxes out of slices and resize them to squares.

    Equal to ``interpolate(mode="bicubic", antialias=True)`` of each box by itself, which is what
    runs on the CPU; on a GPU all boxes are resampled at once by two batched matrix products.

    Args:
        slices: As stored; smaller ones are padded below and to the right.
        numbers: For each crop, which of the slices it is cut from.
        boxes: Within the unpadded slices.
        size: Side of the crops in pixels.
    """
    if slices.device.type == "cpu":
        return _resize_each(slices, numbers, boxes, size)
    return _resize_all(slices.float(), numbers, boxes, size)


def _resize_each(
    slices: Num[Tensor, "slice height width"], numbers: list[int], boxes: list[Box], size: int
) -> Float[Tensor, "crop 1 {size} {size}"]:
    """Resize crop by crop, all of a slice while it is in the cache."""
    out, image = torch.empty(len(boxes), 1, size, size), torch.empty(slices.shape[1:])
    current = -1
    for crop in sorted(range(len(boxes)), key=numbers.__getitem__):
        if numbers[crop] != current:
            current = numbers[crop]
            image.copy_(slices[current])
        out[crop] = _resize(image, boxes[crop], size)
    return out


def _resize(
    image: Float[Tensor, "height width"], box: Box, size: int
) -> Float[Tensor, "1 {size} {size}"]:
    top, left, height, width, flip = box
    part = image[None, None, top : top + height, left : left + width]
    out = F.interpolate(part, (size, size), mode="bicubic", antialias=True, align_corners=False)[0]
    return out.flip(-1) if flip else out


def _resize_all(
    slices: Float[Tensor, "slice height width"], numbers: list[int], boxes: list[Box], size: int
) -> Float[Tensor, "crop 1 {size} {size}"]:
    top, left, height, width, flip = zip(*boxes, strict=True)
    rows = resizing(height, size).moved(top)
    columns = resizing(width, size).mirrored(flip).moved(left)
    chosen = slices[torch.tensor(numbers).to(slices.device, non_blocking=True)]
    return filtered(chosen, rows, columns)[:, None]
