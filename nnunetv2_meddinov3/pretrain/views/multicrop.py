"""From the slices of a group to its views and masks (DINO, sec. 3; DINOv3, sec. 3 and 4)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int16
from torch import Tensor

from nnunetv2_meddinov3.models.architecture import SIZES
from nnunetv2_meddinov3.pretrain.config import GLOBAL_CROPS, Resolution, StageConfig
from nnunetv2_meddinov3.pretrain.views.batch import ViewBatch
from nnunetv2_meddinov3.pretrain.views.geometry import Box, crop_and_resize, draw_box
from nnunetv2_meddinov3.pretrain.views.masking import draw_masks
from nnunetv2_meddinov3.pretrain.views.photometric import (
    Ends,
    Scaling,
    apply_photometric,
    contract_of,
)


@dataclass
class Slices:
    """Slices of different sizes in one tensor.

    Attributes:
        values: As stored; smaller slices are padded below and to the right.
        sizes: (height, width) of each in pixels.
        ends: Of each the stored numbers that are 0 and 1 in normalised values, None for HU.
    """

    values: Int16[Tensor, "slice height width"]
    sizes: list[tuple[int, int]]
    ends: list[Ends]

    @classmethod
    def of(cls, arrays: Sequence[np.ndarray], ends: Sequence[Ends] | None = None) -> Slices:
        """Pad some (h, w) int16 arrays to one size; without ``ends`` all are in HU."""
        sizes = [(int(a.shape[0]), int(a.shape[1])) for a in arrays]
        padded = np.zeros((len(arrays), *np.max(sizes, axis=0)), np.int16)
        for place, array in zip(padded, arrays, strict=True):
            place[: array.shape[0], : array.shape[1]] = array
        return cls(torch.from_numpy(padded), sizes, list(ends or [None] * len(sizes)))

    def to(self, device: torch.device) -> Slices:
        """Return the slices on a device."""
        return Slices(self.values.to(device, non_blocking=True), self.sizes, self.ends)

    def pin_memory(self) -> Slices:
        """Return the slices in memory that a GPU reads without waiting."""
        return Slices(self.values.pin_memory(), self.sizes, self.ends)


def make_views(
    slices: Slices, resolution: Resolution, config: StageConfig, seed: tuple[int, ...]
) -> ViewBatch:
    """Make the crops and masks of some images, on the device of the slices.

    The Gram crops show what the global crops show, at their own size and without photometric
    changes; both are resampled from the slice once. (The original resizes a larger crop to both.)

    Args:
        slices: B of them.
        resolution: Sizes of the crops.
        config: Geometry, photometric changes, contract, masks.
        seed: Of everything that is drawn.

    Returns:
        One-channel views, normalised, on the device of the slices; the masks are on the CPU.
    """
    with _one_thread():
        return _make_views(slices, resolution, config, np.random.default_rng(seed))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Compute in one thread, as the workers of a DataLoader do: sums depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _make_views(
    slices: Slices, resolution: Resolution, config: StageConfig, generator: np.random.Generator
) -> ViewBatch:
    noise = torch.Generator().manual_seed(int(generator.integers(2**63)))
    crops, b = config.crops, len(slices.sizes)
    values = slices.values
    scalings = torch.tensor(
        [Scaling.of(ends, contract_of(ends, config.intensity)) for ends in slices.ends]
    ).to(values.device, non_blocking=True)

    def views(boxes: list[Box], size: int, blur: Sequence[float] | None) -> Tensor:
        """Cut crops out, change them unless there is no ``blur`` to change by, and normalise."""
        count = len(boxes) // b
        cut = crop_and_resize(values, list(range(b)) * count, boxes, size)
        factor, offset, std, mean = scalings.repeat(count, 1)[..., None, None, None].unbind(1)
        cut.mul_(factor).add_(offset)
        if blur is None:
            cut.clamp_(0, 1)
        else:
            probabilities = [each for each in blur for _ in range(b)]
            apply_photometric(cut, config.augment, probabilities, generator, noise)
        return cut.mul_(std).add_(mean)

    global_boxes = _boxes(slices, GLOBAL_CROPS, crops.global_scale, config, generator)
    local_boxes = _boxes(slices, crops.local_crops, crops.local_scale, config, generator)
    *global_blur, local_blur = config.augment.blur_probability
    global_crops = views(global_boxes, resolution.global_size, global_blur)
    local_crops = views(local_boxes, resolution.local_size, [local_blur] * crops.local_crops)
    gram = None
    if resolution.gram_size is not None and config.losses.gram.weight is not None:
        gram = views(global_boxes, resolution.gram_size, None)
    side = resolution.global_size // SIZES[config.model.size].patch_size
    masks = draw_masks(
        GLOBAL_CROPS * b,
        (side, side),
        config.masks.probability,
        config.masks.ratio,
        generator,
    )
    return ViewBatch(global_crops, local_crops, torch.from_numpy(masks), gram, b)


def _boxes(
    slices: Slices,
    count: int,
    scale: list[float],
    config: StageConfig,
    generator: np.random.Generator,
) -> list[Box]:
    """Draw boxes, crop-major."""
    crops = config.crops
    return [
        draw_box(*size, scale, crops.aspect_ratio, crops.horizontal_flip, generator)
        for _ in range(count)
        for size in slices.sizes
    ]
