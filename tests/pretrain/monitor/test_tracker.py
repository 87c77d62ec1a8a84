import numpy as np
import pytest
import torch

from nnunetv2_meddinov3.pretrain.config import Intensity
from nnunetv2_meddinov3.pretrain.monitor.tracker import (
    fixed_slices,
    load_moments,
    pca_maps,
    save_moment,
    similarity_maps,
    spread_rows,
)


def test_principal_axes_that_only_turn_give_the_same_colours():
    g = np.random.default_rng(0)
    base = g.normal(size=(2, 6, 6, 16)) * np.linspace(3, 0.1, 16)
    rotation = np.linalg.qr(g.normal(size=(16, 16)))[0]
    a, b = pca_maps([base, base @ rotation])
    assert a.shape == (2, 6, 6, 3)
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_colours_are_those_of_the_largest_directions():
    g = np.random.default_rng(0)
    axes = np.linalg.qr(g.normal(size=(8, 8)))[0]
    scores = g.normal(size=(1, 20, 20, 8)) * np.array([9, 5, 3, *[1e-3] * 5])
    (colours,) = pca_maps([scores @ axes])
    for channel in range(3):
        c = np.corrcoef(colours[..., channel].ravel(), scores[..., channel].ravel())[0, 1]
        assert abs(c) > 0.98  # not 1: a component is clipped to its 2nd and 98th percentile


def test_similarity_is_1_at_its_patch_and_the_cosine_elsewhere():
    patches = np.random.default_rng(0).normal(size=(1, 3, 3, 5))
    out = similarity_maps(patches, [(1, 2)])[0]
    assert out[1, 2] == pytest.approx(1)
    a, b = patches[0, 0, 0], patches[0, 1, 2]
    assert out[0, 0] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_slices_of_different_volumes_with_most_body_are_tracked():
    volumes = np.repeat([0, 1, 2], 4)
    body = np.array([0, 0.5, 0.1, 0.2, 0.3, 0.1, np.nan, 0.2, 0, 0, 0, 0.9])
    assert spread_rows(volumes, body, count=3) == [1, 4, 11]
    fixed = fixed_slices([np.full((20, 30), 3000, np.int16)], [None], Intensity())
    assert fixed.shown.max() == 1000
    assert fixed.inputs.max().item() == pytest.approx((1000 - 65.108) / 178.017, abs=1e-3)


def test_maps_of_many_steps_are_thinned_with_both_ends_kept(tmp_path):
    for step in range(10):
        save_moment(tmp_path, step, torch.zeros(1, 1, 8, 8), torch.zeros(1, 2, 2, 3))
    assert [moment.step for moment in load_moments(tmp_path, limit=4)] == [0, 3, 6, 9]


def test_a_moment_is_read_as_it_was_saved(tmp_path):
    slices = torch.randint(-1000, 1000, (2, 1, 8, 8)).float()
    patches = torch.randn(2, 2, 2, 3)
    save_moment(tmp_path, 7, slices, patches)
    (moment,) = load_moments(tmp_path)
    assert (tmp_path / "maps/step_0000007.npz").is_file()
    assert moment.step == 7
    np.testing.assert_array_equal(moment.slices, slices[:, 0].numpy())
    np.testing.assert_allclose(moment.patches, patches.numpy(), rtol=1e-3, atol=1e-3)
