import numpy as np
import pytest
import torch
from torch.nn import functional as F

from nnunetv2_meddinov3.pretrain.views.geometry import Box, _resize_all, crop_and_resize, draw_box


def slices():
    g = torch.Generator().manual_seed(0)
    return torch.randn(3, 60, 80, generator=g) * 300


BOXES = [
    Box(0, 0, 60, 80, False),
    Box(3, 10, 17, 41, True),
    Box(20, 33, 8, 9, False),
    Box(59, 79, 1, 1, False),
    Box(5, 0, 32, 32, True),
]


@pytest.mark.parametrize("size", [16, 32, 48])
def test_the_matrices_of_the_gpu_resample_as_torch_does(size):
    images, numbers = slices(), [0, 1, 2, 0, 1]
    found = _resize_all(images, numbers, BOXES, size)  # what runs on a GPU
    wanted = crop_and_resize(images, numbers, BOXES, size)
    assert found.shape == (5, 1, size, size)
    error = (found - wanted).abs().amax() / wanted.abs().amax()
    assert error < 1e-5


def test_the_matrices_are_multiplied_in_full_precision_and_training_keeps_its_own(monkeypatch):
    seen, bmm = [], torch.bmm

    def watched(*arguments):
        seen.append(torch.get_float32_matmul_precision())
        return bmm(*arguments)

    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch, "bmm", watched)
    torch.set_float32_matmul_precision("high")
    try:
        _resize_all(slices(), [0], BOXES[:1], 16)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["highest", "highest"]


def test_a_crop_is_torchs_antialiased_bicubic_of_its_box():
    images, box = slices(), Box(3, 10, 17, 41, True)
    part = images[1, 3:20, 10:51]
    wanted = F.interpolate(part[None, None], (32, 32), mode="bicubic", antialias=True).flip(-1)
    assert torch.equal(crop_and_resize(images, [1], [box], 32), wanted)


def test_what_is_outside_the_box_is_never_read():
    images = slices()
    poisoned = torch.full_like(images, float("nan"))
    poisoned[:, 20:28, 33:42] = images[:, 20:28, 33:42]
    assert crop_and_resize(poisoned, [0], [BOXES[2]], 48).isfinite().all()


def boxes(count, height, width, scale, aspect=(0.75, 4 / 3), flip=0.5):
    g = np.random.default_rng(0)
    return [draw_box(height, width, scale, aspect, flip, g) for _ in range(count)]


def test_boxes_have_the_areas_and_aspects_that_are_asked_for():
    drawn = boxes(2000, 512, 512, (0.05, 0.32))
    areas = np.array([b.height * b.width / 512**2 for b in drawn])
    aspects = np.array([b.width / b.height for b in drawn])
    assert 0.049 < areas.min() < 0.06
    assert 0.30 < areas.max() < 0.325
    assert abs(areas.mean() - 0.185) < 0.01  # evenly drawn
    assert abs(np.log(aspects).mean()) < 0.02
    assert aspects.min() > 0.74
    assert aspects.max() < 1.35
    assert 0.45 < np.mean([b.flip for b in drawn]) < 0.55
    assert all(b.top + b.height <= 512 and b.left + b.width <= 512 for b in drawn)


def test_where_no_box_fits_the_centre_is_taken():
    box = boxes(1, 20, 200, (1.0, 1.0))[0]
    assert (box.height, box.width) == (20, round(20 * 4 / 3))
    assert box.top == 0
    assert box.left == (200 - box.width) // 2


@pytest.mark.parametrize(("flip", "share"), [(0.0, 0), (1.0, 1)])
def test_flips_can_be_turned_off_and_on(flip, share):
    assert np.mean([b.flip for b in boxes(20, 64, 64, (0.3, 1), flip=flip)]) == share
