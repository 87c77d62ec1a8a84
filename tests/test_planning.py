"""The rule behind ``2d_N``, on made-up plans; planning of real data is tested in ``planning/``."""

import copy
import itertools

import numpy as np
import pytest
import torch
from nnunetv2.preprocessing.resampling.resample_torch import resample_torch_fornnunet

from nnunetv2_meddinov3 import planning
from nnunetv2_meddinov3.planning import MEMORY, add_configuration
from nnunetv2_meddinov3.settings import SIZE_NAMES

SHAPES = [(512, 512), (256, 224), (224, 256), (640, 640), (56, 40), (24, 24), (48, 1024), (320, 8)]
SPACINGS = [(0.78125, 0.78125), (0.8, 1.1), (1.0, 1.0), (3.0, 0.3)]
SIZES = [64, 128, 448, 896, 1008, 4096]


def made_up_plans(patch_size, spacing, *, median=None, slices=100, **configurations):
    """Plans as nnU-Net writes them, of a dataset that does not exist."""
    median = list(median or patch_size)
    planned = {
        "data_identifier": "nnUNetPlans_2d",
        "batch_size": 12,
        "patch_size": list(patch_size),
        "median_image_size_in_voxels": [float(n) for n in median],
        "spacing": list(spacing),
        "architecture": {"network_class_name": "some.UNet", "arch_kwargs": {}},
    }
    return {
        "dataset_name": "Dataset999_MadeUp",
        "plans_name": "nnUNetPlans",
        "original_median_shape_after_transp": [slices, *median],
        "configurations": {"2d": planned, **configurations},
    }


def added_to(plans, size, *, gpu_memory_gb=8, backbone="vit_base", training_cases=1000):
    plans = add_configuration(
        plans,
        size,
        gpu_memory_gb=gpu_memory_gb,
        backbone=backbone,
        training_cases=training_cases,
    )
    return plans["configurations"][f"2d_{size}"]


def test_the_papers_example_comes_out():
    added = added_to(made_up_plans((512, 512), (0.78125, 0.78125)), 896)
    assert added["spacing"] == pytest.approx([0.4464285714] * 2, abs=1e-9)
    assert added["patch_size"] == [896, 896]


def test_a_patch_that_is_not_square_stays_so():
    added = added_to(made_up_plans((256, 224), (0.8, 1.1), median=(300, 260)), 896)
    assert added["patch_size"] == [896, 784]
    assert added["spacing"] == pytest.approx([0.8 * 256 / 896, 1.1 * 256 / 896])
    assert added["median_image_size_in_voxels"] == [1050, 910]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_field_of_view_and_the_pixel_aspect_are_kept(shape):
    for spacing, size in itertools.product(SPACINGS, SIZES):
        added = added_to(made_up_plans(shape, spacing), size)
        patch, fine = added["patch_size"], added["spacing"]
        assert max(patch) == size == patch[int(np.argmax(shape))]
        assert all(n % 16 == 0 and n > 0 for n in patch)
        assert fine[0] / fine[1] == pytest.approx(spacing[0] / spacing[1], rel=1e-12)
        for n, mm, old_n, old_mm in zip(patch, fine, shape, spacing, strict=True):
            assert -1e-6 < n - old_n * old_mm / mm < 16 - 1e-6  # pixels beyond the 2d patch


def test_logits_are_resampled_linearly_within_the_slice_and_stay_in_it():
    # thin slices and long pixels, where nnU-Net's separate treatment of "z" would take x for z
    added = added_to(made_up_plans((64, 16), (0.3, 1.2)), 128)
    options = added["resampling_fn_probabilities_kwargs"]
    assert added["resampling_fn_probabilities"] == "resample_torch_fornnunet"
    ramp = torch.arange(8.0).expand(1, 1, 4, 8)
    logits = torch.cat([ramp, 100 + ramp], dim=1)  # (1, z, y, x)
    image = resample_torch_fornnunet(
        logits, (2, 4, 16), (0.2, 0.3, 1.2), (0.2, 0.3, 0.6), num_threads=1, **options
    )
    expected = torch.tensor([0, *np.arange(0.25, 7, 0.5), 7])
    torch.testing.assert_close(image[0, :, 0], torch.stack([expected, 100 + expected]).float())


def test_the_plans_given_are_not_changed():
    plans = made_up_plans((512, 512), (1.0, 1.0))
    before = copy.deepcopy(plans)
    after = add_configuration(plans, 896, gpu_memory_gb=8, backbone="vit_base", training_cases=10)
    assert plans == before
    del after["configurations"]["2d_896"]
    assert after == before


def test_a_2d_that_inherits_is_resolved():
    plans = made_up_plans((512, 512), (1.0, 1.0))
    plans["configurations"]["mine"] = plans["configurations"]["2d"]
    plans["configurations"]["2d"] = {"inherits_from": "mine", "patch_size": [256, 128]}
    assert added_to(plans, 512)["patch_size"] == [512, 256]


def test_the_batch_fits_the_memory_and_grows_with_it():
    plans = made_up_plans((512, 512), (0.8, 0.8))
    sizes = {}
    for gigabytes in (8, 24, 80):
        added = added_to(plans, 896, gpu_memory_gb=gigabytes)
        batch = sizes[gigabytes] = added["batch_size"]
        need = [
            planning.estimate_gpu_memory("vit_base", n, added["patch_size"])
            for n in (batch, batch + 1)
        ]
        assert need[0] <= gigabytes < need[1]
    assert 2 <= sizes[8] < sizes[24] < sizes[80]


def test_a_larger_backbone_gets_no_larger_batch():
    plans = made_up_plans((512, 512), (0.8, 0.8))
    batches = [added_to(plans, 448, gpu_memory_gb=80, backbone=b)["batch_size"] for b in MEMORY]
    assert batches == sorted(batches, reverse=True)
    assert batches[0] > 10 * batches[-1]
    assert batches[-1] == 2  # vit_7b fits nowhere: nnU-Net's minimum


@pytest.mark.parametrize(("cases", "expected"), [(1, 2), (10, 5), (40, 20), (10_000, 25)])
def test_a_batch_shows_at_most_a_twentieth_of_the_dataset(cases, expected):
    # 10 slices that the patch just covers: 5 % of `cases` volumes are cases / 2 patches
    plans = made_up_plans((512, 512), (0.8, 0.8), slices=10)
    # (vit_base: 0.63 GB a patch, so that 20 GB hold 25)
    added = added_to(plans, 512, gpu_memory_gb=20, training_cases=cases)
    assert added["batch_size"] == expected


def test_every_backbone_has_an_estimate():
    assert tuple(MEMORY) == SIZE_NAMES
