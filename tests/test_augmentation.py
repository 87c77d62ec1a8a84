"""The faster transforms against nnU-Net's own, with the same seeds: the same patches."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform, blur_dimension
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_meddinov3 import augmentation
from nnunetv2_meddinov3.augmentation import augment_batch, faster

PI = np.pi


def pipeline(size=(64, 48), rotation=(-PI, PI), **options):
    given = {"use_mask_for_norm": [False], "foreground_labels": [1, 2, 3], **options}
    return nnUNetTrainer.get_training_transforms(
        size, rotation, None, (0, 1), False, is_cascaded=False, **given
    )


def a_patch(shape=(90, 80), channels=1, segmentations=1, labels=12, seed=0):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[0], : shape[1]]
    segmentation = np.full((segmentations, *shape), -1, np.int16)
    segmentation[:, 5:, :-6] = 0  # the rest lies outside of the image
    for channel, label in itertools.product(range(segmentations), range(1, labels)):
        centre, radius = rng.uniform(0, shape[0], 2), rng.uniform(3, 20)
        segmentation[channel][(y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2] = label
    image = rng.normal(0, 1, (channels, *shape)) + segmentation[0]
    return torch.from_numpy(image.astype(np.float32)), torch.from_numpy(segmentation)


def run(transforms, image, segmentation, seed):
    np.random.seed(seed)  # noqa: NPY002  nnU-Net draws from the global generators
    torch.manual_seed(seed)
    done = transforms(image=image.clone(), segmentation=segmentation.clone())
    # the state afterwards: as much was drawn, in the same order
    return done["image"], done["segmentation"], (np.random.rand(), torch.rand(1).item())  # noqa: NPY002


@pytest.mark.parametrize(
    ("options", "patch"),
    [
        ({}, {}),
        ({"rotation": (-PI / 12, PI / 12)}, {}),
        ({"size": (96, 112)}, {}),  # larger than what is read
        ({"size": (63, 49)}, {"shape": (91, 77)}),
        ({"use_mask_for_norm": [True, False, True]}, {"channels": 3}),
        ({}, {"segmentations": 2, "labels": 3}),
        ({"regions": [[1, 2, 3], 2], "ignore_label": 3}, {"labels": 4}),
        ({"deep_supervision_scales": None}, {"labels": 1}),  # no label at all
    ],
)
def test_patches_are_those_of_nnunet(options, patch):
    options.pop("deep_supervision_scales", None)
    stock, ours = pipeline(**options), faster(pipeline(**options))
    different = total = 0
    for seed in range(60):
        image, segmentation = a_patch(seed=seed, **patch)
        expected = run(stock, image, segmentation, seed)
        found = run(ours, image, segmentation, seed)
        assert found[2] == expected[2]
        assert found[1].dtype == expected[1].dtype
        torch.testing.assert_close(found[0], expected[0], rtol=1e-3, atol=2e-3)
        different += int((found[1] != expected[1]).sum())
        total += found[1].numel()
    assert different <= 2e-5 * total


@pytest.mark.skipif(
    not hasattr(pipeline().transforms[0], "seg_tiebreak"),
    reason="this batchgeneratorsv2 is older than the rule for ties that ours follows",
)
def test_each_slow_transform_is_replaced_and_no_other():
    kinds = []
    for stock, ours in zip(pipeline().transforms, faster(pipeline()).transforms, strict=True):
        if isinstance(stock, RandomTransform):
            assert ours.apply_probability == stock.apply_probability
            stock, ours = stock.transform, ours.transform
        kinds.append((type(stock).__name__, type(ours) is type(stock)))
        values = {k: v for k, v in vars(stock).items() if not callable(v)}
        assert {k: vars(ours)[k] for k in values} == values
    replaced = {name for name, is_same in kinds if not is_same}
    assert replaced == {
        "SpatialTransform",
        "GaussianBlurTransform",
        "GaussianNoiseTransform",
        "RemoveLabelTransform",
    }


def changed(**values):
    transform = pipeline().transforms[0]
    for name, value in values.items():
        setattr(transform, name, value)
    return transform


@pytest.mark.parametrize(
    "values",
    [
        {"p_elastic_deform": 0.2},
        {"random_crop": True},
        {"mode_seg": "nearest"},
        {"mode_image": "bicubic"},
        {"padding_mode_image": "reflection"},
        {"border_mode_seg": "border"},
        {"align_corners": True},
        {"seg_tiebreak": "lowest"},
        {"patch_size": (8, 64, 48)},
    ],
)
def test_what_is_not_known_stays_nnunets(values):
    (kept,) = faster(ComposeTransforms([changed(**values)])).transforms
    assert type(kept) is SpatialTransform


def test_a_users_own_transform_stays():
    class Own(SpatialTransform):
        pass

    own = copy.copy(changed())
    own.__class__ = Own
    assert faster(own) is own
    (kept,) = faster(ComposeTransforms([own])).transforms
    assert kept is own


def test_the_faster_transforms_go_to_worker_processes():
    ours = pickle.loads(pickle.dumps(faster(pipeline())))
    image, segmentation = a_patch()
    assert run(ours, image, segmentation, 3)[0].shape == (1, 64, 48)


@pytest.mark.parametrize("shape", [(30, 20), (9, 30, 20)])
@pytest.mark.parametrize("sigma", [0.5, 0.77, 1.0])
def test_blur_is_nnunets_along_every_axis(shape, sigma):
    image = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for axis in range(len(shape)):
        wanted = blur_dimension(image[None].clone(), sigma, axis, force_use_fft=False)[0]
        torch.testing.assert_close(augmentation.blurred(image, sigma, axis), wanted)


def test_blur_of_all_channels_alike_is_nnunets():
    stock = GaussianBlurTransform((0.5, 1.0), synchronize_channels=True, p_per_channel=1)
    (ours,) = faster(ComposeTransforms([stock])).transforms
    image = torch.randn(3, 30, 20, generator=torch.Generator().manual_seed(0))
    params = {"apply_to_channel": torch.tensor([True, False, True]), "sigmas": [0.6, 0.9]}
    wanted = stock._apply_to_image(image.clone(), **params)
    torch.testing.assert_close(ours._apply_to_image(image.clone(), **params), wanted)


def test_labels_are_chosen_by_weight_by_hand():
    # two by two pixels: 1 2 / 3 3
    labels = torch.tensor([[[1, 2], [3, 3]]], dtype=torch.int16)

    def at(y, x):
        grid = torch.tensor([[[(2 * x + 1) / 2 - 1, (2 * y + 1) / 2 - 1]]])
        return augmentation.sample_labels(labels, grid, -1).item()

    assert at(0, 0) == 1
    assert at(0, 0.49) == 1
    assert at(0, 0.51) == 2
    assert at(0.4, 0.5) == 3  # weights 0.3, 0.3 and 0.2 + 0.2
    assert at(0.3, 0.1) == 1  # 0.63 against 0.3
    assert at(-0.49, 0) == 1
    assert at(-0.51, 0) == -1
    assert at(0, 1.49) == 2
    assert at(-0.4, -0.4) == -1  # 0.36 inside
    assert at(1.2, 0.5) == 3
    assert at(50, -50) == -1


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_batch_is_augmented_where_it_is(device, request):
    if device == "cuda":
        request.getfixturevalue("gpu")
    patches = [a_patch(seed=seed) for seed in range(6)]
    images = torch.stack([image for image, _ in patches])
    segmentations = torch.stack([segmentation for _, segmentation in patches])
    quiet = faster(pipeline())
    quiet.transforms = [t for t in quiet.transforms if "Noise" not in repr(vars(t))]
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    data, target = augment_batch(quiet, images.to(device), segmentations.to(device))
    assert data.device.type == target.device.type == device
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    for i, (image, segmentation) in enumerate(patches):
        wanted = quiet(image=image.clone(), segmentation=segmentation.clone())
        torch.testing.assert_close(data[i].cpu(), wanted["image"], rtol=1e-3, atol=2e-3)
        assert (target[i].cpu() == wanted["segmentation"]).float().mean() > 0.999


def test_noise_has_the_strength_that_was_drawn():
    (noise,) = (t.transform for t in faster(pipeline()).transforms if "Noise" in repr(vars(t)))
    torch.manual_seed(0)
    image = torch.zeros(2, 300, 300)
    params = {"num_apply": 2, "apply_idx": torch.tensor([0, 1]), "sigmas": 0.07}
    done = noise._apply_to_image(image, **params)
    assert done.std(dim=(1, 2)).tolist() == pytest.approx([0.07, 0.07], rel=0.02)
    assert abs(np.corrcoef(done.flatten(1))[0, 1]) < 0.02


def test_only_nnunets_own_composition_is_changed():
    class Other(BasicTransform):
        pass

    other = Other()
    assert faster(other) is other
