"""Which patches the student does not see: blocks of patches in half of the global crops (iBOT)."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

_ASPECT = (0.3, 1 / 0.3)  # of a block
_SMALLEST = 4  # patches of a block
_TRIES = 10
_LARGEST_SHARE = 0.5  # of the patches, one block


def masked_counts(
    crops: int, patches: int, probability: float, ratio: Sequence[float]
) -> list[int]:
    """Return how many patches of each masked crop are masked, before they are shuffled.

    The counts are the same in every step and on every rank, so shapes are static (DINOv3's code):
    the i-th of n masked crops gets the i-th of n + 1 evenly spaced ratios, computed in fp32.
    """
    masked_crops = int(crops * probability)
    ratios = np.linspace(ratio[0], ratio[1], masked_crops + 1, dtype=np.float32)[1:]
    return [int(patches * float(share)) for share in ratios]


def draw_masks(
    crops: int,
    grid_size: tuple[int, int],
    probability: float,
    ratio: Sequence[float],
    generator: np.random.Generator,
) -> Bool[np.ndarray, "{crops} patch"]:
    """Draw the masks of some global crops.

    Args:
        crops: Number of crops.
        grid_size: Patches along height and width.
        probability: Share of crops with a mask.
        ratio: Lowest and highest share of their patches.
        generator: The only source of randomness.

    Returns:
        True = masked out.
    """
    patches = math.prod(grid_size)
    masks = np.zeros((crops, *grid_size), bool)
    order = generator.permutation(crops)
    for crop, count in zip(order, masked_counts(crops, patches, probability, ratio), strict=False):
        _mask_blocks(masks[crop], count, generator)
    return masks.reshape(crops, patches)


def _mask_blocks(
    mask: Bool[np.ndarray, "height width"], count: int, generator: np.random.Generator
) -> None:
    """Mask exactly ``count`` patches: blocks while they fit, then single ones."""
    left = count
    while left > 0:
        added = _add_block(mask, min(left, int(_LARGEST_SHARE * mask.size)), generator)
        if not added:
            break
        left -= added
    free = np.flatnonzero(~mask)
    mask.flat[generator.choice(free, left, replace=False)] = True


def _add_block(
    mask: Bool[np.ndarray, "height width"], room: int, generator: np.random.Generator
) -> int:
    """Mask one block that adds at most ``room`` patches; return how many it added."""
    height, width = mask.shape
    for _ in range(_TRIES):
        area = generator.uniform(min(_SMALLEST, room), max(_SMALLEST, room))
        aspect = math.exp(generator.uniform(math.log(_ASPECT[0]), math.log(_ASPECT[1])))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h >= height or w >= width:
            continue
        top = generator.integers(0, height - h, endpoint=True)
        left = generator.integers(0, width - w, endpoint=True)
        block = mask[top : top + h, left : left + w]
        added = block.size - int(block.sum())
        if 0 < added <= room:
            block[:] = True
            return added
    return 0
