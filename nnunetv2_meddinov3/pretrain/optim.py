"""AdamW with a learning rate for each depth; each part clipped by itself (DINOv3's code)."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nnunetv2_meddinov3.models.backbone import Backbone
from nnunetv2_meddinov3.pretrain.config import Optim
from nnunetv2_meddinov3.pretrain.heads import ProjectionHead
from nnunetv2_meddinov3.pretrain.student import Student

PARTS = ("backbone", "dino_head", "ibot_head")

_META_NAMES = [
    (re.compile(r"reg_token$"), "storage_tokens"),
    (re.compile(r"rope\.periods$"), "rope_embed.periods"),
    (re.compile(r"gamma_([12])$"), r"ls\1.gamma"),
    (re.compile(r"attn\.[qv]_bias$"), "attn.qkv.bias"),
    (re.compile(r"mlp\.fc1_g\.(\w+)$"), r"mlp.w1.\1"),
    (re.compile(r"mlp\.fc1_x\.(\w+)$"), r"mlp.w2.\1"),
]


def meta_name(name: str, is_gated: bool = False) -> str:
    """Return the name that Meta's code, and so papers and goldens, give one of our parameters.

    Args:
        name: Such as ``vit.blocks.0.gamma_1`` or ``student.backbone.vit.cls_token``; what stands
            before the parameter stays.
        is_gated: Whether the feed-forward layers are SwiGLU, whose ``fc2`` is Meta's ``w3``.
    """
    name = re.sub(r"(^|\.)vit\.", r"\1", name)
    for pattern, ours in _META_NAMES:
        name = pattern.sub(ours, name)
    return re.sub(r"mlp\.fc2\.(\w+)$", r"mlp.w3.\1", name) if is_gated else name


class NamedRow(NamedTuple):
    """One parameter as Meta's code names it; q and v biases are one there.

    Attributes:
        name: Meta's name.
        parameters: Ours.
        lr_multiplier: Of the learning rate.
        weight_decay_multiplier: Of the weight decay, 0 or 1.
        is_last_layer: Whether it follows the learning rate of the last layer.
    """

    name: str
    parameters: list[nn.Parameter]
    lr_multiplier: float
    weight_decay_multiplier: float
    is_last_layer: bool


def backbone_rows(
    backbone: Backbone, layerwise_decay: float, patch_embed_lr_multiplier: float
) -> list[NamedRow]:
    """Return each parameter's multipliers: ``decay ** (depth + 1 - layer)``.

    Layers are those of ``Backbone.layer_of``. The patch embedding gets
    ``patch_embed_lr_multiplier`` on top. Biases, norms and LayerScale have no weight decay; tokens
    have.
    """
    depth, is_gated = backbone.depth, backbone.architecture.ffn == "swiglu"
    grouped: dict[str, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in backbone.named_parameters():
        grouped[meta_name(name, is_gated)].append(parameter)
    rows = []
    for name, parameters in grouped.items():
        multiplier = layerwise_decay ** (depth + 1 - backbone.layer_of(name))
        if name.startswith("patch_embed"):
            multiplier *= patch_embed_lr_multiplier
        rows.append(NamedRow(name, parameters, multiplier, _decay(name), False))
    return rows


def head_rows(head: ProjectionHead) -> list[NamedRow]:
    """Return the multipliers of a head's parameters, all 1 but for the decay of biases."""
    return [
        NamedRow(name, [parameter], 1.0, _decay(name), name.startswith("last_layer"))
        for name, parameter in head.named_parameters()
    ]


def _decay(name: str) -> float:
    return 0.0 if name.endswith("bias") or "norm" in name or "gamma" in name else 1.0


def parameter_groups(student: Student, config: Optim) -> list[dict[str, Any]]:
    """Return groups for AdamW, parameters of equal multipliers together."""
    rows = backbone_rows(student.backbone, config.layerwise_decay, config.patch_embed_lr_multiplier)
    rows += head_rows(student.dino_head) + head_rows(student.ibot_head)
    groups: dict[tuple, list[nn.Parameter]] = defaultdict(list)
    for row in rows:
        key = (row.lr_multiplier, row.weight_decay_multiplier, row.is_last_layer)
        groups[key] += [p for p in row.parameters if p.requires_grad]
    return [
        {
            "params": parameters,
            "lr_multiplier": lr,
            "weight_decay_multiplier": decay,
            "is_last_layer": last,
        }
        for (lr, decay, last), parameters in groups.items()
    ]


def build_optimizer(student: Student, config: Optim, device: torch.device) -> torch.optim.AdamW:
    """Return AdamW over the student; rates are set before every step."""
    first, second = config.betas
    return torch.optim.AdamW(
        parameter_groups(student, config),
        lr=0.0,
        betas=(first, second),
        fused=device.type in ("cuda", "cpu"),
    )


def set_rates(
    optimizer: torch.optim.Optimizer, lr: float, weight_decay: float, last_layer_lr: float
) -> None:
    """Write learning rate and weight decay of a step into every group."""
    for group in optimizer.param_groups:
        rate = last_layer_lr if group["is_last_layer"] else lr
        group["lr"] = rate * group["lr_multiplier"]
        group["weight_decay"] = weight_decay * group["weight_decay_multiplier"]


def clip_gradients(student: Student, max_norm: float) -> dict[str, Tensor]:
    """Clip the gradients of backbone and heads, each by its own L2 norm.

    Args:
        student: After backward; sharded or not.
        max_norm: Largest norm that stays as it is.

    Returns:
        The norms before clipping, scalars on the device; the whole norm where FSDP2 shards.
    """
    norms = {}
    for part in PARTS:
        parameters = [p for p in getattr(student, part).parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        norms[part] = norm.detach()
    return norms
