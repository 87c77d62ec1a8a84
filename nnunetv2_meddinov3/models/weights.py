"""Backbone checkpoints in and out: from a source to tensors, all accounted for, and to a file.

``resolve_source`` names the steps in order: find the file (``resolve``), read its tensors without
running its code (``tensor_files``), give them their canonical names (``formats``), read the
architecture off them and hold them to it.
"""

import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from nnunetv2_meddinov3 import __version__
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.files import replacing
from nnunetv2_meddinov3.models.architecture import Architecture
from nnunetv2_meddinov3.models.backbone import Backbone
from nnunetv2_meddinov3.models.formats import Parsed, listing, parse_state_dict
from nnunetv2_meddinov3.models.resolve import fetch, parse_source, read_torch_hub
from nnunetv2_meddinov3.models.tensor_files import METADATA_KEY, read_files

DINOV3_LICENCE = (
    "DINOv3 License (Meta, https://ai.meta.com/resources/models-and-libraries/dinov3-license/)"
)
TRAINING_LICENCE = (
    "not stated in the file (MedDINOv3's release is Apache-2.0 by its model card; weights that "
    f"derive from DINOv3's also come under the {DINOV3_LICENCE})"
)

# what the architecture is read off
_STEM = "patch_embed.proj.weight"
_DIMENSIONS = {"cls_token": 3, "reg_token": 3, "rope.periods": 1, _STEM: 4}


@dataclass
class Checkpoint:
    """A backbone read from a file, before any module is built.

    Attributes:
        architecture: What the tensors and the metadata say; other fields have their default.
        tensors: Canonical name -> fp32 tensor, complete for the architecture.
        source: Where it came from, for messages.
        layout: What kind of file it was, for messages.
        dropped: Keys of the file that were expected and not used.
        metadata: What one of our own files says of itself.
        licence: Under which terms the weights come.
        fine_tuned_on: The contract by which nnU-Net normalised what a checkpoint of its was trained
            on, where that is CT alone.
    """

    architecture: Architecture
    tensors: dict[str, Tensor]
    source: str
    layout: str
    dropped: list[str] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    licence: str = "not stated in the file"
    fine_tuned_on: dict[str, Any] | None = None

    def report(self) -> str:
        """Say in a line what was loaded and what was left out."""
        left = f", {len(self.dropped)} left out as expected" if self.dropped else ""
        return f"{self.source} ({self.layout}): {len(self.tensors)} tensors used{left}"


def resolve_source(
    value: str | os.PathLike[str], *, branch: str | None = None, **overrides: Any
) -> Checkpoint:
    """Fetch and read a source of weights.

    Args:
        value: One of the forms of ``MEDDINOV3_WEIGHTS`` except ``none``.
        branch: Which backbone of a training checkpoint.
        **overrides: Fields of ``Architecture``.

    Raises:
        UserError: If the source is unknown, cannot be reached, or cannot be read whole.
    """
    source, where = parse_source(value), str(value)
    if source.kind == "none":
        raise UserError("weights 'none' stand for random initialisation: there is nothing to load.")
    if source.kind == "torchhub":
        state, norm_eps = read_torch_hub(source, where)
        known = {} if norm_eps is None else {"norm_eps": norm_eps}
        parsed = parse_state_dict(state, where, branch)
        return checkpoint_from(parsed, where, **{**known, **overrides})
    return read_checkpoint(fetch(value), source=where, branch=branch, **overrides)


def read_checkpoint(
    path: str | os.PathLike[str],
    *,
    source: str | None = None,
    branch: str | None = None,
    **overrides: Any,
) -> Checkpoint:
    """Read a backbone from a file or a folder of any known format, without running its code.

    Known are Meta's hub .pth, MedDINOv3's release, training checkpoints with heads, timm's and
    Hugging Face's safetensors, our own safetensors, torch.distributed.checkpoint folders, and
    nnU-Net's checkpoints of our trainers.

    Args:
        path: A file, or a folder of the last kind or with a ``model.safetensors``.
        source: What to call it in messages; the path by default.
        branch: Which backbone to take from a training checkpoint, such as ``student``; by default
            the (EMA) teacher.
        **overrides: Fields of ``Architecture`` that the tensors cannot say or say wrongly.

    Raises:
        UserError: If anything is missing, damaged, unsafe, unknown or not finite.
    """
    where = source or os.fspath(path)
    files = read_files(path, where)
    parsed = parse_state_dict(files.tensors, where, branch)
    return checkpoint_from(
        parsed, where, metadata=files.metadata, config=files.config, run=files.run, **overrides
    )


def checkpoint_from(
    parsed: Parsed,
    where: str,
    *,
    metadata: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    run: dict[str, Any] | None = None,
    **overrides: Any,
) -> Checkpoint:
    """Complete parsed tensors to a checkpoint: architecture, strict accounting, finite values."""
    metadata, config, run = metadata or {}, config or {}, run or {}
    architecture = infer_architecture(parsed, where, metadata or run, config, overrides)
    tensors, stem_width = _separate(parsed.tensors), architecture.input_channels
    with torch.device("meta"):
        empty = Backbone(architecture, mask_token="mask_token" in tensors)
    expected = {name: tuple(t.shape) for name, t in tensors_of(empty).items()}
    if "rope.periods" not in tensors and parsed.naming != "meta" and not metadata:
        # timm and Hugging Face leave them out
        width = architecture.embed_dim // architecture.num_heads
        tensors["rope.periods"] = architecture.rope_base ** (torch.arange(width // 4) * 4 / width)
    _account(tensors, expected, where)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"weights must be finite numbers, but {name!r} in {where} holds NaN or infinity: "
                "take an earlier checkpoint or fetch the file again."
            )
    if (images := run.get("image_channels", stem_width)) < stem_width:
        # the others read a cascade's one-hot labels, which mean nothing to another model
        tensors[_STEM] = tensors[_STEM][:, :images].contiguous()
        architecture = replace(architecture, input_channels=images)
    layout, licence = _describe(parsed, metadata, run)
    return Checkpoint(
        architecture,
        tensors,
        where,
        layout,
        parsed.dropped,
        metadata,
        licence,
        run.get("intensity"),
    )


def tensors_of(backbone: Backbone) -> dict[str, Tensor]:
    """Return a backbone's tensors under their canonical names, as a ``Checkpoint`` holds them."""
    return {name.removeprefix("vit."): t for name, t in backbone.state_dict().items()}


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return fp32 tensors none of which shares memory: parameters are made of them."""
    out: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        t = tensor.detach().float().contiguous()
        if (place := t.untyped_storage().data_ptr()) in seen:
            t = t.clone()
        seen.add(place)
        out[name] = t
    return out


def _account(tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]], where: str) -> None:
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    if missing or unexpected:
        parts = [f"{len(missing)} are missing ({listing(missing)})"] if missing else []
        parts += [f"{len(unexpected)} do not belong ({listing(unexpected)})"] if unexpected else []
        raise UserError(
            f"{where} must hold every tensor of its ViT and no other, but {' and '.join(parts)}."
        )
    wrong = [n for n, t in tensors.items() if tuple(t.shape) != expected[n]]
    if wrong:
        name = wrong[0]
        raise UserError(
            f"the tensors of {where} must fit one architecture, but {len(wrong)} do not: {name} is "
            f"{tuple(tensors[name].shape)} where {expected[name]} is needed."
        )


def _check_dimensions(tensors: dict[str, Tensor], wanted: dict[str, int], where: str) -> None:
    for name, count in wanted.items():
        if name in tensors and tensors[name].ndim != count:
            raise UserError(
                f"the tensors of {where} must be a ViT's, but {name} is "
                f"{tuple(tensors[name].shape)} and not {count}-dimensional."
            )


def infer_architecture(
    parsed: Parsed,
    where: str,
    metadata: dict[str, Any],
    config: dict[str, Any],
    overrides: dict[str, Any],
) -> Architecture:
    """Read width, depth, heads, feed-forward kind, registers and biases off the tensors.

    Heads come from the rotary periods, else from metadata or ``config`` (a Hugging Face
    config.json), else from DINOv3's head width: 64, and 128 at width 4096. ``norm_eps`` cannot be
    seen in tensors: that of metadata, plans or config where there are any, 1e-6 in training
    checkpoints such as MedDINOv3's release, else 1e-5.
    """
    t = parsed.tensors
    fc1 = next((k for k in ("mlp.fc1", "mlp.fc1_g") if f"blocks.0.{k}.weight" in t), None)
    needed = ["cls_token", _STEM]
    if missing := [name for name in needed if name not in t] + ([] if fc1 else ["blocks.0.mlp"]):
        raise UserError(f"{where} must hold a whole ViT, but {listing(missing)} is missing.")
    _check_dimensions(t, {**_DIMENSIONS, f"blocks.0.{fc1}.weight": 2}, where)
    width = t["cls_token"].shape[-1]
    heads = config.get("num_attention_heads", max(1, width // (128 if width == 4096 else 64)))
    if "rope.periods" in t:
        heads = width // (4 * max(1, len(t["rope.periods"])))
    stem = t[_STEM].shape
    fields: dict[str, Any] = {
        "embed_dim": width,
        "depth": len({k.split(".")[1] for k in t if k.startswith("blocks.")}),
        "num_heads": heads,
        "ffn": "mlp" if fc1 == "mlp.fc1" else "swiglu",
        "ffn_hidden": t[f"blocks.0.{fc1}.weight"].shape[0],
        "qkv_bias": any(k.endswith(("attn.q_bias", "attn.v_bias")) for k in t),
        "num_registers": (
            t["reg_token"].shape[1] if "reg_token" in t else config.get("num_register_tokens", 0)
        ),
        "norm_eps": config.get("layer_norm_eps", 1e-6 if parsed.is_training else 1e-5),
        "rope_base": config.get("rope_theta", 100.0),
        "layer_scale": 1e-5 if any(k.endswith(("gamma_1", "gamma_2")) for k in t) else None,
        "patch_size": stem[-1],
        "input_channels": stem[1],
    }
    try:
        return Architecture(**{**fields, **metadata.get("architecture", {}), **overrides})
    except (TypeError, ValueError) as error:
        raise UserError(f"{where} does not describe a DINOv3-family ViT: {error}.") from error


def _describe(parsed: Parsed, metadata: dict[str, Any], run: dict[str, Any]) -> tuple[str, str]:
    if metadata:
        return "nnunetv2_meddinov3 checkpoint", metadata.get("licence", "not stated in the file")
    if run:
        return f"nnU-Net checkpoint of {run['trainer']}", TRAINING_LICENCE
    if parsed.naming == "meta" and parsed.is_training:
        return f"training checkpoint, {parsed.prefix.rstrip('.')}", TRAINING_LICENCE
    names = {"meta": "DINOv3 hub", "timm": "timm", "huggingface": "Hugging Face"}
    return f"{names[parsed.naming]} checkpoint", DINOV3_LICENCE


def save_backbone(
    backbone: Backbone, path: str | os.PathLike[str], *, licence: str, **metadata: Any
) -> None:
    """Write a backbone as one safetensors file with its metadata, whole or not at all.

    Args:
        backbone: What to write; its mask token goes along if it has one.
        path: Target, replaced if it exists.
        licence: Terms under which the weights come.
        **metadata: JSON-able facts such as ``intensity``, ``spacing_mm``, ``stage``, ``step``.
    """
    tensors = {name: t.contiguous() for name, t in tensors_of(backbone).items()}
    facts = {
        "architecture": backbone.architecture.to_dict(),
        "licence": licence,
        "version": __version__,
        **metadata,
    }
    with replacing(Path(path), failures=(SafetensorError,)) as part:
        save_file(tensors, part, metadata={METADATA_KEY: json.dumps(facts)})
