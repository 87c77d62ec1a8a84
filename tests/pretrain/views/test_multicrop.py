import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nnunetv2_meddinov3.pretrain.config import load_config
from nnunetv2_meddinov3.pretrain.views import Slices, make_views
from nnunetv2_meddinov3.pretrain.views.photometric import normalise

PLAIN = [
    f"augment.{name}_probability=0"
    for name in ("window", "contrast", "gamma", "noise", "low_resolution")
] + ["augment.blur_probability=[0,0,0]"]


def arrays(sizes=((40, 52), (64, 64), (33, 70))):
    g = np.random.default_rng(0)
    return [g.integers(-1000, 1000, size).astype(np.int16) for size in sizes]


def views(name="tiny_stage2_gram", overrides=(), seed=(0, 1, 2)):
    config = load_config(name, overrides)
    return make_views(Slices.of(arrays()), config.crops.resolutions[0], config, seed)


def test_views_have_the_shapes_of_the_config_crop_major():
    batch = views()
    assert batch.images == 3
    assert batch.global_crops.shape == (6, 1, 96, 96)
    assert batch.local_crops.shape == (12, 1, 48, 48)
    assert batch.gram_crops.shape == (6, 1, 192, 192)
    assert batch.masks.shape == (6, 36)
    assert batch.masks.dtype == torch.bool


def test_crop_0_of_every_image_comes_before_crop_1():
    config = load_config("tiny_stage1", PLAIN)
    flat = [np.full((40, 40), value, np.int16) for value in (-500, 0, 500)]
    batch = make_views(Slices.of(flat), config.crops.resolutions[0], config, (0,))
    wanted = normalise(torch.tensor([-500.0, 0, 500]), config.intensity.hu)
    means = batch.global_crops.mean((1, 2, 3))
    torch.testing.assert_close(means, wanted.repeat(2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        batch.local_crops.mean((1, 2, 3)), wanted.repeat(4), rtol=1e-4, atol=1e-4
    )


def test_gram_crops_show_what_the_global_crops_show_at_their_own_size():
    batch = views(overrides=PLAIN)
    small = torch.nn.functional.interpolate(batch.gram_crops, (96, 96), mode="area")
    for ours, theirs in zip(small, batch.global_crops, strict=True):
        correlation = np.corrcoef(ours.flatten(), theirs.flatten())[0, 1]
        assert correlation > 0.98


def test_gram_crops_are_not_changed_photometrically():
    loud = [
        "augment.noise_probability=1",
        "augment.noise_sd_hu=[300,300]",
        "augment.window_probability=1",
    ]
    assert torch.equal(views(overrides=PLAIN).gram_crops, views(overrides=loud).gram_crops)
    assert not torch.equal(views(overrides=PLAIN).global_crops, views(overrides=loud).global_crops)


def test_stage_1_makes_no_gram_crops():
    assert views("tiny_stage1").gram_crops is None


def test_the_first_global_crop_is_never_blurred_and_the_second_almost_always():
    blur = [*PLAIN[:-1], "augment.blur_probability=[0,1,0]", "augment.blur_sigma_pixels=[2,2]"]
    plain, blurred = views(overrides=PLAIN), views(overrides=blur)
    assert torch.equal(plain.global_crops[:3], blurred.global_crops[:3])
    assert torch.equal(plain.local_crops, blurred.local_crops)
    assert (blurred.global_crops[3:].std((1, 2, 3)) < plain.global_crops[3:].std((1, 2, 3))).all()


def test_a_seed_gives_the_same_views_and_another_gives_others():
    a, b, c = views(), views(), views(seed=(0, 1, 3))
    assert torch.equal(a.global_crops, b.global_crops)
    assert torch.equal(a.masks, b.masks)
    assert not torch.equal(a.global_crops, c.global_crops)


def test_values_never_leave_the_contract():
    batch = views()
    low, high = ((v - 65.1084213256836) / 178.01663208007812 for v in (-1000, 1000))
    for crops in (batch.global_crops, batch.local_crops, batch.gram_crops):
        assert crops.min() >= low - 1e-5
        assert crops.max() <= high + 1e-5


def test_padding_of_smaller_slices_is_never_seen():
    config = load_config("tiny_stage1", PLAIN)
    slices = Slices.of([np.full((20, 60), 300, np.int16), np.full((60, 20), 300, np.int16)])
    batch = make_views(slices, config.crops.resolutions[0], config, (1,))
    wanted = (300 - 65.1084213256836) / 178.01663208007812
    for crops in (batch.global_crops, batch.local_crops):
        assert crops.min().item() == pytest.approx(wanted, abs=1e-3)
        assert crops.max().item() == pytest.approx(wanted, abs=1e-3)


ALL = [
    f"augment.{name}_probability=1"
    for name in ("window", "contrast", "gamma", "noise", "low_resolution")
] + ["augment.blur_probability=[1,1,1]"]


@pytest.mark.slow
@pytest.mark.parametrize("threads", [2, 3])
def test_views_do_not_depend_on_the_number_of_threads(threads):
    # threads share the mean of one large crop, and split powers where vectors do not end
    config = load_config("vitb16_stage1", ALL)
    slices = Slices.of(arrays([(300, 300)]))
    before, made = torch.get_num_threads(), {}
    try:
        for number in (1, threads):
            torch.set_num_threads(number)
            made[number] = [
                make_views(slices, config.crops.resolutions[0], config, (seed,))
                for seed in range(4)
            ]
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*made.values(), strict=True):
        assert torch.equal(a.global_crops, b.global_crops)
        assert torch.equal(a.local_crops, b.local_crops)


def drawn(monkeypatch, device):
    """The views of slices on a device, and the noise that was drawn for them."""
    noise, normal = [], torch.randn

    def watched(*arguments, **options):
        noise.append(normal(*arguments, **options))
        return noise[-1]

    config = load_config("tiny_stage2_gram", ALL)
    slices = Slices.of(arrays()).to(torch.device(device))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", watched)
        return make_views(slices, config.crops.resolutions[0], config, (0, 1)), noise


@pytest.mark.slow
def test_what_is_drawn_does_not_depend_on_where_the_slices_are(monkeypatch):
    here, noise = drawn(monkeypatch, "cpu")
    there, noise_there = drawn(monkeypatch, "meta")  # a device without values
    assert there.global_crops.device.type == "meta"
    assert there.global_crops.shape == here.global_crops.shape
    assert len(noise) == 18  # one for each crop
    assert all(torch.equal(a, b) for a, b in zip(noise, noise_there, strict=True))
    assert torch.equal(here.masks, there.masks)


class Launches(TorchDispatchMode):
    """Counts what a device would be asked to do: operators that neither look nor reserve."""

    LOOKS = ("split", "unbind", "detach")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        name = function._schema.name.removeprefix("aten::")
        first = out[0] if isinstance(out, (list, tuple)) else out
        idle = function.is_view or name.startswith(self.LOOKS) or "empty" in name
        self.count += first.device.type == "meta" and not idle
        return out


@pytest.mark.parametrize("stage", ["vitb16_stage1", "vitb16_stage2_gram"])
@pytest.mark.parametrize("images", [2, 16])
def test_a_device_is_asked_for_few_things_whatever_the_number_of_images(stage, images):
    config = load_config(stage, ALL)
    slices = Slices.of([np.zeros((64, 64), np.int16)] * images).to(torch.device("meta"))
    with Launches() as launches:
        make_views(slices, config.crops.resolutions[0], config, (0, 1))
    assert 80 < launches.count <= 135


@pytest.mark.gpu
def test_views_made_on_a_gpu_are_those_made_by_workers():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    config, slices = load_config("tiny_stage2_gram", ALL), Slices.of(arrays())
    resolution = config.crops.resolutions[0]
    here = make_views(slices, resolution, config, (0, 1))
    there = make_views(slices.to(torch.device("cuda")), resolution, config, (0, 1)).to("cpu", False)
    assert torch.equal(here.masks, there.masks)
    for name in ("global_crops", "local_crops", "gram_crops"):
        error = (getattr(here, name) - getattr(there, name)).abs().max()
        assert error < 1e-3, name  # of a standard deviation
