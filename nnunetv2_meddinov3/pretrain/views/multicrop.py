"""From the slices of a group to its views and masks (DINO, sec. 3; DINOv3, sec. 3 and 4)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int16
from torch import Tensor

from nnunetv2_meddinov3.models.architecture import SIZES
from nnunetv2_meddinov3.pretrain.config import GLOBAL_CROPS, Contract, Resolution, StageConfig
from nnunetv2_meddinov3.pretrain.views.batch import ViewBatch
from nnunetv2_meddinov3.pretrain.views.geometry import Box, crop_and_resize, draw_box
from nnunetv2_meddinov3.pretrain.views.masking import draw_masks
from nnunetv2_meddinov3.pretrain.views.photometric import (
    Ends,
    apply_photometric,
    by_contract,
    contract_of,
    normalise,
    normalised,
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

    def in_units(self) -> Float[Tensor, "slice height width"]:
        """Return HU as they are stored, and other values normalised."""
        values = self.values.float()
        for number, ends in enumerate(self.ends):
            if ends is not None:
                values[number] = normalised(values[number], ends)
        return values


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
    values = slices.in_units()
    contracts = [contract_of(ends, config.intensity) for ends in slices.ends]
    boxes = {
        "global": _boxes(slices, GLOBAL_CROPS, crops.global_scale, config, generator),
        "local": _boxes(slices, crops.local_crops, crops.local_scale, config, generator),
    }
    numbers = list(range(b))
    views = []
    for i in range(GLOBAL_CROPS):
        own = boxes["global"][i * b : (i + 1) * b]
        cut = crop_and_resize(values, numbers, own, resolution.global_size)
        blur = config.augment.blur_probability[i]
        views.append(_finish(cut, contracts, blur, config, generator, noise))
    local = crop_and_resize(
        values, numbers * crops.local_crops, boxes["local"], resolution.local_size
    )
    blur = config.augment.blur_probability[2]
    local = _finish(local, contracts * crops.local_crops, blur, config, generator, noise)
    gram = None
    if resolution.gram_size is not None and config.losses.gram.weight is not None:
        cut = crop_and_resize(values, numbers * GLOBAL_CROPS, boxes["global"], resolution.gram_size)
        gram = by_contract(cut, contracts * GLOBAL_CROPS, normalise)
    side = resolution.global_size // SIZES[config.model.size].patch_size
    masks = draw_masks(
        GLOBAL_CROPS * b,
        (side, side),
        config.masks.probability,
        config.masks.ratio,
        generator,
    )
    return ViewBatch(torch.cat(views), local, torch.from_numpy(masks), gram, b)


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


def _finish(
    crops: Float[Tensor, "crop 1 height width"],
    contracts: list[Contract],
    blur_probability: float,
    config: StageConfig,
    generator: np.random.Generator,
    noise: torch.Generator,
) -> Float[Tensor, "crop 1 height width"]:
    """Change crops and normalise them, each by its contract."""

    def finished(some: Tensor, contract: Contract) -> Tensor:
        changed = apply_photometric(
            some, config.augment, contract, blur_probability, generator, noise
        )
        return normalise(changed, contract)

    return by_contract(crops, contracts, finished)
