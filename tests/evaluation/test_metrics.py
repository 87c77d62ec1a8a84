"""Scores against MONAI, DeepMind's surface-distance and what can be worked out by hand."""

import math
import warnings

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from nnunetv2_meddinov3.evaluation.metrics import EmptyMasks, agreement

monai = pytest.importorskip("monai.metrics", reason="needs the extra benchmark (MONAI)")


def pair(seed, dimensions=3):
    """Two blobs that overlap in part, a spacing and a tolerance."""
    rng = np.random.default_rng(seed)
    shape = rng.integers(6, 24, dimensions)
    first = gaussian_filter(rng.normal(size=shape), 2)
    second = first + gaussian_filter(rng.normal(size=shape), 1) * rng.uniform(0.05, 0.6)
    masks = first > first.std() * 0.7, second > first.std() * 0.7
    spacing = tuple(float(side) for side in rng.uniform(0.4, 4.0, dimensions))
    return *masks, spacing, float(rng.choice([0.0, 0.5, 1.0, 2.5]))


@pytest.fixture
def exact_quantiles(monkeypatch):
    """Releases of torch before 2.8 round the place of a quantile to fp32, and so MONAI's HD95."""
    quantile = torch.quantile
    monkeypatch.setattr(torch, "quantile", lambda values, q: quantile(values.double(), q).float())


def by_monai(prediction, reference, spacing, tolerance):
    a, b = (torch.from_numpy(mask)[None, None] for mask in (prediction, reference))
    given = {"include_background": True, "spacing": list(spacing)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI's, of itself
        return {
            "dice": monai.compute_dice(a, b, include_background=True).item(),
            "nsd_voxel": monai.compute_surface_dice(a, b, [tolerance], **given).item(),
            "nsd_surface": monai.compute_surface_dice(
                a, b, [tolerance], use_subvoxels=True, **given
            ).item(),
            "hd95": monai.compute_hausdorff_distance(a, b, percentile=95, **given).item(),
        }


@pytest.mark.slow
@pytest.mark.usefixtures("exact_quantiles")
@pytest.mark.parametrize("dimensions", [2, 3])
def test_scores_are_monais(dimensions):
    compared = 0
    for seed in range(100):
        prediction, reference, spacing, tolerance = pair(seed, dimensions)
        if not prediction.any() or not reference.any():
            continue
        ours = agreement(prediction, reference, spacing, tolerance)
        for name, value in by_monai(prediction, reference, spacing, tolerance).items():
            assert getattr(ours, name) == pytest.approx(value, rel=1e-6, abs=1e-6), (seed, name)
        compared += 1
    assert compared >= 97


@pytest.mark.slow
def test_the_nsd_of_areas_is_deepminds():
    deepmind = pytest.importorskip("surface_distance")
    compared = 0
    for seed in range(1000, 1050):
        prediction, reference, spacing, tolerance = pair(seed)
        if not prediction.any() or not reference.any():
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of scipy, where it is used
            distances = deepmind.compute_surface_distances(reference, prediction, spacing)
        theirs = deepmind.compute_surface_dice_at_tolerance(distances, tolerance)
        ours = agreement(prediction, reference, spacing, tolerance).nsd_surface
        assert ours == pytest.approx(theirs, abs=1e-4), seed
        compared += 1
    assert compared >= 45


def cube(shape, start, side):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(s, s + side) for s in start)] = True
    return mask


def test_a_cube_moved_by_two_voxels_can_be_worked_out_by_hand():
    reference, prediction = cube((9, 9, 9), (2, 2, 2), 4), cube((9, 9, 9), (2, 2, 4), 4)
    found = agreement(prediction, reference, (1, 1, 0.5), tolerance=0.0)
    assert found.dice == pytest.approx(0.5)
    # 56 of 64 voxels are on a cube's boundary; of either, the 20 in the plane that both have and
    # the 4 edges of 1 voxel beyond it
    same = (edges(prediction) & edges(reference)).sum()
    assert found.nsd_voxel == pytest.approx(2 * same / (2 * 56))
    assert agreement(prediction, reference, (1, 1, 0.5), tolerance=1.0).nsd_voxel == 1.0
    assert found.hd95 == pytest.approx(1.0)  # two voxels of 0.5 mm
    assert found.volume_error == 0
    assert found.volume_reference == found.volume_prediction == 64 * 0.5
    half = agreement(cube((9, 9, 9), (2, 2, 2), 2), reference, (1.0, 1.0, 0.5))
    assert half.volume_error == pytest.approx(8 / 64 - 1)
    assert half.dice == pytest.approx(2 * 8 / 72)


def edges(mask):
    inner = np.zeros_like(mask)
    inner[1:-1, 1:-1, 1:-1] = (
        mask[1:-1, 1:-1, 1:-1]
        & mask[2:, 1:-1, 1:-1]
        & mask[:-2, 1:-1, 1:-1]
        & mask[1:-1, 2:, 1:-1]
        & mask[1:-1, :-2, 1:-1]
        & mask[1:-1, 1:-1, 2:]
        & mask[1:-1, 1:-1, :-2]
    )
    return mask & ~inner


def test_the_two_nsds_are_different_numbers():
    prediction, reference, *_ = pair(3)
    found = agreement(prediction, reference, (1.0, 1.0, 1.0), 1.0)
    assert found.nsd_surface > found.nsd_voxel


FULL, NOTHING = cube((4, 4, 4), (1, 1, 1), 2), np.zeros((4, 4, 4), bool)
DIAGONAL = math.hypot(4, 4, 8)
SCORES = {
    # policy, prediction, reference -> dice and both NSDs, hd95, what is empty
    ("strict", "nothing", "nothing"): (math.nan, math.nan, "both"),
    ("strict", "full", "nothing"): (0.0, DIAGONAL, "reference"),
    ("strict", "nothing", "full"): (0.0, DIAGONAL, "prediction"),
    ("kits", "nothing", "nothing"): (1.0, 0.0, "both"),
    ("kits", "full", "nothing"): (0.0, DIAGONAL, "reference"),
    ("kits", "nothing", "full"): (0.0, DIAGONAL, "prediction"),
    ("paper", "nothing", "nothing"): (math.nan, math.nan, "both"),
    ("paper", "full", "nothing"): (math.nan, math.nan, "reference"),
    ("paper", "nothing", "full"): (0.0, DIAGONAL, "prediction"),
}


@pytest.mark.parametrize(("what", "wanted"), SCORES.items(), ids=lambda v: str(v)[:40])
def test_empty_masks_score_by_the_policy(what, wanted):
    policy, *names = what
    masks = ({"full": FULL, "nothing": NOTHING}[name] for name in names)
    found = agreement(*masks, (1.0, 1.0, 2.0), policy=EmptyMasks(policy))
    score, distance, empty = wanted
    for name in ("dice", "nsd_voxel", "nsd_surface"):
        assert getattr(found, name) == pytest.approx(score, nan_ok=True)
    assert found.hd95 == pytest.approx(distance, nan_ok=True)
    assert found.empty == empty
    assert math.isnan(found.volume_error) == (names[1] == "nothing")


def test_the_diagonal_is_that_of_the_whole_image():
    found = agreement(FULL, NOTHING, (1.0, 1.0, 1.0), extent=(10, 20, 20))
    assert found.hd95 == pytest.approx(30.0)


@pytest.mark.parametrize("spacing", [(1, 2.5, 1), (1, 1, 1), tuple(np.float32([1, 0.5, 2]))])
def test_a_spacing_of_any_numbers_does(spacing):
    assert agreement(FULL, FULL, spacing).nsd_surface == 1.0


def test_masks_that_fill_the_image_and_single_voxels_have_scores():
    everything = np.ones((3, 4, 5), bool)
    dot = cube((3, 4, 5), (0, 3, 4), 1)
    assert agreement(everything, everything, (1.0, 1.0, 1.0)).nsd_voxel == 1.0
    found = agreement(dot, dot[::-1].copy(), (2.0, 1.0, 1.0), tolerance=1.9)
    assert (found.dice, found.nsd_voxel, found.nsd_surface, found.hd95) == (0, 0, 0, 4)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((FULL, FULL[:3], (1, 1, 1)), "must fit each other"),
        ((FULL, FULL, (1, 1)), "must fit each other"),
        ((FULL.astype(int), FULL, (1, 1, 1)), "must be boolean"),
        ((FULL, FULL, (1, 0, 1)), "must be positive"),
        ((FULL, FULL, (1, math.nan, 1)), "must be positive"),
        ((FULL, FULL, (1, 1, 1), -1.0), "must be 0 or more"),
        ((FULL, FULL, (1, 1, 1), math.inf), "must be 0 or more"),
    ],
)
def test_what_does_not_fit_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        agreement(*given)
