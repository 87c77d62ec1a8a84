"""What runs on a CUDA device gives what it gives on a CPU. Skips itself without one."""

import json

import numpy as np
import pytest
import torch

from nnunetv2_meddinov3.cli import main
from nnunetv2_meddinov3.models.segmenter import Segmenter
from nnunetv2_meddinov3.pretrain.config import load_config
from nnunetv2_meddinov3.pretrain.views import Slices, make_views

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

# The stage at its smallest: 4 steps of 8 images.
TINY = [
    *("crops.resolutions.0.global_size=48", "crops.resolutions.0.local_size=32"),
    *("optim.steps=4", "optim.batch_size=8", "losses.koleo_group=4", "optim.lr.warmup_steps=0"),
    *("data.workers=0", "engine.log_every=1", "engine.export_at=[]", "engine.compile=never"),
]


def relative_error(ours, wanted):
    return ((ours.float().cpu() - wanted).norm() / wanted.norm()).item()


def segment(device, autocast):
    """Logits and the gradient of the stem of a small segmenter, both on the CPU in fp32."""
    torch.manual_seed(0)
    backbone = {"embed_dim": 64, "depth": 4, "num_heads": 2, "layer_scale": 0.5}
    network = Segmenter(1, 5, backbone).to(device)
    images = torch.randn(2, 1, 70, 52, generator=torch.Generator().manual_seed(1)).to(device)
    with torch.autocast(device.type, enabled=autocast):
        logits = network(images)
    logits.square().mean().backward()
    return logits.detach(), network.backbone.vit.patch_embed.proj.weight.grad


def test_the_segmenter_in_bf16_stays_near_fp32_on_the_cpu(gpu):
    wanted = segment(torch.device("cpu"), autocast=False)
    ours = segment(gpu, autocast=True)
    assert ours[0].dtype == torch.float32
    assert relative_error(ours[0], wanted[0]) < 0.02
    assert relative_error(ours[1], wanted[1]) < 0.1


def test_the_segmenter_in_fp32_equals_the_cpus(gpu):
    wanted = segment(torch.device("cpu"), autocast=False)
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")  # no TF32
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            ours = segment(gpu, autocast=False)
    finally:
        torch.set_float32_matmul_precision(precision)
    for our_tensor, wanted_tensor in zip(ours, wanted, strict=True):
        assert relative_error(our_tensor, wanted_tensor) < 1e-5


@pytest.mark.parametrize("name", ["tiny_stage1", "tiny_stage2_gram"])
def test_views_made_on_the_device_equal_those_made_on_the_cpu(gpu, name):
    config = load_config(name)
    generator = np.random.default_rng(0)
    sizes = [(40, 52), (64, 64), (33, 70)]
    slices = Slices.of([generator.integers(-1000, 1000, s).astype(np.int16) for s in sizes])
    resolution = config.crops.resolutions[0]
    wanted = make_views(slices, resolution, config, (0, 1, 2))
    ours = make_views(slices.to(gpu), resolution, config, (0, 1, 2))
    assert ours.global_crops.device.type == gpu.type
    assert torch.equal(ours.masks.cpu(), wanted.masks)
    for kind in ("global_crops", "local_crops", "gram_crops"):
        if getattr(wanted, kind) is not None:
            torch.testing.assert_close(
                getattr(ours, kind).cpu(), getattr(wanted, kind), rtol=1e-4, atol=1e-4
            )


def test_pretraining_steps_on_the_device_follow_those_on_the_cpu(gpu, ct_store, tmp_path):
    losses = {}
    for device in ("cpu", gpu.type):
        words = ["tiny_stage1", "--store", ct_store, "--out", tmp_path / device, *TINY]
        words += [f"engine.device={device}", "engine.precision=fp32"]
        assert main(["pretrain", *map(str, words)]) == 0
        (metrics,) = (tmp_path / device).rglob("metrics.jsonl")
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
        losses[device] = [row["loss_total"] for row in rows]
    assert len(losses[gpu.type]) == 4
    np.testing.assert_allclose(losses[gpu.type], losses["cpu"], rtol=1e-2)


def test_a_pretraining_step_in_bf16_is_finite_and_near_fp32(gpu, ct_store, tmp_path):
    losses = {}
    for precision in ("fp32", "bf16"):
        words = ["tiny_stage1", "--store", ct_store, "--out", tmp_path / precision, *TINY]
        words += [f"engine.device={gpu.type}", f"engine.precision={precision}"]
        assert main(["pretrain", *map(str, words)]) == 0
        (metrics,) = (tmp_path / precision).rglob("metrics.jsonl")
        losses[precision] = json.loads(metrics.read_text().splitlines()[0])["loss_total"]
    assert np.isfinite(losses["bf16"])
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)
