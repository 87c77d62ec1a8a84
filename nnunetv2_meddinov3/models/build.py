"""Build backbones and segmenters from sizes, sources and state dicts."""

import os
import re
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.models.architecture import SIZE_FIELDS, architecture_of, differences
from nnunetv2_meddinov3.models.backbone import Backbone
from nnunetv2_meddinov3.models.formats import listing, parse_state_dict
from nnunetv2_meddinov3.models.segmentation_network import ViTNetwork
from nnunetv2_meddinov3.models.segmenter import Segmenter
from nnunetv2_meddinov3.models.tensor_files import read_files
from nnunetv2_meddinov3.models.weights import (
    Checkpoint,
    checkpoint_from,
    resolve_source,
    save_backbone,
    tensors_of,
)

__all__ = [
    "adapt_stem",
    "backbone_from",
    "build_segmenter",
    "load_backbone",
    "load_into",
    "resolve_source",
    "save_backbone",
    "stem_channels",
]

_OF_DECODER = re.compile(r"(?:^|\.)(?:decoder|up_projection)\.")


def load_backbone(
    source: str | os.PathLike[str], *, branch: str | None = None, **architecture_overrides: Any
) -> Backbone:
    """Load a pretrained backbone from any known source; its architecture is read off the tensors.

    Args:
        source: A path, ``timm:NAME``, ``hf:REPO/FILE[@REV]`` or
            ``torchhub:ENTRY[@REPO_DIR][=WEIGHTS_FILE]``.
        branch: Which backbone of a training checkpoint; the (EMA) teacher by default.
        **architecture_overrides: Fields of ``Architecture`` that tensors cannot say, such as
            ``norm_eps`` (default 1e-5 for flat hub files, 1e-6 for training checkpoints such as
            MedDINOv3's), ``rope_dtype`` (default ``"fp32"``) or ``num_heads``.

    Raises:
        UserError: If the source cannot be reached, read or fully accounted for.

    Examples:
        >>> backbone = load_backbone("model.pth", norm_eps=1e-6)  # doctest: +SKIP
        >>> backbone.intermediate_features(images, [2, 5, 8, 11])  # doctest: +SKIP
    """
    return backbone_from(resolve_source(source, branch=branch, **architecture_overrides))


def backbone_from(checkpoint: Checkpoint) -> Backbone:
    """Build the module of a checkpoint around its tensors, without drawing random weights first."""
    has_mask_token = "mask_token" in checkpoint.tensors
    with torch.device("meta"):
        backbone = Backbone(checkpoint.architecture, mask_token=has_mask_token)
    backbone.load_state_dict(_module_names(checkpoint.tensors), assign=True)
    for block in backbone.vit.blocks:
        if block.attn.q_bias is not None:  # timm's constant zero, which is in no file
            block.attn.k_bias = torch.zeros(checkpoint.architecture.embed_dim)
    return backbone


def _module_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n if n == "mask_token" else f"vit.{n}": t for n, t in tensors.items()}


def build_segmenter(
    backbone: str | Backbone,
    num_classes: int,
    input_channels: int = 1,
    layers: list[int] | str | None = None,
    weights: dict[str, Tensor] | str | os.PathLike[str] | None = None,
) -> Segmenter:
    """Build a segmentation network, images (B, C, H, W) -> logits (B, K, H, W).

    Args:
        backbone: A size name (random weights) or what ``load_backbone`` returned, which is copied.
        num_classes: Output channels K.
        input_channels: Channels of the images. One is repeated to three; another count gets a stem
            made from the backbone's mean kernel.
        layers: Block indices in depth order, ``"last"`` for single-scale, None for the end of every
            quarter of the depth (2, 5, 8, 11 of 12).
        weights: A whole segmenter's state dict or its file: the reference's (``dino_encoder.*``,
            ``up_projection.decode.*``) or ours.

    Raises:
        UserError: If the weights do not fit to the last key.
    """
    architecture = architecture_of(backbone) if isinstance(backbone, str) else backbone.architecture
    stem = stem_channels(architecture.input_channels, input_channels)
    network = Segmenter(
        input_channels, num_classes, replace(architecture, input_channels=stem).to_dict(), layers
    )
    if not isinstance(backbone, str):
        load_into(network, tensors_of(backbone), image_channels=input_channels)
    if weights is not None:
        _load_segmenter(network, weights)
    return network


def load_into(network: ViTNetwork, tensors: dict[str, Tensor], *, image_channels: int) -> None:
    """Copy backbone tensors into a network, its stem made to fit the image channels.

    Args:
        network: The target; channels beyond ``image_channels`` are cascade one-hot channels.
        tensors: Canonical name -> tensor, complete for the network's backbone.
        image_channels: Channels of the images without one-hot channels.
    """
    wanted = network.backbone.architecture.input_channels
    tensors = {name: t for name, t in tensors.items() if name != "mask_token"}
    stem = "patch_embed.proj.weight"
    is_repeated = network.input_channels == 1 and wanted == tensors[stem].shape[1]
    if not is_repeated:
        tensors[stem] = adapt_stem(tensors[stem], image_channels, wanted)
    network.backbone.load_state_dict(_module_names(tensors))


def stem_channels(weights: int, images: int) -> int:
    """Return the stem's channels for weights and images of given channel counts.

    One image channel is repeated for a three-channel stem, as in the paper; otherwise the stem has
    as many channels as the images.
    """
    return weights if images == 1 and weights == 3 else images


def adapt_stem(
    weight: Float[Tensor, "dim channels patch patch"], image_channels: int, wanted: int
) -> Float[Tensor, "dim {wanted} patch patch"]:
    """Make a patch embedding's kernel fit another channel count.

    Args:
        weight: The kernel for C channels.
        image_channels: Image channels N. With N different from C the mean kernel times C / N stands
            for each, so that equal channels give what repeated grey gives.
        wanted: Input channels of the result; those beyond N (cascade one-hot) start at zero.
    """
    channels = weight.shape[1]
    if image_channels != channels:
        mean = weight.mean(dim=1, keepdim=True) * (channels / image_channels)
        weight = mean.expand(-1, image_channels, -1, -1)
    zeros = weight.new_zeros(len(weight), wanted - image_channels, *weight.shape[2:])
    return torch.cat([weight, zeros], dim=1)


def _load_segmenter(
    network: Segmenter, weights: dict[str, Tensor] | str | os.PathLike[str]
) -> None:
    where = "the given state dict" if isinstance(weights, dict) else str(weights)
    state = weights if isinstance(weights, dict) else read_files(weights).tensors
    stages = network.decoder.stages
    decoder = {k: t for key, t in state.items() if (k := _decoder_name(key, stages))}
    parsed = parse_state_dict(state, where)
    checkpoint = checkpoint_from(parsed, where, norm_eps=network.backbone.architecture.norm_eps)
    own = network.decoder.state_dict()
    wrong = [k for k in own if k not in decoder or decoder[k].shape != own[k].shape]
    wrong += [k for k in decoder if k not in own]
    theirs, ours = checkpoint.architecture, network.backbone.architecture
    same = (*SIZE_FIELDS, "qkv_bias", "num_registers", "input_channels")
    differ = list(differences(ours, theirs, same))
    if (theirs.layer_scale is None) != (ours.layer_scale is None):
        differ.append("layer_scale")
    wrong += [
        k for k in checkpoint.dropped if _OF_DECODER.search(k) and not _decoder_name(k, stages)
    ]
    if wrong or differ:
        raise UserError(
            f"{where} must fit this segmenter, but it differs in {listing(differ + wrong)}."
        )
    if not_finite := [k for k, t in decoder.items() if not torch.isfinite(t).all()]:
        raise UserError(
            f"weights must be finite numbers, but the decoder of {where} holds NaN or infinity in "
            f"{listing(not_finite)}."
        )
    network.decoder.load_state_dict(decoder)
    load_into(network, checkpoint.tensors, image_channels=ours.input_channels)


def _decoder_name(key: str, stages: int) -> str | None:
    """Return our decoder's name of a segmenter's key, the reference's or ours; None for others."""
    if match := re.search(r"(?:^|\.)decoder\.((?:upsampling|seg_layers)\..*)$", key):
        return match.group(1)
    if match := re.search(r"(?:^|\.)up_projection\.decode\.(\d+)\.(?:([01])\.)?(\w+)$", key):
        stage, part, leaf = match.groups()
        if int(stage) == stages and part is None:
            return f"seg_layers.0.{leaf}"
        return f"upsampling.{stage}.{'norm' if part == '1' else 'conv'}.{leaf}"
    return None
