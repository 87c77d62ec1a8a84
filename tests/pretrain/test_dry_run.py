import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nnunetv2_meddinov3.models.architecture import architecture_of
from nnunetv2_meddinov3.models.backbone import Backbone
from nnunetv2_meddinov3.pretrain import dry_run
from nnunetv2_meddinov3.pretrain.config import Head, Resolution, load_config
from nnunetv2_meddinov3.pretrain.heads import ProjectionHead
from nnunetv2_meddinov3.pretrain.student import encode, pack_blocks


@pytest.mark.parametrize(
    ("size", "resolution", "gigaflops"),
    [
        ("vits16", Resolution(global_size=224, local_size=96), 130),
        ("vitb16", Resolution(global_size=224, local_size=96), 469),
        ("vitl16", Resolution(global_size=224, local_size=96), 1618),
        ("vits16", Resolution(global_size=256, local_size=112), 172),
        ("vitb16", Resolution(global_size=256, local_size=112), 617),
        ("vitl16", Resolution(global_size=256, local_size=112), 2125),
    ],
)
def test_a_step_has_the_published_number_of_operations(size, resolution, gigaflops):
    config = load_config(f"{size}_stage1")
    flops = dry_run.step_flops(config, architecture_of(config.model.size), resolution)
    assert flops.total / 1e9 == pytest.approx(gigaflops, rel=5e-3)


@pytest.mark.parametrize(
    ("size", "gigaflops"), [("vits16", 300), ("vitb16", 1048), ("vitl16", 3581)]
)
def test_gram_anchoring_adds_the_gram_teacher(size, gigaflops):
    config = load_config(f"{size}_stage2_gram")
    a = architecture_of(config.model.size)
    flops = dry_run.step_flops(config, a, config.crops.resolutions[0])
    assert flops.total / 1e9 == pytest.approx(gigaflops, rel=5e-3)
    assert 0.40 < flops.gram / flops.total < 0.44


@pytest.mark.parametrize("size", ["vit_tiny", "vit_small_plus"])
def test_operations_and_parameters_are_those_torch_counts(size):
    a = architecture_of(size)
    backbone = pack_blocks(Backbone(a, mask_token=True)).eval()
    assert dry_run.backbone_parameters(a) == sum(p.numel() for p in backbone.parameters())
    # torch counts the products of attention only where it computes them one by one
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        encode(backbone, [torch.zeros(1, 3, 64, 64)])
    assert counter.get_total_flops() == dry_run.forward_flops(a, 64)


def a_head(width, head):
    return ProjectionHead(width, head.prototypes, head.hidden_dim, head.bottleneck_dim, head.layers)


def test_heads_have_the_parameters_that_are_counted():
    for sizes in ((100, 20, 10, 3), (50, 8, 4, 1)):
        head = Head(**dict(zip(Head.model_fields, sizes, strict=True)))
        parameters = sum(p.numel() for p in a_head(32, head).parameters())
        assert dry_run.head_parameters(32, head) == parameters
    assert dry_run.head_parameters(768, Head()) / 1e6 == pytest.approx(23.1, abs=0.05)


@pytest.mark.parametrize(("stage", "gram_teachers"), [("stage1", 0), ("stage2_gram", 1)])
def test_the_memory_of_networks_is_that_of_their_numbers(stage, gram_teachers):
    config = load_config(f"tiny_{stage}")
    a = architecture_of(config.model.size)
    modules = [Backbone(a, mask_token=True)]
    modules += [a_head(a.embed_dim, h) for h in (config.heads.dino, config.heads.ibot)]
    sizes = [sum(p.numel() for p in module.parameters()) for module in modules]
    # weights, gradients and two moments of the student, weights of the teacher; in fp32
    wanted = 4 * (5 * sum(sizes) + gram_teachers * sizes[0])
    assert dry_run.memory_gb(config, a, 4, is_bf16=False)["networks"] * 1e9 == wanted


@pytest.mark.slow
@pytest.mark.parametrize("size", ["vit_tiny", "vit_small_plus"])
def test_the_memory_of_activations_is_about_what_autograd_keeps(size):
    config, a, images = load_config("tiny_stage1"), architecture_of(size), 2
    backbone = pack_blocks(Backbone(a, mask_token=True)).train()
    weights = {p.untyped_storage().data_ptr() for p in backbone.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    crops = config.crops.resolutions[0]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        encode(
            backbone,
            [
                torch.zeros(2 * images, 3, crops.global_size, crops.global_size),
                torch.zeros(4 * images, 3, crops.local_size, crops.local_size),
            ],
        )
    counted = dry_run.memory_gb(config, a, images, is_bf16=False)["activations"] * 1e9
    assert counted == pytest.approx(sum(kept.values()), rel=0.25)


def test_recomputing_activations_saves_memory_and_more_images_need_more():
    a = architecture_of("vit_base")
    plain = load_config("vitb16_stage1")
    saving = load_config("vitb16_stage1", ["engine.activation_checkpointing=true"])
    one, two = (dry_run.memory_gb(plain, a, n, is_bf16=True) for n in (16, 32))
    assert two["activations"] == pytest.approx(2 * one["activations"])
    assert two["logits"] == pytest.approx(2 * one["logits"])
    of_saving = dry_run.memory_gb(saving, a, 16, is_bf16=True)
    assert of_saving["activations"] < 0.3 * one["activations"]
    assert one["networks"] == two["networks"] == of_saving["networks"]
