"""The segmenter: recorded logits of the reference, channels, sizes, layers, nnU-Net's builder."""

import json

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnunetv2_meddinov3.models import build_segmenter, load_backbone
from nnunetv2_meddinov3.models.build import adapt_stem, load_into, stem_channels
from nnunetv2_meddinov3.models.segmenter import Segmenter, resolve_layers

TOLERANCE = 1e-5


@pytest.fixture
def source(state_dicts):
    return state_dicts.random_backbone(embed_dim=32, depth=4)


@pytest.fixture
def tiny(source):
    """A segmenter around the small random backbone, by its constructor alone."""

    def build(input_channels=1, **changes):
        stem = stem_channels(3, input_channels)
        fields = source.architecture.to_dict() | {"input_channels": stem}
        torch.manual_seed(0)
        return Segmenter(input_channels, 2, fields, **changes)

    return build


def _golden_network(golden, case, weights):
    facts = golden.cases[case]
    return build_segmenter(
        load_backbone(golden.path(case)),
        facts.get("num_classes", 3),
        input_channels=1,
        layers=facts["layers"],
        weights=weights,
    ).eval()


def _errors(network, recorded, dtype=torch.float32):
    """How far each logit is from the recorded one, relative to the largest of these."""
    with torch.no_grad():
        logits = network.to(dtype)(recorded["input"].to(dtype))
    assert logits.shape == recorded["logits"].shape
    return (logits - recorded["logits"]).abs() / recorded["logits"].abs().max()


def _error(network, recorded):
    return _errors(network, recorded).max().item()


@pytest.mark.parametrize("form", ["dict", "path"])
def test_logits_are_those_of_the_reference(form, golden):
    case = "net_multiscale"
    weights = golden.weights(case) if form == "dict" else golden.path(case)
    network = _golden_network(golden, case, weights)
    assert _error(network, golden.recorded(case)) < TOLERANCE


@pytest.mark.parametrize("form", ["dict", "path"])
def test_logits_of_a_single_scale_are_those_of_the_reference(form, golden):
    """As good as the recording itself is, which is the same on every processor.

    Its last norm runs over two channels: where they are nearly equal, their difference is divided
    by little more than sqrt(eps) = 1e-3, so fp32's rounding (6e-8) comes out as up to 6e-5. In
    double precision nothing of ours is rounded, and what remains is the recording's own error.
    """
    case = "net_single_scale"
    weights = golden.weights(case) if form == "dict" else golden.path(case)
    network, recorded = _golden_network(golden, case, weights), golden.recorded(case)
    in_single, in_double = (_errors(network, recorded, d) for d in (torch.float32, torch.float64))
    assert in_double.max() < 3e-5
    assert in_single.max() < 1e-4
    for errors in (in_single, in_double):
        assert errors.flatten().quantile(0.99) < TOLERANCE


def test_logits_of_matrix_products_are_those_of_the_reference(golden):
    network = _golden_network(golden, "net_multiscale", golden.path("net_multiscale"))
    network.decoder.chunk = 7
    assert _error(network, golden.recorded("net_multiscale")) < TOLERANCE


def test_without_its_weights_the_reference_is_missed(golden):
    network = _golden_network(golden, "net_multiscale", None)
    assert _error(network, golden.recorded("net_multiscale")) > 100 * TOLERANCE


def test_weights_go_before_those_of_the_given_backbone(golden, state_dicts):
    other = state_dicts.random_backbone(
        9, **load_backbone(golden.path("net_multiscale")).architecture.to_dict()
    )
    network = build_segmenter(other, 5, weights=golden.weights("net_multiscale")).eval()
    assert _error(network, golden.recorded("net_multiscale")) < TOLERANCE


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_images_of_any_channel_count_are_segmented(channels, source):
    network = build_segmenter(source, 3, input_channels=channels).eval()
    images = torch.randn(2, channels, 32, 48)
    assert network(images).shape == (2, 3, 32, 48)
    stem = network.backbone.vit.patch_embed.proj.weight
    assert stem.shape[1] == (3 if channels == 1 else channels)
    if channels == 3:
        assert torch.equal(stem, source.vit.patch_embed.proj.weight)
        swapped = network(images.flip(1))
        assert not torch.allclose(swapped, network(images), atol=1e-3)


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_equal_channels_give_what_repeated_grey_gives(channels, source):
    grey = build_segmenter(source, 3).eval()
    many = build_segmenter(source, 3, input_channels=channels).eval()
    many.decoder.load_state_dict(grey.decoder.state_dict())
    image = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        one, other = grey(image), many(image.expand(-1, channels, -1, -1))
    torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-3)


def test_a_one_channel_stem_takes_one_channel_as_it_is(state_dicts):
    source = state_dicts.random_backbone(embed_dim=32, input_channels=1)
    network = build_segmenter(source, 2).eval()
    assert network.backbone.vit.patch_embed.proj.weight.shape[1] == 1
    image = torch.randn(1, 1, 32, 32)
    ours = network.backbone.intermediate_features(image, [1])[0]
    assert torch.equal(ours, source.intermediate_features(image, [1])[0])
    three = build_segmenter(source, 2, input_channels=3).eval()
    other = three.backbone.intermediate_features(image.expand(-1, 3, -1, -1), [1])[0]
    torch.testing.assert_close(other, ours, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("images", "one_hot"), [(1, 1), (1, 2), (2, 2), (3, 1), (1, 5)])
def test_one_hot_channels_of_a_cascade_start_without_effect(images, one_hot, source, tiny):
    """With one image channel and two others there are three in all, which are not RGB."""
    cascade = tiny(images + one_hot).eval()
    tensors = {n.removeprefix("vit."): t for n, t in source.state_dict().items()}
    load_into(cascade, tensors, image_channels=images)
    alone = tiny(images).eval()
    load_into(alone, tensors, image_channels=images)
    alone.decoder.load_state_dict(cascade.decoder.state_dict())
    image = torch.randn(1, images, 32, 32)
    labels = torch.randint(0, 2, (2, 1, one_hot, 32, 32)).float()
    with torch.no_grad():
        first, second = (cascade(torch.cat([image, o], dim=1)) for o in labels)
        expected = alone(image)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, expected, rtol=1e-3, atol=1e-3)
    stem = cascade.backbone.vit.patch_embed.proj.weight
    assert (stem[:, images:] == 0).all()
    assert stem[:, :images].abs().sum(dim=(0, 2, 3)).min() > 0


def test_a_stem_made_for_other_channels_keeps_its_sum():
    weight = torch.randn(8, 3, 4, 4)
    for images, wanted in ((1, 1), (1, 3), (2, 2), (4, 6), (3, 3), (3, 5)):
        made = adapt_stem(weight, images, wanted)
        assert made.shape == (8, wanted, 4, 4)
        torch.testing.assert_close(made[:, :images].sum(1), weight.sum(1))
        assert (made[:, images:] == 0).all()
    assert torch.equal(adapt_stem(weight, 3, 3), weight)


def test_three_channels_are_only_repeated_from_one():
    assert [stem_channels(3, n) for n in (1, 2, 3, 4)] == [3, 2, 3, 4]
    assert [stem_channels(1, n) for n in (1, 2, 3, 4)] == [1, 2, 3, 4]


@pytest.mark.parametrize("size", [(56, 40), (50, 35), (16, 17), (3, 5)])
def test_sizes_without_whole_patches_are_padded_with_zeros_and_cropped(size, tiny):
    network, images = tiny().eval(), torch.randn(1, 1, *size)
    height, width = (-(-n // 16) * 16 for n in size)
    padded = torch.zeros(1, 1, height, width)
    padded[..., : size[0], : size[1]] = images
    with torch.no_grad():
        logits = network(images)
        assert logits.shape == (1, 2, *size)
        assert torch.equal(logits, network(padded)[..., : size[0], : size[1]])


def test_layers_are_the_last_given_ones_or_every_quarter(tiny):
    assert tiny().layers == [0, 1, 2, 3]
    assert tiny(layers="last").layers == [3]
    assert tiny(layers=[1, 3]).layers == [1, 3]
    assert resolve_layers(None, 12) == [2, 5, 8, 11]
    assert tiny(layers="last").decoder.upsampling[0].conv.in_channels == 32
    assert tiny(layers=[1, 3]).decoder.upsampling[0].conv.in_channels == 64


def test_tokens_are_concatenated_in_depth_order(tiny):
    network, images = tiny(layers=[1, 3]).eval(), torch.randn(1, 1, 32, 48)
    seen = []
    network.decoder.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        network(images)
        maps = network.backbone.intermediate_features(images.expand(-1, 3, -1, -1), [1, 3])
    assert torch.equal(seen[0], torch.cat(maps, dim=1).flatten(2).transpose(1, 2))


@pytest.mark.parametrize("layers", [[], [4], [-1], [2, 1], [1, 1], "first"])
def test_wrong_layers_are_refused(layers, tiny, source):
    with pytest.raises(ValueError, match="layers must be block indices"):
        tiny(layers=layers)
    with pytest.raises(ValueError, match="layers must be block indices"):
        build_segmenter(source, 2, layers=layers)


def test_deep_supervision_is_refused(tiny):
    with pytest.raises(ValueError, match="deep_supervision must be False"):
        tiny(deep_supervision=True)


@pytest.mark.parametrize(("channels", "stem"), [(2, 3), (4, 3), (1, 2), (3, 1), (2, 4)])
def test_channels_that_do_not_fit_the_stem_are_refused(channels, stem, source):
    fields = source.architecture.to_dict() | {"input_channels": stem}
    with pytest.raises(ValueError, match=f"{stem} input channels"):
        Segmenter(channels, 2, fields)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layers", [None, "last", [0, 1]])
def test_every_trainable_parameter_gets_a_gradient(layers, checkpointing, tiny):
    """DDP fails on trainable parameters that take no part."""
    network = tiny(layers=layers, activation_checkpointing=checkpointing, decoder_chunk=4).train()
    network(torch.randn(2, 1, 32, 48)).square().sum().backward()
    trainable = {n: p for n, p in network.named_parameters() if p.requires_grad}
    assert [n for n, p in trainable.items() if p.grad is None] == []
    assert all(p.grad.abs().sum() > 0 for p in trainable.values())
    frozen = {n.split(".")[3] for n, p in network.named_parameters() if not p.requires_grad}
    assert frozen == ({"2", "3"} if layers == [0, 1] else set())


@pytest.mark.parametrize("layers", [None, "last", [1, 3]])
def test_plans_that_name_the_class_build_it(layers, source):
    arguments = {
        "backbone": source.architecture.to_dict(),
        "layers": layers,
        "drop_path": 0.2,
        "activation_checkpointing": True,
        "decoder_chunk": 4,
    }
    arguments = json.loads(json.dumps(arguments))
    name = f"{Segmenter.__module__}.{Segmenter.__qualname__}"
    network = get_network_from_plans(name, arguments, [], 1, 4, deep_supervision=False)
    assert isinstance(network, Segmenter)
    assert network.layers == resolve_layers(layers, 4)
    assert network.backbone.architecture == source.architecture
    assert network.backbone.vit.blocks[3].drop_path1.drop_prob == 0.2
    assert network.backbone.vit.grad_checkpointing
    assert network.decoder.chunk == 4
    assert network(torch.randn(1, 1, 40, 24)).shape == (1, 4, 40, 24)


def test_the_segmenter_has_its_own_copy_of_the_backbone(source, state_dicts):
    before = state_dicts.features(source)
    network = build_segmenter(source, 2)
    features = state_dicts.features(network.backbone)
    assert torch.equal(features, before)
    places = {p.untyped_storage().data_ptr() for p in source.parameters()}
    assert not any(p.untyped_storage().data_ptr() in places for p in network.parameters())
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert torch.equal(state_dicts.features(source), before)
    assert "mask_token" not in dict(network.backbone.named_parameters())


def test_a_state_dict_given_as_weights_is_not_changed_or_shared(golden):
    weights = golden.weights("net_multiscale")
    network = _golden_network(golden, "net_multiscale", weights)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    again = golden.weights("net_multiscale")
    assert list(weights) == list(again)
    assert all(torch.equal(weights[k], again[k]) for k in again)


def test_a_size_name_builds_fresh_weights():
    torch.manual_seed(1)
    one, other = build_segmenter("vit_tiny", 3), build_segmenter("vit_tiny", 3)
    assert one.layers == [0, 1, 2, 3]
    assert not torch.equal(one.backbone.vit.cls_token, other.backbone.vit.cls_token)
    with pytest.raises(ValueError, match="vit_giant"):
        build_segmenter("vit_giant", 3)


def test_the_last_layer_has_the_name_that_nnunet_leaves_out_of_pretrained_weights(tiny):
    names = set(tiny().state_dict())
    assert {"decoder.seg_layers.0.weight", "decoder.seg_layers.0.bias"} <= names
    assert "backbone.vit.rope.periods" in names


def _spoil(weights, way):
    name, block = "up_projection.decode.4.weight", "dino_encoder.blocks.1.norm1.weight"
    changes = {
        "decoder key missing": lambda w: w.pop(name),
        "backbone key missing": lambda w: w.pop(block),
        "other classes": lambda w: w.update({name: w[name][:-1]}),
        "decoder with NaN": lambda w: w[name].view(-1)[:1].fill_(torch.nan),
        "decoder with infinity": lambda w: w[name].view(-1)[:1].fill_(torch.inf),
        "backbone with NaN": lambda w: w[block].view(-1)[:1].fill_(torch.nan),
        "unknown decoder key": lambda w: w.update({"up_projection.extra.weight": torch.ones(2)}),
        "unknown stage": lambda w: w.update({"up_projection.decode.5.weight": torch.ones(2)}),
        "unknown backbone key": lambda w: w.update({"dino_encoder.pos_embed": torch.ones(2)}),
        "unknown key": lambda w: w.update({"neck.weight": torch.ones(2)}),
        "no layer scale": lambda w: [w.pop(k) for k in list(w) if ".ls" in k],
        "no registers": lambda w: w.pop("dino_encoder.storage_tokens"),
        "no decoder": lambda w: [w.pop(k) for k in list(w) if "up_projection" in k],
        "no backbone": lambda w: [w.pop(k) for k in list(w) if "dino_encoder" in k],
        "block missing": lambda w: [w.pop(k) for k in list(w) if "blocks.3" in k],
    }
    changes[way](weights)


SPOILED = {
    "decoder key missing": "seg_layers.0.weight",
    "backbone key missing": "blocks.1.norm1.weight",
    "other classes": "seg_layers.0.weight",
    "decoder with NaN": "NaN",
    "decoder with infinity": "infinity",
    "backbone with NaN": "blocks.1.norm1.weight",
    "unknown decoder key": "up_projection.extra.weight",
    "unknown stage": "upsampling.5",
    "unknown backbone key": "pos_embed",
    "unknown key": "neck.weight",
    "no layer scale": "layer_scale",
    "no registers": "num_registers",
    "no decoder": "upsampling.0.conv.weight",
    "no backbone": "ViT",
    "block missing": "depth",
}


@pytest.mark.parametrize("way", list(SPOILED))
def test_weights_that_do_not_fit_to_the_last_key_are_refused(way, golden, mistake):
    weights = golden.weights("net_multiscale")
    _spoil(weights, way)
    assert SPOILED[way] in mistake(_golden_network, golden, "net_multiscale", weights)


@pytest.mark.parametrize(
    "change",
    [{"num_classes": 4}, {"layers": [1, 3]}, {"layers": "last"}, {"input_channels": 2}],
)
def test_weights_of_another_segmenter_are_refused(change, source, mistake):
    weights = build_segmenter(source, 3).state_dict()
    mistake(build_segmenter, source, weights=weights, **{"num_classes": 3, **change})
