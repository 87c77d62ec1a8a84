import numpy as np
import pytest

from nnunetv2_meddinov3.pretrain.views.masking import draw_masks, masked_counts


def draw(crops, grid, seed=0, probability=0.5, ratio=(0.1, 0.5)):
    return draw_masks(crops, grid, probability, ratio, np.random.default_rng(seed))


@pytest.mark.parametrize(
    ("images", "patches", "total"),
    [(16, 256, 1274), (64, 256, 4941), (64, 196, 3771), (4, 196, 273)],
)
def test_the_number_of_masked_patches_is_the_originals(images, patches, total):
    counts = masked_counts(2 * images, patches, 0.5, (0.1, 0.5))
    assert sum(counts) == total
    side = int(patches**0.5)
    for seed in range(3):
        assert draw(2 * images, (side, side), seed).sum() == total


def test_the_four_counts_of_a_batch_of_four_are_the_originals():
    assert masked_counts(8, 196, 0.5, (0.1, 0.5)) == [39, 58, 78, 98]


def test_half_of_the_crops_have_a_mask_and_which_ones_is_drawn():
    masked = [frozenset(np.flatnonzero(draw(12, (8, 8), seed).any(1))) for seed in range(8)]
    assert {len(crops) for crops in masked} == {6}
    assert len(set(masked)) > 4


def test_a_seed_gives_its_masks_and_another_gives_others():
    assert (draw(8, (6, 9), 1) == draw(8, (6, 9), 1)).all()
    assert (draw(8, (6, 9), 1) != draw(8, (6, 9), 2)).any()


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.5])
def test_every_count_up_to_half_of_the_patches_is_met_exactly(share):
    for grid in [(3, 3), (6, 6), (4, 14), (16, 16)]:
        counts = draw(2, grid, probability=1.0, ratio=(share, share)).sum(1)
        assert set(counts.tolist()) == {int(np.prod(grid) * float(np.float32(share)))}


def test_masks_are_blocks_and_not_scattered_patches():
    masks = draw(64, (16, 16), probability=1.0, ratio=(0.3, 0.3)).reshape(-1, 16, 16)
    neighbours = (masks[:, 1:] & masks[:, :-1]).sum() / masks.sum()
    assert neighbours > 0.6  # scattered ones have 0.3


def test_no_masks_without_probability():
    assert not draw(6, (4, 4), probability=0.0).any()
