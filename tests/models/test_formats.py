"""Every format in, with every key accounted for."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nnunetv2_meddinov3.models import build_segmenter, load_backbone, save_backbone
from nnunetv2_meddinov3.models.architecture import architecture_of
from nnunetv2_meddinov3.models.backbone import Backbone
from nnunetv2_meddinov3.models.formats import Parsed, parse_state_dict
from nnunetv2_meddinov3.models.weights import (
    checkpoint_from,
    infer_architecture,
    read_checkpoint,
)

GOLDEN = Path(__file__).parents[1] / "golden"
NAMINGS = [
    ("hub", "mlp"),
    ("hub", "swiglu"),
    ("release", "mlp"),
    ("timm", "mlp"),
    ("timm", "swiglu"),
    ("huggingface early", "mlp"),
    ("huggingface late", "swiglu"),
]
# a file without these is a whole one; registers are missed where a config.json counts them
OPTIONAL = r"mask_token|bias_mask|register_tokens|reg_token|storage_tokens|local_cls_norm"
SECOND_BLOCK = r"(blocks|layer)\.1\."  # as good as the first, for tests of every key


@pytest.mark.parametrize("kind", ["mlp", "swiglu"])
def test_every_format_gives_the_source_backbone(checkpoint_format, kind, tmp_path, state_dicts):
    source = checkpoint_format.backbone(kind)
    path = checkpoint_format.write(checkpoint_format.keys(source), tmp_path)
    loaded = load_backbone(path)
    assert loaded.architecture.norm_eps == checkpoint_format.norm_eps
    assert torch.equal(state_dicts.features(loaded), state_dicts.features(source))


def test_the_name_of_a_file_does_not_matter(state_dicts, tmp_path):
    source = state_dicts.random_backbone()
    for write in (state_dicts.write_pth, state_dicts.write_safetensors):
        path = write(state_dicts.meta(source), tmp_path)
        for name in ("model.pth", "model.safetensors", "model.bin", "model"):
            path = path.rename(tmp_path / name)
            loaded = load_backbone(path)
            assert torch.equal(state_dicts.features(loaded), state_dicts.features(source))
        path.unlink()


def test_formats_with_periods_need_no_usual_head_width(state_dicts, tmp_path):
    source = state_dicts.random_backbone(num_heads=8)
    loaded = load_backbone(state_dicts.write_pth(state_dicts.meta(source), tmp_path))
    assert loaded.architecture.num_heads == 8
    assert torch.equal(state_dicts.features(loaded), state_dicts.features(source))


@pytest.mark.parametrize("kind", ["mlp", "swiglu"])
def test_our_own_file_keeps_everything(kind, state_dicts, tmp_path):
    fields = {"num_heads": 8, "norm_eps": 2e-4, "rope_dtype": "bf16", "input_channels": 1}
    source = state_dicts.random_backbone(**fields, **state_dicts.KINDS[kind])
    path = tmp_path / "ours.safetensors"
    save_backbone(source, path, licence="CC0", intensity={"window_hu": [-150, 250]}, step=3)
    loaded, checkpoint = load_backbone(path), read_checkpoint(path)
    assert loaded.architecture == source.architecture
    assert torch.equal(state_dicts.features(loaded), state_dicts.features(source))
    assert torch.equal(loaded.mask_token, source.mask_token)
    assert checkpoint.licence == "CC0"
    assert checkpoint.metadata["intensity"] == {"window_hu": [-150, 250]}
    assert checkpoint.metadata["step"] == 3


@pytest.mark.parametrize("kind", ["mlp", "swiglu"])
def test_a_bare_network_without_registers_biases_and_layer_scale_survives_saving(
    kind, state_dicts, tmp_path
):
    bare = {"num_registers": 0, "layer_scale": None, "qkv_bias": False}
    source = state_dicts.random_backbone(**{**state_dicts.KINDS[kind], **bare})
    save_backbone(source, tmp_path / "bare.safetensors", licence="CC0")
    loaded = load_backbone(tmp_path / "bare.safetensors")
    assert torch.equal(state_dicts.features(loaded), state_dicts.features(source))


def test_what_was_loaded_can_be_saved_again(checkpoint_format, state_dicts, tmp_path):
    source = checkpoint_format.backbone()
    path = checkpoint_format.write(checkpoint_format.keys(source), tmp_path)
    save_backbone(load_backbone(path), tmp_path / "again.safetensors", licence="CC0")
    again = load_backbone(tmp_path / "again.safetensors")
    assert torch.equal(state_dicts.features(again), state_dicts.features(source))


def test_tensors_that_share_memory_can_be_saved(state_dicts, tmp_path, mistake):
    content = state_dicts.meta(state_dicts.random_backbone())
    flat = torch.cat([t.flatten() for t in content.values()])
    pieces = flat.split([t.numel() for t in content.values()])
    content = {k: p.view(t.shape) for (k, t), p in zip(content.items(), pieces, strict=True)}
    content["blocks.0.ls2.gamma"] = content["blocks.0.ls1.gamma"]
    content["norm.bias"] = torch.zeros(1).expand(128)
    loaded = load_backbone(state_dicts.write_pth(content, tmp_path))
    save_backbone(loaded, tmp_path / "saved.safetensors", licence="CC0")
    again = load_backbone(tmp_path / "saved.safetensors")
    assert torch.equal(state_dicts.features(again), state_dicts.features(loaded))


def test_branches_of_a_training_checkpoint_are_chosen_by_name(state_dicts, tmp_path, mistake):
    source = state_dicts.random_backbone(norm_eps=1e-6)
    path = state_dicts.write_pth(state_dicts.training(source), tmp_path, 1)
    fields = source.architecture.to_dict()
    for branch, seed in (("student", 7), ("gram_teacher", 8)):
        other = state_dicts.random_backbone(seed, **fields)
        loaded = load_backbone(path, branch=branch)
        assert torch.equal(state_dicts.features(loaded), state_dicts.features(other))
    message = mistake(load_backbone, path, branch="tutor")
    assert "'tutor'" in message
    assert "student.backbone." in message


def test_the_averaged_copy_of_a_training_checkpoint_wins(state_dicts, tmp_path):
    """The original stores its EMA twice, as ``teacher`` and as ``model_ema``."""
    source = state_dicts.random_backbone(norm_eps=1e-6)
    content = state_dicts.training(source)
    content |= state_dicts.meta(source, "model_ema.backbone.")
    loaded = load_backbone(state_dicts.write_pth(content, tmp_path, 2))
    assert torch.equal(state_dicts.features(loaded), state_dicts.features(source))


def test_two_backbones_without_a_teacher_are_not_guessed_between(state_dicts, tmp_path, mistake):
    source = state_dicts.random_backbone()
    content = state_dicts.meta(source, "one.") | state_dicts.meta(source, "two.")
    message = mistake(load_backbone, state_dicts.write_pth(content, tmp_path))
    assert "several" in message
    assert "one." in message
    assert "two." in message


def test_a_branch_of_a_file_with_one_nameless_backbone_is_refused(state_dicts, tmp_path, mistake):
    path = state_dicts.write_pth(state_dicts.meta(state_dicts.random_backbone()), tmp_path)
    message = mistake(load_backbone, path, branch="teacher")
    assert "'teacher'" in message
    assert not message.endswith("holds .")


@pytest.mark.parametrize(("width", "heads"), [(64, 1), (128, 2), (192, 3)])
def test_without_periods_heads_are_64_wide(width, heads, state_dicts, tmp_path):
    source = state_dicts.random_backbone(embed_dim=width, num_heads=heads, periods=False)
    loaded = load_backbone(state_dicts.write_safetensors(state_dicts.timm(source), tmp_path))
    assert loaded.architecture.num_heads == heads
    assert torch.equal(state_dicts.features(loaded), state_dicts.features(source))


def test_without_periods_heads_of_the_7b_are_128_wide(state_dicts):
    with torch.device("meta"):
        tensors = {
            "cls_token": torch.empty(1, 1, 4096),
            "patch_embed.proj.weight": torch.empty(4096, 3, 16, 16),
            "blocks.0.mlp.fc1_g.weight": torch.empty(8192, 4096),
            "blocks.0.norm1.weight": torch.empty(4096),
        }
    found = infer_architecture(Parsed(tensors, "timm", ""), "it", {}, {}, {})
    assert found.num_heads == 32


def test_given_heads_go_before_the_default(state_dicts, tmp_path):
    source = state_dicts.random_backbone(num_heads=4, periods=False)
    path = state_dicts.write_safetensors(state_dicts.timm(source), tmp_path)
    loaded = load_backbone(path, num_heads=4)
    assert torch.equal(state_dicts.features(loaded), state_dicts.features(source))
    assert not torch.equal(state_dicts.features(load_backbone(path)), state_dicts.features(source))


@pytest.mark.parametrize(
    "config", ["{", "[]", '{"model_type": "bert", "num_attention_heads": 8}', "\udcff"]
)
def test_a_config_that_is_not_a_dinov3_vits_is_ignored(config, state_dicts, tmp_path):
    source = state_dicts.random_backbone(periods=False)
    (tmp_path / "config.json").write_bytes(config.encode(errors="surrogateescape"))
    path = state_dicts.write_safetensors(state_dicts.huggingface(source, "late"), tmp_path)
    assert load_backbone(path).architecture.num_heads == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_point_type_becomes_fp32(dtype, state_dicts, tmp_path):
    source = state_dicts.random_backbone().to(dtype).float()
    content = {k: t.to(dtype) for k, t in state_dicts.meta(source).items()}
    loaded = load_backbone(state_dicts.write_pth(content, tmp_path))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(state_dicts.features(loaded), state_dicts.features(source))


def test_a_key_bias_is_refused_unless_it_is_masked_or_zero(state_dicts, tmp_path, mistake):
    source = state_dicts.random_backbone()
    content = state_dicts.meta(source)
    content = {k: t for k, t in content.items() if "bias_mask" not in k}
    assert "bias" in mistake(load_backbone, state_dicts.write_pth(content, tmp_path))
    for key in [k for k in content if k.endswith("qkv.bias")]:
        content[key][128:256] = 0
    loaded = load_backbone(state_dicts.write_pth(content, tmp_path))
    assert torch.equal(state_dicts.features(loaded), state_dicts.features(source))

    content = state_dicts.huggingface(state_dicts.random_backbone(periods=False), "late")
    content["layer.1.attention.k_proj.bias"] = torch.ones(128)
    path = state_dicts.write_safetensors(content, tmp_path)
    assert "block 1" in mistake(load_backbone, path)


def _small(state_dicts, name, **fields):
    fmt = state_dicts.FORMATS[name]
    heads = 4 if fmt.num_heads == 4 else 1
    source = fmt.backbone(embed_dim=64, num_heads=heads, **{"ffn_hidden": 48, **fields})
    return fmt, fmt.keys(source)


def _canonical_name(key):
    """The last parts of our name of a file's key, or of what it becomes part of."""
    pairs = {
        r".*(storage_tokens|register_tokens)": "reg_token",
        r".*attention\.(query|key|value|[qkv]_proj)\.weight": "attn.qkv.weight",
        r".*qkv\.bias": "q_bias",
        r".*(query|q_proj)\.bias": "q_bias",
        r".*(value|v_proj)\.bias": "v_bias",
        r".*(ls|layer_scale)([12])\.\w+": r"gamma_\2",
        r".*mlp\..*": "mlp",
        r".*(periods|cls_token|norm[12]?\.\w+)": r"\1",
        r".*patch_embeddings\.(?:proj\.)?(\w+)": r"patch_embed.proj.\1",
        r".*o_proj\.(\w+)": r"attn.proj.\1",
    }
    for pattern, name in pairs.items():
        if match := re.fullmatch(pattern, key):
            return match.expand(name)
    return ".".join(key.split(".")[-2:])


@pytest.mark.parametrize(("name", "kind"), NAMINGS)
def test_every_single_missing_key_is_named(name, kind, state_dicts, tmp_path, mistake):
    fmt, whole = _small(state_dicts, name, **state_dicts.KINDS[kind])
    for key in whole:
        if re.search(f"{OPTIONAL}|{SECOND_BLOCK}", key):
            continue
        content = {k: t for k, t in whole.items() if k != key}
        message = mistake(load_backbone, fmt.write(content, tmp_path))
        assert _canonical_name(key) in message, (key, message)


def _tested(content, ending):
    """The key of the backbone that is loaded by default."""
    others = ("student", "gram_teacher")
    return next(k for k in content if k.endswith(ending) and not k.startswith(others))


def test_one_missing_key_is_named(checkpoint_format, tmp_path, mistake):
    content = checkpoint_format.keys(checkpoint_format.backbone())
    del content[_tested(content, "1.norm2.weight")]
    message = mistake(load_backbone, checkpoint_format.write(content, tmp_path))
    assert "blocks.1.norm2.weight" in message


@pytest.mark.parametrize("unknown", ["pos_embed", "norm.scale", "block.0.attn.q_norm.weight"])
def test_one_unknown_key_is_named(checkpoint_format, unknown, tmp_path, mistake):
    content = checkpoint_format.keys(checkpoint_format.backbone())
    key = _tested(content, "cls_token").replace("cls_token", unknown)
    content[key] = torch.zeros(128)
    message = mistake(load_backbone, checkpoint_format.write(content, tmp_path))
    assert unknown in message


def test_an_unknown_key_beside_the_chosen_backbone_is_named(state_dicts, tmp_path, mistake):
    source = state_dicts.random_backbone()
    content = state_dicts.meta(source, "teacher.backbone.") | {"teacher.neck.x": torch.zeros(3)}
    assert "teacher.neck.x" in mistake(load_backbone, state_dicts.write_pth(content, tmp_path))


def test_of_many_unknown_keys_the_first_five_are_listed(state_dicts, tmp_path, mistake):
    content = state_dicts.meta(state_dicts.random_backbone())
    content |= {f"extra_{i}": torch.zeros(1) for i in range(9)}
    message = mistake(load_backbone, state_dicts.write_pth(content, tmp_path))
    assert "9" in message
    assert "extra_4" in message
    assert "extra_5" not in message


def test_what_is_left_out_is_listed(state_dicts, tmp_path):
    source = state_dicts.random_backbone()
    content = state_dicts.meta(source, local_norm=True)
    checkpoint = read_checkpoint(state_dicts.write_pth(content, tmp_path))
    expected = {k for k in content if "bias_mask" in k or "local_cls_norm" in k}
    assert set(checkpoint.dropped) == expected
    assert f"{len(expected)} left out" in checkpoint.report()
    content = state_dicts.training(source)
    checkpoint = read_checkpoint(state_dicts.write_pth(content, tmp_path, 1))
    kept = {k for k in content if k.startswith("teacher.backbone.") and "bias_mask" not in k}
    assert set(checkpoint.dropped) == set(content) - kept


def test_a_register_count_in_a_config_is_held_to(state_dicts, tmp_path, mistake):
    content = state_dicts.huggingface(state_dicts.random_backbone(num_heads=4), "late")
    del content["embeddings.register_tokens"]
    path = state_dicts.write_huggingface(content, tmp_path)
    config = json.loads((path / "config.json").read_text()) | {"num_register_tokens": 4}
    (path / "config.json").write_text(json.dumps(config))
    assert "reg_token" in mistake(load_backbone, path)


def _wrong_shapes(tensor):
    yield tensor[..., :-1]
    yield tensor[..., :0]
    yield tensor.flatten()[0]
    yield tensor[None, None, None]
    reversed_axes = tensor.permute(*range(tensor.ndim)[::-1])
    if tensor.shape != reversed_axes.shape:
        yield reversed_axes


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), NAMINGS)
def test_no_wrong_shape_gets_through(name, kind, state_dicts, mistake):
    _, whole = _small(state_dicts, name, **state_dicts.KINDS[kind])

    def read(content):
        return checkpoint_from(parse_state_dict(content, "the file"), "the file")

    heads = {"num_heads": 4} if "hugging" in name else {}
    checkpoint_from(parse_state_dict(whole, "the file"), "the file", **heads)
    for key, tensor in whole.items():
        if re.search(f"bias_mask|local_cls_norm|{SECOND_BLOCK}", key):
            continue
        for wrong in _wrong_shapes(tensor):
            mistake(read, {**whole, key: wrong})


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_are_named(checkpoint_format, value, tmp_path, mistake):
    content = checkpoint_format.keys(checkpoint_format.backbone())
    content[_tested(content, "1.norm2.weight")][5] = value
    message = mistake(load_backbone, checkpoint_format.write(content, tmp_path))
    assert "blocks.1.norm2.weight" in message
    assert "NaN" in message


@pytest.mark.parametrize(
    "strange",
    [
        torch.zeros(128, dtype=torch.int32),
        torch.zeros(128, dtype=torch.complex64),
        torch.zeros(128).to_sparse(),
        torch.empty(128, device="meta"),
        torch.zeros(128, dtype=torch.bool),
    ],
)
def test_tensors_that_are_no_plain_numbers_are_refused(strange, state_dicts, tmp_path, mistake):
    content = state_dicts.meta(state_dicts.random_backbone())
    content["blocks.1.norm2.weight"] = strange
    path = state_dicts.write_pth(content, tmp_path)
    assert "norm2.weight" in mistake(load_backbone, path)


def test_a_gap_in_the_blocks_is_refused_at_once(state_dicts, tmp_path, mistake):
    content = state_dicts.meta(state_dicts.random_backbone())
    content = {k.replace("blocks.1.", "blocks.123456789."): t for k, t in content.items()}
    message = mistake(load_backbone, state_dicts.write_pth(content, tmp_path))
    assert "blocks.1." in message


@pytest.mark.parametrize(
    "keys",
    [
        ["downsample_layers.0.0.weight", "stages.0.0.dwconv.weight", "stages.0.0.norm.weight"],
        ["visual.transformer.resblocks.0.ln_1.weight", "visual.class_embedding", "logit_scale"],
        ["visual.transformer.resblocks.0.norm1.weight", "visual.class_embedding"],
        ["conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "fc.weight"],
        ["encoder.layers.0.self_attention.in_proj_weight", "class_token"],
        ["blocks.0.norm1.weight", "pos_embed", "cls_token", "patch_embed.proj.weight"],
        ["layers.0.blocks.0.norm1.weight", "layers.1.blocks.0.norm1.weight", "norm.weight"],
    ],
    ids=["ConvNeXt", "CLIP", "CLIP-like", "ResNet", "torchvision", "DINOv2", "Swin"],
)
def test_other_networks_are_refused(keys, state_dicts, tmp_path, mistake):
    content = {key: torch.zeros(4, 4) for key in keys}
    path = state_dicts.write_pth(content, tmp_path)
    assert str(path) in mistake(load_backbone, path)


@pytest.mark.parametrize(
    "facts",
    [
        "[]",
        "3",
        '"text"',
        '{"architecture": []}',
        '{"architecture": {"depth": "two"}}',
        '{"architecture": {"depth": 2.5}}',
        '{"architecture": {"embed_dim": 129}}',
        '{"architecture": {"norm_eps": "small"}}',
        '{"architecture": {"norm_eps": NaN}}',
        '{"architecture": {"norm_eps": -1}}',
        '{"architecture": {"num_registers": -1}}',
        '{"architecture": {"depth": 3}}',
        '{"architecture": {"patches": 3}}',
        "{",
    ],
)
def test_nonsense_in_our_own_metadata_is_refused(facts, state_dicts, tmp_path, mistake):
    source = state_dicts.random_backbone()
    path = tmp_path / "ours.safetensors"
    save_backbone(source, path, licence="CC0")
    save_file(load_file(path), path, {"meddinov3": facts})
    assert str(path) in mistake(load_backbone, path)


@pytest.mark.parametrize("value", [0, -1e-5, float("nan"), float("inf"), "small"])
def test_an_impossible_epsilon_is_refused(value, state_dicts, tmp_path, mistake):
    path = state_dicts.write_pth(state_dicts.meta(state_dicts.random_backbone()), tmp_path)
    assert "norm_eps" in mistake(load_backbone, path, norm_eps=value)


@pytest.mark.parametrize(
    "override", [{"num_heads": 4}, {"embed_dim": 64}, {"colour": 1}, {"rope_dtype": "fp8"}]
)
def test_overrides_that_do_not_fit_are_refused(override, state_dicts, tmp_path, mistake):
    path = state_dicts.write_pth(state_dicts.meta(state_dicts.random_backbone()), tmp_path)
    mistake(load_backbone, path, **override)


def test_a_segmenter_loads_into_a_segmenter(state_dicts, tmp_path):
    source = state_dicts.random_backbone()
    network = build_segmenter(source, num_classes=3).eval()
    torch.save({"network": network.state_dict()}, tmp_path / "network.pth")
    for weights in (network.state_dict(), tmp_path / "network.pth"):
        again = build_segmenter(source, num_classes=3, weights=weights).eval()
        images = torch.randn(1, 1, 32, 32)
        assert torch.equal(again(images), network(images))


@pytest.mark.parametrize("box", ["model", "state_dict", "module"])
def test_a_hub_file_in_a_box_keeps_the_hubs_epsilon(box, tmp_path):
    hub = load_file(GOLDEN / "vit_lvd.weights.safetensors")
    torch.save({box: hub}, tmp_path / "boxed.pth")
    assert load_backbone(tmp_path / "boxed.pth").architecture.norm_eps == 1e-5
    torch.save({"teacher": {f"backbone.{k}": t for k, t in hub.items()}}, tmp_path / "run.pth")
    assert load_backbone(tmp_path / "run.pth").architecture.norm_eps == 1e-6


def test_the_base_of_rotary_periods_comes_from_a_hugging_face_config():
    backbone = Backbone(architecture_of("vit_tiny", depth=1, rope_base=50.0))
    width = backbone.embed_dim // backbone.architecture.num_heads
    expected = 50.0 ** (torch.arange(width // 4) * 4 / width)
    torch.testing.assert_close(backbone.vit.rope.periods, expected)
    state = {k.removeprefix("vit."): v for k, v in backbone.state_dict().items()}
    parsed = parse_state_dict({k: v for k, v in state.items() if "rope" not in k}, "a file")
    read = checkpoint_from(parsed, "a file", config={"rope_theta": 50.0})
    torch.testing.assert_close(read.tensors["rope.periods"], expected)


@pytest.mark.parametrize(
    ("prefix", "norm_eps"),
    [
        ("state_dict.model.", 1e-5),
        ("state_dict.backbone.", 1e-5),
        ("state_dict.model.backbone.", 1e-5),
        ("state_dict.module.model.backbone.", 1e-5),
        ("backbone.", 1e-6),
        ("state_dict.teacher.backbone.", 1e-6),
        ("model.teacher.backbone.", 1e-6),
    ],
)
def test_the_epsilon_of_a_boxed_hub_model_is_the_hubs(prefix, norm_eps, state_dicts, tmp_path):
    content = state_dicts.meta(state_dicts.random_backbone(), prefix)
    path = state_dicts.write_pth(content, tmp_path, 1)
    assert read_checkpoint(path).architecture.norm_eps == norm_eps


def test_heads_beside_a_boxed_backbone_tell_a_training_checkpoint(state_dicts, tmp_path):
    content = state_dicts.meta(state_dicts.random_backbone(), "state_dict.backbone.")
    content["state_dict.dino_head.last_layer.weight"] = torch.zeros(8, 4)
    path = state_dicts.write_pth(content, tmp_path, 1)
    assert read_checkpoint(path).architecture.norm_eps == 1e-6
