"""The networks that MedDINOv3 is compared with: shapes, gradients, sizes, weights."""

import builtins
import json

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from safetensors.torch import save_file

from nnunetv2_meddinov3 import fine_tuning
from nnunetv2_meddinov3.models import segformer
from nnunetv2_meddinov3.models.architecture import SIZES
from nnunetv2_meddinov3.models.detail_segmenter import DetailSegmenter
from nnunetv2_meddinov3.models.dino_unet import DinoUNet
from nnunetv2_meddinov3.models.sam_decoder import SamSegmenter
from nnunetv2_meddinov3.models.segdino import SegDINO
from nnunetv2_meddinov3.models.segformer import SegFormer
from nnunetv2_meddinov3.models.segmenter import Segmenter

TINY = SIZES["vit_tiny"]


def on_a_vit(input_channels, **more):
    stem = 3 if input_channels in (1, 3) else input_channels
    return {"backbone": {**TINY.to_dict(), "input_channels": stem}, **more}


# name -> (class in the plans, arguments for images of some channels)
NETWORKS = {
    "segformer": (
        fine_tuning.SEGFORMER,
        lambda channels: {"encoder": "mit_b0", "skip_in_ffn": True},
    ),
    "segformer_imagenet": (fine_tuning.SEGFORMER, lambda channels: {"encoder": "mit_b0"}),
    "segdino": (fine_tuning.SEGDINO, on_a_vit),
    "dino_unet": (fine_tuning.DINO_UNET, on_a_vit),
    "sam": (fine_tuning.SAM_SEGMENTER, lambda channels: on_a_vit(channels, drop_path=0.3)),
    "sam_x4": (fine_tuning.SAM_SEGMENTER, lambda channels: on_a_vit(channels, input_scale=4)),
    "detail": (fine_tuning.DETAIL_SEGMENTER, lambda channels: on_a_vit(channels, width=8)),
    "matched": (fine_tuning.SEGMENTER, lambda channels: on_a_vit(channels, layers=[3], copies=4)),
}


def build(name, channels=1, classes=3):
    """The network of a name, from plans as nnU-Net reads them."""
    network_class, arguments = NETWORKS[name]
    entry = json.loads(json.dumps(fine_tuning.network_entry(network_class, arguments(channels))))
    torch.manual_seed(0)
    return get_network_from_plans(
        entry["network_class_name"],
        entry["arch_kwargs"],
        entry["_kw_requires_import"],
        channels,
        classes,
        allow_init=False,
    )


def count(module):
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize("size", [(64, 32), (50, 70)])
@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_logits_have_the_size_of_the_images(name, channels, size):
    network = build(name, channels).eval()
    with torch.no_grad():
        logits = network(torch.randn(2, channels, *size))
    assert logits.shape == (2, 3, *size)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", NETWORKS)
def test_every_trainable_parameter_gets_a_gradient_as_ddp_demands(name):
    network = build(name).train()
    network(torch.randn(4, 1, 48, 48)).square().mean().backward()
    parameters = list(network.named_parameters())
    assert [n for n, p in parameters if p.requires_grad and p.grad is None] == []
    assert [n for n, p in parameters if not p.requires_grad and p.grad is not None] == []


@pytest.mark.parametrize("name", NETWORKS)
def test_what_depends_on_the_classes_is_what_nnunet_leaves_out_of_pretrained_weights(name):
    few, many = (
        {n: tuple(t.shape) for n, t in build(name, classes=k).state_dict().items()} for k in (2, 5)
    )
    differ = {n for n in few | many if few.get(n) != many.get(n)}
    assert differ
    assert [n for n in differ if ".seg_layers." not in n] == []


@pytest.mark.parametrize("name", ["segdino", "dino_unet"])
def test_a_frozen_backbone_gets_no_gradient_and_stays_in_evaluation_mode(name):
    network = build(name).train()
    assert network.training
    assert network.decoder.training
    assert not any(module.training for module in network.backbone.modules())
    before = {n: t.clone() for n, t in network.backbone.state_dict().items()}
    images = torch.randn(2, 1, 32, 32)
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
    network(images).square().mean().backward()
    optimizer.step()
    assert all(p.grad is None for p in network.backbone.parameters())
    assert all(torch.equal(t, before[n]) for n, t in network.backbone.state_dict().items())


@pytest.mark.parametrize("name", NETWORKS)
def test_sides_are_padded_with_zeros_below_and_to_the_right(name):
    network = build(name).eval()
    images = torch.randn(1, 1, 40, 60)
    padded = torch.nn.functional.pad(images, (0, 4, 0, 24))
    with torch.no_grad():
        if network.multiple == 16:
            padded = padded[:, :, :48]
        torch.testing.assert_close(network(images), network(padded)[:, :, :40, :60])


@pytest.mark.parametrize("name", NETWORKS)
def test_there_is_no_deep_supervision(name):
    network_class, arguments = NETWORKS[name]
    with pytest.raises(ValueError, match="deep_supervision must be False"):
        get_network_from_plans(
            network_class, arguments(1), [], 1, 2, allow_init=False, deep_supervision=True
        )


# Dino U-Net, table 3: trainable parameters with 16 classes, in millions.
@pytest.mark.parametrize(
    ("size", "millions"),
    [
        ("vit_small", 6.2),
        ("vit_base", 13.2),
        pytest.param("vit_large", 20.0, marks=pytest.mark.slow),
        pytest.param("vit_7b", 234.3, marks=pytest.mark.slow),
    ],
)
def test_dino_unet_has_the_published_size(size, millions):
    with torch.device("meta"):
        network = DinoUNet(1, 16, SIZES[size].to_dict())
    assert count(network) / 1e6 == pytest.approx(millions, rel=0.01)


# SegFormer, table 1 (27.5 M with the 150 classes of ADE20K); 27.4 M with few classes.
@pytest.mark.slow
@pytest.mark.parametrize("skip", [True, False])
def test_segformer_b2_has_the_published_size(skip):
    assert count(SegFormer(1, 16, "mit_b2", skip_in_ffn=skip)) / 1e6 == pytest.approx(
        27.4, rel=0.005
    )


# SegDINO, abstract of its results: 2.21 M trainable parameters with ViT-S and one class.
def test_segdino_has_about_the_published_size():
    with torch.device("meta"):
        network = SegDINO(1, 1, SIZES["vit_small"].to_dict())
    assert count(network) / 1e6 == pytest.approx(2.21, rel=0.03)


@pytest.mark.slow
def test_the_matched_decoder_is_the_multi_scale_decoder_in_size():
    fields = SIZES["vit_base"].to_dict()
    with torch.device("meta"):
        multi = Segmenter(1, 16, fields)
        single = Segmenter(1, 16, fields, layers="last")
        matched = Segmenter(1, 16, fields, layers="last", copies=4)
    shapes = [[p.shape for p in n.decoder.parameters()] for n in (multi, matched)]
    assert shapes[0] == shapes[1]
    assert count(single.decoder) < count(multi.decoder) / 10


def test_sams_decoder_has_a_mask_for_each_class():
    network = build("sam", classes=3).eval()
    images = torch.randn(1, 1, 32, 48)
    masks = network.decoder.seg_layers[0]
    with torch.no_grad():
        before = network(images)
        masks.tokens.copy_(masks.tokens[[2, 0, 1]].clone())
        masks.networks = torch.nn.ModuleList([masks.networks[n] for n in (2, 0, 1)])
        torch.testing.assert_close(network(images), before[:, [2, 0, 1]], rtol=1e-4, atol=1e-4)


def test_sams_decoder_has_the_published_parts():
    decoder = SamSegmenter(1, 2, TINY.to_dict()).decoder
    assert len(decoder.blocks) == 2
    assert decoder.blocks[0].mlp[0].out_features == 2048
    assert decoder.blocks[0].self_attention.heads == 8
    assert decoder.neck[0].out_channels == 256
    maps = torch.randn(1, TINY.embed_dim, 3, 5)
    assert decoder(maps).shape == (1, 2, 12, 20)  # stride 4 for patches of 16 pixels


@pytest.mark.parametrize("network_class", [SegDINO, DinoUNet])
def test_decoders_of_four_maps_refuse_others(network_class):
    with pytest.raises(ValueError, match=r"four blocks .* got blocks \[3\]"):
        network_class(1, 2, TINY.to_dict(), layers=[3])
    eight = {**TINY.to_dict(), "patch_size": 8}
    with pytest.raises(ValueError, match="patches of 8 pixels"):
        network_class(1, 2, eight)


def test_the_detail_segmenter_sees_pixels_and_tokens():
    network = build("detail").eval()
    images = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        before = network(images)
        shifted = network(images.roll(1, dims=-1))
        assert not torch.allclose(before.roll(1, dims=-1), shifted, atol=1e-3)
        for parameter in network.decoder.context.parameters():
            parameter.zero_()
        without = network(images)
    assert (before - without).abs().mean() > 1e-2
    with torch.no_grad():
        for parameter in network.backbone.parameters():
            parameter.zero_()
        torch.testing.assert_close(network(images), without)


def test_the_detail_segmenter_refuses_other_patches():
    backbone = {**TINY.to_dict(), "patch_size": 8}
    with pytest.raises(ValueError, match="a ViT with patches of 16 pixels, got 8"):
        DetailSegmenter(1, 2, backbone)


def test_a_light_decoder_sees_every_map():
    network = build("segdino").eval()
    maps = [torch.randn(1, TINY.embed_dim, 2, 2, requires_grad=True) for _ in range(4)]
    network.decoder(maps).square().sum().backward()
    assert all(x.grad.abs().sum() > 0 for x in maps)


def test_the_skip_of_the_ffn_is_the_formula():
    torch.manual_seed(0)
    block = SegFormer(1, 2, "mit_b0", skip_in_ffn=True).encoder.block1[0]
    ffn, x = block.mlp, torch.randn(1, 6, 32)
    hidden = ffn.fc1(x)
    mixed = ffn.dwconv.dwconv(hidden.transpose(1, 2).reshape(1, -1, 2, 3)).flatten(2)
    wanted = ffn.fc2(torch.nn.functional.gelu(ffn.norm(mixed.transpose(1, 2) + hidden)))
    torch.testing.assert_close(ffn(x, 2, 3), wanted)


@pytest.fixture
def encoder_file(tmp_path):
    """A file as the library publishes it: an encoder of random weights and a classifier."""
    torch.manual_seed(7)
    library = segformer.require_library()
    tensors = library.encoders.get_encoder("mit_b0", weights=None).state_dict()
    tensors = {n: t.clone() for n, t in tensors.items()}
    path = tmp_path / "mit_b0.safetensors"
    save_file({**tensors, "head.weight": torch.zeros(10, 256), "head.bias": torch.ones(10)}, path)
    return path, tensors


def test_an_encoder_is_read_to_the_last_tensor(encoder_file):
    path, tensors = encoder_file
    read = segformer.read_encoder(str(path), "mit_b0")
    network = SegFormer(1, 2, "mit_b0")
    network.load_encoder(read, image_channels=1)
    loaded = network.encoder.state_dict()
    assert set(loaded) == set(tensors)
    assert all(torch.equal(loaded[n], t) for n, t in tensors.items())
    assert f"{len(tensors)} tensors used" in read.report()


def test_the_stem_of_an_encoder_is_made_to_fit_the_images(encoder_file):
    path, tensors = encoder_file
    read = segformer.read_encoder(str(path), "mit_b0")
    network = SegFormer(4, 2, "mit_b0")  # two channels and the one-hot of two labels
    network.load_encoder(read, image_channels=2)
    stem, given = network.encoder.patch_embed1.proj.weight, tensors["patch_embed1.proj.weight"]
    torch.testing.assert_close(stem[:, 0] + stem[:, 1], given.sum(1))
    assert not stem[:, 2:].any()


@pytest.mark.slow
def test_files_that_are_no_such_encoder_are_refused(encoder_file, tmp_path, mistake):
    path, tensors = encoder_file
    assert "must hold the encoder mit_b2" in mistake(segformer.read_encoder, str(path), "mit_b2")
    for change, word in (
        (lambda t: t.pop("norm4.weight"), "norm4.weight"),
        (lambda t: t.update(more=torch.zeros(1)), "more"),
        (lambda t: t["norm1.bias"].fill_(float("nan")), "norm1.bias"),
    ):
        changed = {n: t.clone() for n, t in tensors.items()}
        change(changed)
        save_file(changed, tmp_path / "other.safetensors")
        text = mistake(segformer.read_encoder, str(tmp_path / "other.safetensors"), "mit_b0")
        assert word in text
    for source in ("timm:mit_b0", "torchhub:mit_b0"):
        assert "must be a path or hf:" in mistake(segformer.read_encoder, source, "mit_b0")


def test_the_librarys_weights_are_asked_for_in_one_revision():
    source = segformer.imagenet_source("mit_b2")
    assert source.startswith("hf:smp-hub/mit_b2.imagenet/model.safetensors@")


def test_a_missing_library_is_named_with_the_command_that_installs_it(monkeypatch, mistake):
    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name.startswith("segmentation_models_pytorch"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    text = mistake(SegFormer, 1, 2, "mit_b0")
    assert "pip install 'nnunetv2-meddinov3[benchmark]'" in text


def test_an_unknown_encoder_is_refused():
    with pytest.raises(ValueError, match="mit_b0 to mit_b5, got 'resnet18'"):
        SegFormer(1, 2, "resnet18")
