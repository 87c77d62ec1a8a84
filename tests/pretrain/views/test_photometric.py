import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch.nn import functional as F

from nnunetv2_meddinov3.pretrain.config import Augment, Intensity
from nnunetv2_meddinov3.pretrain.views import photometric
from nnunetv2_meddinov3.pretrain.views.bands import filtered, lose_resolution, losing_resolution
from nnunetv2_meddinov3.pretrain.views.photometric import (
    Scaling,
    apply_photometric,
    contract_of,
    normalise,
)

NOTHING = {
    name: 0.0
    for name in Augment.model_fields
    if name.endswith("_probability") and name != "blur_probability"
}


def crops(n=4, size=32):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 1, size, size, generator=g) * 200 + 50


def changed(x, blur=0.0, seed=0, **options):
    """Crops in HU, changed."""
    augment = Augment(**{**NOTHING, **options})
    noise = torch.Generator().manual_seed(seed)
    x = (x + 1000) / 2000
    apply_photometric(x, augment, blur, np.random.default_rng(seed), noise)
    return x * 2000 - 1000


def test_with_all_probabilities_0_only_the_range_is_clipped():
    x = crops() * 10
    torch.testing.assert_close(changed(x), x.clamp(-1000, 1000), rtol=0, atol=1e-3)


def test_a_window_is_clipped_and_stretched_over_the_range():
    x = torch.tensor([-1000.0, -160, 40, 240, 1000]).view(1, 1, 1, 5).repeat(1, 1, 5, 1)
    out = changed(x, window_probability=1, window_level=[0.52, 0.52], window_width=[0.2, 0.2])
    assert out[0, 0, 0].tolist() == pytest.approx([-1000, -1000, 0, 1000, 1000], abs=1e-3)


def test_contrast_turns_about_the_mean_of_the_crop_and_brightness_is_added():
    x = crops(2)
    out = changed(x, contrast_probability=1, contrast=[0.5, 0.5], brightness=[0.015, 0.015])
    mean = x.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(out, (x - mean) * 0.5 + mean + 30, rtol=0, atol=1e-3)


def test_gamma_acts_on_the_range_scaled_to_1():
    x = torch.tensor([-1000.0, -500, 0, 1000]).view(1, 1, 2, 2)
    out = changed(x, gamma_probability=1, gamma=[2, 2])
    assert out.flatten().tolist() == pytest.approx([-1000, -875, -500, 1000], abs=1e-3)


def test_blur_is_a_gaussian_mirrored_at_the_edges():
    x = crops(1)
    out = changed(x, blur=1.0, blur_sigma_pixels=[1.3, 1.3])
    wanted = gaussian_filter(x[0, 0].numpy(), 1.3, mode="mirror", radius=4)
    np.testing.assert_allclose(out[0, 0].numpy(), wanted, atol=1e-2)


def test_noise_has_the_standard_deviation_that_is_asked_for():
    x = torch.zeros(4, 1, 64, 64)
    out = changed(x, noise_probability=1, noise_sd=[0.01, 0.01])
    assert out.std().item() == pytest.approx(20, rel=0.03)
    assert not torch.equal(out[0], out[1])


def test_what_noise_adds_beyond_the_range_is_clipped():
    out = changed(torch.full((2, 1, 16, 16), 990.0), noise_probability=1, noise_sd=[0.025, 0.025])
    assert out.max() == pytest.approx(1000)


def test_low_resolution_takes_away_detail_and_keeps_the_mean():
    x = crops(2)
    out = changed(x, low_resolution_probability=1, low_resolution=[0.5, 0.5])
    assert out.std() < 0.75 * x.std()
    torch.testing.assert_close(out.mean(), x.mean(), rtol=0, atol=3)
    same = changed(x, low_resolution_probability=1, low_resolution=[1, 1])
    torch.testing.assert_close(same, x, rtol=1e-4, atol=0.05)


def test_a_probability_is_the_share_of_crops_that_are_changed():
    x = crops(400, 4)
    out = changed(x, contrast_probability=0.3, contrast=[0.5, 0.5])
    share = ((out - x).abs() > 0.1).flatten(1).any(1).float().mean().item()
    assert 0.23 < share < 0.37


def test_each_crop_has_values_of_its_own_and_a_seed_gives_them_again():
    x = crops(1).repeat(4, 1, 1, 1)
    out = changed(x, contrast_probability=1, contrast=[0.5, 1.5])
    assert len({round(o.std().item(), 3) for o in out}) == 4
    assert torch.equal(out, changed(x, contrast_probability=1, contrast=[0.5, 1.5]))
    assert not torch.equal(out, changed(x, seed=1, contrast_probability=1, contrast=[0.5, 1.5]))


def test_normalised_values_are_those_of_the_release():
    out = normalise(torch.tensor([-3000.0, 65.1084213256836, 1000.0]), Intensity().hu)
    assert out.tolist() == pytest.approx([-5.98, 0, 5.25], abs=0.01)


@pytest.mark.parametrize("size", [32, 45, 130])
def test_low_resolution_is_shrinking_and_enlarging_each_crop(size):
    crops = torch.randn(5, size, size, generator=torch.Generator().manual_seed(0))
    zooms = [0.01, 0.3, 0.5, 0.77, 1.0]
    bands = losing_resolution(zooms, size)
    together = filtered(crops, bands, bands)  # what runs on a GPU
    tolerance = {"rtol": 1e-4, "atol": 3e-7 * size}  # torch has its positions in fp32
    for crop, factor, found in zip(crops, zooms, together, strict=True):
        small = max(2, round(size * factor))
        x = crop[None, None]
        shrunk = F.interpolate(x, (small, small), mode="bilinear", antialias=True)
        wanted = F.interpolate(shrunk, (size, size), mode="bicubic")[0, 0]
        torch.testing.assert_close(found, wanted, **tolerance)
        lose_resolution(crop, factor)
        torch.testing.assert_close(crop, wanted, **tolerance)


@pytest.mark.parametrize("size", [32, 33])
def test_how_many_crops_are_changed_together_changes_nothing(monkeypatch, size):
    every = {name: 0.7 for name in NOTHING}
    x = crops(12, size)
    together = changed(x, blur=[0.0, 1.0] * 6, **every)
    monkeypatch.setattr(photometric, "_CACHE_BYTES", 2**14)
    few = changed(x, blur=[0.0, 1.0] * 6, **every)
    torch.testing.assert_close(few, together, rtol=0, atol=1e-2)  # HU
    assert ((few - x).abs() > 1).flatten(1).any(1).all()


def test_a_blur_probability_may_be_each_crops_own():
    x = crops(6)
    out = changed(x, blur=[0.0, 1.0] * 3, blur_sigma_pixels=[1.5, 1.5])
    assert out.std((1, 2, 3))[1::2].max() < 0.5 * x.std()
    torch.testing.assert_close(out[::2], x[::2].clamp(-1000, 1000), rtol=0, atol=1e-3)


@pytest.mark.parametrize("ends", [None, (0.0, 255.0), (-40.0, 1200.0)])
def test_scaled_values_are_the_normalised_ones(ends):
    contract = contract_of(ends, Intensity())
    stored = torch.linspace(-1500, 1500, 101)
    scaling = Scaling.of(ends, contract)
    shares = (stored * scaling.factor + scaling.offset).clamp(0, 1)
    units = stored if ends is None else (stored - ends[0]) / (ends[1] - ends[0])
    wanted = normalise(units, contract)
    torch.testing.assert_close(shares * scaling.std + scaling.mean, wanted, rtol=1e-5, atol=1e-5)
