"""The ViT: recorded features of the original, rotary embedding, sizes, drop path, checkpointing."""

import inspect
import math

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from nnunetv2_meddinov3.models import backbone as backbone_module
from nnunetv2_meddinov3.models import load_backbone, save_backbone
from nnunetv2_meddinov3.models.architecture import (
    SIZES,
    Architecture,
    architecture_of,
    default_layers,
    differences,
)
from nnunetv2_meddinov3.models.backbone import Backbone, rotary_embedding

TOLERANCE = 3e-6
VITS = ["vit_lvd", "vit_meddinov3", "vit_swiglu"]
# parameters of the original implementation at these sizes, buffers left out
PUBLISHED = {
    "vit_small": 21_601_152,
    "vit_small_plus": 28_697_472,
    "vit_base": 85_669_632,
    "vit_large": 303_154_176,
    "vit_huge_plus": 840_633_600,
    "vit_7b": 6_716_043_264,
}


def tiny(**changes):
    drop_path = changes.pop("drop_path", 0.0)
    checkpointing = changes.pop("activation_checkpointing", False)
    architecture = Architecture(
        **{"embed_dim": 32, "depth": 2, "num_heads": 2, "layer_scale": 0.5, **changes}
    )
    return Backbone(architecture, drop_path=drop_path, activation_checkpointing=checkpointing)


def _errors(backbone, recorded, layers):
    """The largest deviation relative to the largest value, of every recorded tensor."""
    with torch.no_grad():
        tokens = backbone.eval().intermediate_tokens(recorded["input"], layers)
        maps = backbone.intermediate_features(recorded["input"], layers)
    errors = {}
    for i, (t, features) in enumerate(zip(tokens, maps, strict=True)):
        ours = {"cls": t.cls, "storage": t.registers, "patch": features}
        for name, value in ours.items():
            theirs = recorded[f"layer{layers[i]}.{name}"]
            assert value.shape == theirs.shape
            error = (value - theirs).abs().max() / theirs.abs().max()
            errors[f"layer{layers[i]}.{name}"] = error.item()
    return errors


@pytest.mark.parametrize("case", VITS)
def test_features_are_those_of_the_original(case, golden):
    backbone = load_backbone(golden.path(case), norm_eps=golden.norm_eps(case))
    fields = golden.cases[case]["vit"]
    assert backbone.embed_dim == fields["embed_dim"]
    assert backbone.depth == fields["depth"]
    assert backbone.architecture.num_heads == fields["num_heads"]
    errors = _errors(backbone, golden.recorded(case), golden.cases[case]["layers"])
    assert len(errors) == 3 * fields["depth"]
    assert max(errors.values()) < TOLERANCE


@pytest.mark.parametrize("case", VITS)
def test_the_other_epsilon_misses_the_features_of_the_original(case, golden):
    other = {1e-5: 1e-6, 1e-6: 1e-5}[golden.norm_eps(case)]
    backbone = load_backbone(golden.path(case), norm_eps=other)
    errors = _errors(backbone, golden.recorded(case), golden.cases[case]["layers"])
    assert min(errors.values()) > TOLERANCE


@pytest.mark.parametrize("beside", [{}, {"teacher.dino_head.mlp.0.weight": torch.zeros(4, 32)}])
def test_the_released_form_gets_its_epsilon_unasked(beside, golden, tmp_path):
    weights = golden.weights("vit_meddinov3")
    teacher = {f"backbone.{key}": tensor for key, tensor in weights.items()}
    teacher |= {key.removeprefix("teacher."): tensor for key, tensor in beside.items()}
    torch.save({"teacher": teacher, "iteration": 99_999}, tmp_path / "model.pth")
    backbone = load_backbone(tmp_path / "model.pth")
    assert backbone.architecture.norm_eps == 1e-6
    errors = _errors(backbone, golden.recorded("vit_meddinov3"), [0, 1, 2, 3])
    assert max(errors.values()) < TOLERANCE


def test_the_hub_form_gets_its_epsilon_unasked(golden):
    backbone = load_backbone(golden.path("vit_lvd"))
    assert max(_errors(backbone, golden.recorded("vit_lvd"), [0, 1, 2, 3]).values()) < TOLERANCE


def _by_hand(periods, h, w):
    """Sines and cosines of each patch, one number at a time."""
    rows = []
    for i in range(h):
        for j in range(w):
            y, x = 2 * (i + 0.5) / h - 1, 2 * (j + 0.5) / w - 1
            angles = [2 * math.pi * c / p for c in (y, x) for p in periods]
            angles = angles + angles
            rows.append([math.sin(a) for a in angles] + [math.cos(a) for a in angles])
    return torch.tensor(rows)


def test_the_rotary_embedding_is_the_formula():
    periods = [100 ** (k / 4) for k in range(4)]
    embedding = rotary_embedding(torch.tensor(periods), (3, 5), torch.float32)
    assert embedding.shape == (15, 32)
    torch.testing.assert_close(embedding, _by_hand(periods, 3, 5), rtol=0, atol=1e-5)


def test_periods_are_the_formula_and_travel_with_the_weights(state_dicts, tmp_path):
    backbone = tiny(embed_dim=64, num_heads=2)
    expected = torch.tensor([100 ** (4 * k / 32) for k in range(8)])
    key = "vit.rope.periods"
    torch.testing.assert_close(backbone.state_dict()[key], expected, rtol=1e-6, atol=0)
    backbone.vit.rope.periods.mul_(1.5)
    before = state_dicts.features(backbone)
    save_backbone(backbone, tmp_path / "own.safetensors", licence="CC0")
    loaded = load_backbone(tmp_path / "own.safetensors")
    assert torch.equal(loaded.state_dict()[key], 1.5 * tiny(embed_dim=64).state_dict()[key])
    assert torch.equal(state_dicts.features(loaded), before)


def _attention_by_hand(attention, x, periods, grid, dtype):
    """One attention layer with queries and keys rounded to ``dtype`` and rotated in it."""
    heads, prefix = attention.num_heads, 5
    bias = torch.cat([attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias])
    q, k, v = F.linear(x, attention.qkv.weight, bias).chunk(3, dim=-1)
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    axes = [2 * (torch.arange(n, dtype=dtype) + 0.5).div(n) - 1 for n in grid]
    y, x_ = torch.meshgrid(*axes, indexing="ij")
    angles = torch.cat(
        [2 * math.pi * c.reshape(-1, 1) / periods.to(dtype)[None] for c in (y, x_)], dim=1
    )
    sin, cos = (torch.cat([f(angles)] * 2, dim=1) for f in (torch.sin, torch.cos))

    def rotate(t):
        t = t.to(dtype)
        patches = t[:, :, prefix:]
        first, second = patches.chunk(2, dim=-1)
        turned = patches * cos + torch.cat([-second, first], dim=-1) * sin
        return torch.cat([t[:, :, :prefix], turned], dim=2).float()

    q, k = rotate(q), rotate(k)
    weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(dim=-1)
    return attention.proj((weights @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_queries_and_keys_are_rotated_in_the_given_type(name, dtype, state_dicts):
    """As in the original, every query and key is rounded, those of the prefix included."""
    backbone = state_dicts.random_backbone(embed_dim=32, rope_dtype=name)
    block = backbone.vit.blocks[0]
    x = torch.randn(2, 5 + 12, 32)
    periods = backbone.vit.rope.periods
    with torch.no_grad():
        ours = block.attn(x, rope=rotary_embedding(periods, (3, 4), dtype))
        by_hand = _attention_by_hand(block.attn, x, periods, (3, 4), dtype)
    torch.testing.assert_close(ours, by_hand, rtol=1e-5, atol=1e-5)


def test_bf16_rotation_is_close_to_fp32_and_not_the_same(state_dicts):
    fp32 = state_dicts.random_backbone(embed_dim=32)
    bf16 = state_dicts.random_backbone(embed_dim=32, rope_dtype="bf16")
    one, other = state_dicts.features(fp32), state_dicts.features(bf16)
    error = ((one - other).abs().max() / one.abs().max()).item()
    assert 1e-4 < error < 0.2


@pytest.mark.parametrize("size", [(16, 16), (16, 48), (64, 32), (80, 48)])
def test_any_size_of_whole_patches_is_accepted(size):
    backbone = tiny().eval()
    images = torch.randn(1, 3, *size)
    (features,) = backbone.intermediate_features(images, [1])
    assert features.shape == (1, 32, size[0] // 16, size[1] // 16)
    assert features.is_contiguous()
    (tokens,) = backbone.intermediate_tokens(images, [1])
    assert torch.equal(features.flatten(2).transpose(1, 2), tokens.patches)
    assert tokens.cls.shape == (1, 32)
    assert tokens.registers.shape == (1, 4, 32)


@pytest.mark.parametrize(
    "shape",
    [
        (1, 3, 40, 48),
        (1, 3, 48, 40),
        (1, 1, 48, 48),
        (3, 48, 48),
        (48,),
        (1, 3, 4, 48, 48),
        (1, 3, 0, 48),
        (1, 3, 8, 8),
    ],
)
@pytest.mark.parametrize("method", ["intermediate_features", "intermediate_tokens"])
def test_wrong_images_are_refused_in_one_sentence(shape, method):
    function = inspect.unwrap(getattr(Backbone, method))  # users run without the checks of shapes
    with pytest.raises(ValueError, match=r"^images must be \(B, 3, H, W\) .*multiples of 16.*$"):
        function(tiny(), torch.zeros(shape), [1])


@pytest.mark.parametrize("layers", [[], [2], [-1], [1, 0], [0, 0], [0, 5]])
def test_wrong_layers_are_refused(layers):
    with pytest.raises(ValueError, match="layers must be block indices from 0 to 1"):
        tiny().intermediate_features(torch.zeros(1, 3, 16, 16), layers)


def test_features_of_one_layer_do_not_depend_on_the_others_asked_for():
    backbone, images = tiny(depth=3).eval(), torch.randn(1, 3, 32, 32)
    together = backbone.intermediate_features(images, [0, 1, 2])
    for i in range(3):
        assert torch.equal(backbone.intermediate_features(images, [i])[0], together[i])


def test_default_layers_end_every_quarter():
    assert default_layers(12) == [2, 5, 8, 11]
    assert default_layers(24) == [5, 11, 17, 23]
    assert default_layers(40) == [9, 19, 29, 39]
    assert default_layers(4) == [0, 1, 2, 3]
    assert default_layers(2) == [0, 1]
    assert default_layers(1) == [0]


def _residuals(backbone, images):
    """How each sample's tokens differ from those of the network with every branch dropped."""
    with torch.no_grad():
        patches = backbone.vit.patch_embed(images).flatten(1, 2)
        x = backbone._with_prefix(patches)
        embedding = rotary_embedding(backbone.vit.rope.periods, (1, 1), torch.float32)
        return [block(x, embedding) - x for block in backbone.vit.blocks]


def test_drop_path_drops_samples_not_batches():
    torch.manual_seed(0)
    backbone = tiny(drop_path=0.5, depth=1).train()
    one = torch.randn(1, 3, 16, 16).expand(400, -1, -1, -1)
    with torch.no_grad():
        (tokens,) = backbone.intermediate_tokens(one, [0])
    kinds, counts = torch.unique(tokens.cls, dim=0, return_counts=True)
    assert len(kinds) == 4  # both branches, either, none; all samples of the batch are the same
    assert counts.min() > 60
    assert counts.max() < 140


def test_drop_path_is_uniform_over_depth_and_keeps_the_mean():
    torch.manual_seed(1)
    rate, backbone = 0.4, tiny(drop_path=0.4, depth=6).train()
    images = torch.randn(1, 3, 16, 16).expand(500, -1, -1, -1)
    for residual in _residuals(backbone, images):
        # the attention branch of a sample is dropped together with nothing else
        dropped = (residual.flatten(1).abs().amax(1) == 0).float().mean()
        assert abs(dropped - rate**2) < 0.06
    single = tiny(drop_path=0.4, depth=1).train()
    whole = _residuals(single.eval(), images[:1])[0]
    single.train()
    single.vit.blocks[0].drop_path2 = torch.nn.Identity()
    single.vit.blocks[0].gamma_2.data.zero_()
    alone = _residuals(single, images)[0]
    kept = alone.flatten(1).abs().amax(1) > 0
    single.eval()
    expected = _residuals(single, images[:1])[0] / (1 - rate)
    torch.testing.assert_close(alone[kept], expected.expand(int(kept.sum()), -1, -1))
    assert abs(kept.float().mean() - (1 - rate)) < 0.08
    assert whole.abs().max() > 0


def test_drop_path_rests_in_evaluation():
    plain, dropping = tiny(), tiny(drop_path=0.9)
    dropping.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 32, 32)
    ours = dropping.eval().intermediate_features(images, [0, 1])
    for one, other in zip(ours, plain.eval().intermediate_features(images, [0, 1]), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("rate", [-0.1, 1, 1.5])
def test_an_impossible_drop_path_is_refused(rate):
    with pytest.raises(ValueError, match="drop_path"):
        tiny(drop_path=rate)


def _step(backbone, images):
    """Gradients of a step, the bytes saved for it, and how often the first block ran."""
    saved, runs = {}, []

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    backbone.vit.blocks[0].mlp.fc1.register_forward_hook(lambda *_: runs.append(1))
    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features = backbone.train().intermediate_features(images, [0, 2])
        loss = sum(f.pow(2).sum() for f in features)
    loss.backward()
    return [p.grad for p in backbone.parameters()], sum(saved.values()), len(runs)


@pytest.mark.parametrize("drop_path", [0.0, 0.3])
def test_activation_checkpointing_changes_memory_and_nothing_else(drop_path):
    torch.manual_seed(2)
    plain = tiny(depth=3, drop_path=drop_path)
    recomputing = tiny(depth=3, drop_path=drop_path, activation_checkpointing=True)
    recomputing.load_state_dict(plain.state_dict())
    images = torch.randn(4, 3, 64, 64)
    one, bytes_plain, runs_plain = _step(plain, images)
    other, bytes_recomputing, runs_recomputing = _step(recomputing, images)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b)
    assert (runs_plain, runs_recomputing) == (1, 2)
    assert bytes_recomputing < bytes_plain / 2


def test_activation_checkpointing_costs_nothing_in_prediction(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("nothing is recomputed without gradients")

    monkeypatch.setattr(backbone_module, "checkpoint", refuse)
    backbone = tiny(activation_checkpointing=True).eval()
    with torch.no_grad():
        backbone.intermediate_features(torch.zeros(1, 3, 16, 16), [1])
    with pytest.raises(AssertionError, match="nothing is recomputed"):
        backbone.intermediate_features(torch.zeros(1, 3, 16, 16), [1])


@pytest.mark.parametrize("size", list(PUBLISHED))
def test_published_sizes_have_the_published_parameters(size):
    """Meta counts a mask token, the masked key biases, and the 7B's second norm for local crops."""
    architecture = SIZES[size]
    with torch.device("meta"):
        backbone = Backbone(architecture, mask_token=True).to("meta")  # timm's periods too
        (features,) = backbone.intermediate_features(
            torch.empty(2, 3, 32, 48), [architecture.depth - 1]
        )
    ours = sum(p.numel() for p in backbone.parameters())
    key_biases = architecture.depth * architecture.embed_dim * architecture.qkv_bias
    local_norm = 2 * architecture.embed_dim if size == "vit_7b" else 0
    assert ours + key_biases + local_norm == PUBLISHED[size]
    assert features.shape == (2, architecture.embed_dim, 2, 3)


def test_sizes_have_the_head_widths_of_the_published_models():
    widths = {name: a.embed_dim // a.num_heads for name, a in SIZES.items()}
    assert widths == dict.fromkeys(SIZES, 64) | {"vit_7b": 128}


def test_an_unknown_size_or_field_is_refused():
    with pytest.raises(ValueError, match=r"vit_tiny, .*got 'vit_giant'"):
        architecture_of("vit_giant")
    with pytest.raises(ValueError, match="colour"):
        architecture_of("vit_tiny", colour="red")
    assert architecture_of("vit_tiny", norm_eps=1e-6).norm_eps == 1e-6


@pytest.mark.parametrize(
    "fields",
    [
        {"num_heads": 3},
        {"num_heads": 0},
        {"embed_dim": 36},
        {"depth": 0},
        {"depth": 2.0},
        {"ffn": "moe"},
        {"ffn_hidden": -4},
        {"rope_dtype": "fp16"},
        {"norm_eps": 0},
        {"norm_eps": "1e-5"},
        {"num_registers": -1},
        {"patch_size": 0},
        {"input_channels": 0},
    ],
)
def test_impossible_architectures_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        Architecture(**{"embed_dim": 32, "depth": 2, "num_heads": 2, **fields})


def test_differences_give_both_values_of_every_field_or_of_chosen_ones():
    small, base = architecture_of("vit_small", norm_eps=1e-6), SIZES["vit_base"]
    assert differences(base, base) == {}
    assert differences(small, base) == {
        "embed_dim": (384, 768),
        "num_heads": (6, 12),
        "ffn_hidden": (1536, 3072),
        "norm_eps": (1e-6, 1e-5),
    }
    assert differences(small, base, ("depth", "norm_eps")) == {"norm_eps": (1e-6, 1e-5)}


def test_fresh_weights_are_drawn_as_in_the_original():
    torch.manual_seed(3)
    backbone = tiny(embed_dim=128, num_heads=2, layer_scale=1e-5)
    tensors = {n.removeprefix("vit."): p for n, p in backbone.named_parameters()}
    for name, p in tensors.items():
        if name.endswith(("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")):
            bound = 1 / math.sqrt(3 * 256)
            expected = bound / math.sqrt(3) if "patch_embed" in name else 0.02
            assert abs(p.std() / expected - 1) < 0.05, name
        elif "gamma" in name:
            assert (p == 1e-5).all()
        elif "norm" in name:
            assert (p == (1 if "weight" in name else 0)).all()
        elif name in ("cls_token", "reg_token"):
            assert 0.01 < p.std() < 0.03
        elif name != "patch_embed.proj.bias":
            assert name.endswith("bias")
            assert (p == 0).all()


@pytest.mark.parametrize("bias", ["", "_qkvb"])
def test_timms_own_model_with_the_same_weights_gives_the_same_bits(bias, tmp_path):
    torch.manual_seed(4)
    theirs = timm.create_model(f"vit_small_patch16_dinov3{bias}", depth=3, num_classes=0).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    save_file(theirs.state_dict(), tmp_path / "timm.safetensors")
    ours = load_backbone(tmp_path / "timm.safetensors").eval()
    assert ours.architecture.qkv_bias is bool(bias)
    images = torch.randn(2, 3, 48, 32)
    with torch.no_grad():
        maps = theirs.forward_intermediates(
            images, indices=[0, 1, 2], norm=True, intermediates_only=True
        )
        for one, other in zip(ours.intermediate_features(images, [0, 1, 2]), maps, strict=True):
            assert torch.equal(one, other)
        (tokens,) = ours.intermediate_tokens(images, [2])
        assert torch.equal(tokens.cls, theirs.forward_features(images)[:, 0])
