import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nnunetv2_meddinov3.models.architecture import architecture_of
from nnunetv2_meddinov3.models.backbone import Backbone
from nnunetv2_meddinov3.pretrain import costs
from nnunetv2_meddinov3.pretrain.config import Head, Resolution, load_config
from nnunetv2_meddinov3.pretrain.heads import ProjectionHead
from nnunetv2_meddinov3.pretrain.student import encode, pack_blocks


@pytest.mark.parametrize(
    ("size", "resolution", "gigaflops"),
    [
        ("vits16", Resolution(224, 96), 130),
        ("vitb16", Resolution(224, 96), 469),
        ("vitl16", Resolution(224, 96), 1618),
        ("vits16", Resolution(256, 112), 172),
        ("vitb16", Resolution(256, 112), 617),
        ("vitl16", Resolution(256, 112), 2125),
    ],
)
def test_a_step_has_the_published_number_of_operations(size, resolution, gigaflops):
    config = load_config(f"{size}_stage1")
    flops = costs.step_flops(config, architecture_of(config.model.size), resolution)
    assert flops.total / 1e9 == pytest.approx(gigaflops, rel=5e-3)


@pytest.mark.parametrize(
    ("size", "gigaflops"), [("vits16", 300), ("vitb16", 1048), ("vitl16", 3581)]
)
def test_gram_anchoring_adds_the_gram_teacher(size, gigaflops):
    config = load_config(f"{size}_stage2_gram")
    a = architecture_of(config.model.size)
    flops = costs.step_flops(config, a, config.crops.resolutions[0])
    assert flops.total / 1e9 == pytest.approx(gigaflops, rel=5e-3)
    assert 0.40 < flops.gram / flops.total < 0.44


@pytest.mark.parametrize("size", ["vit_tiny", "vit_small_plus"])
def test_operations_and_parameters_are_those_torch_counts(size):
    a = architecture_of(size)
    backbone = pack_blocks(Backbone(a, mask_token=True)).eval()
    assert costs.backbone_parameters(a) == sum(p.numel() for p in backbone.parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        encode(backbone, [torch.zeros(1, 3, 64, 64)])
    tokens = 16 + 1 + a.num_registers
    attention = 2.0 * a.depth * 2 * tokens**2 * a.embed_dim  # which torch leaves out on the CPU
    counted = counter.get_total_flops()
    assert counted in (costs.forward_flops(a, 64), costs.forward_flops(a, 64) - attention)


def test_heads_have_the_parameters_that_are_counted():
    for head in (Head(100, 20, 10, 3), Head(50, 8, 4, 1)):
        module = ProjectionHead(
            32, head.prototypes, head.hidden_dim, head.bottleneck_dim, head.layers
        )
        assert costs.head_parameters(32, head) == sum(p.numel() for p in module.parameters())
    assert costs.head_parameters(768, Head()) / 1e6 == pytest.approx(23.1, abs=0.05)


def test_recomputing_activations_saves_memory_and_more_images_need_more():
    a = architecture_of("vit_base")
    plain = load_config("vitb16_stage1")
    saving = load_config("vitb16_stage1", ["engine.activation_checkpointing=true"])
    one, two = (costs.memory_gb(plain, a, n, is_bf16=True) for n in (16, 32))
    assert two["activations"] == pytest.approx(2 * one["activations"])
    assert costs.memory_gb(saving, a, 16, is_bf16=True)["activations"] < 0.3 * one["activations"]
    assert one["networks"] == two["networks"]
