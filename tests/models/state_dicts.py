"""Checkpoints of every known format, synthesised from one small random backbone.

A format is a function from a backbone to the keys of its file, and one that writes them. Tests
change the keys in between.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed import checkpoint as dcp

from nnunetv2_meddinov3.models import save_backbone
from nnunetv2_meddinov3.models.architecture import Architecture
from nnunetv2_meddinov3.models.backbone import Backbone

KINDS = {
    "mlp": {"ffn_hidden": 96},
    "swiglu": {"ffn": "swiglu", "ffn_hidden": 80, "qkv_bias": False},
}


def random_backbone(seed=0, periods=True, mask_token=True, **fields):
    """A backbone whose every tensor is far from its initial value and shows in the features.

    With ``periods`` they are rounded to bf16 as in the released files.
    """
    generator = torch.Generator().manual_seed(seed)
    architecture = Architecture(**{"embed_dim": 128, "depth": 2, "num_heads": 2, **fields})
    backbone = Backbone(architecture, mask_token=mask_token).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * (0.1 if parameter.ndim > 1 else 0.3) + (parameter.ndim == 1))
        if periods:
            buffer = backbone.vit.rope.periods
            buffer.copy_(buffer.bfloat16())
    return backbone


def canonical(backbone):
    return {n.removeprefix("vit."): t.clone() for n, t in backbone.state_dict().items()}


def _renamed(tensors, replacements):
    out = {}
    for name, tensor in tensors.items():
        for old, new in replacements:
            name = name.replace(old, new)
        out[name] = tensor
    return out


def meta(backbone, prefix="", local_norm=False):
    """Names of facebookresearch/dinov3, a key bias that its NaN mask hides included."""
    tensors = canonical(backbone)
    for i in range(backbone.depth) if backbone.architecture.qkv_bias else ():
        attn = f"blocks.{i}.attn"
        q, v = tensors.pop(f"{attn}.q_bias"), tensors.pop(f"{attn}.v_bias")
        tensors[f"{attn}.qkv.bias"] = torch.cat([q, torch.full_like(q, 9.0), v])
        tensors[f"{attn}.qkv.bias_mask"] = torch.full((3 * len(q),), torch.nan)
    if local_norm:
        tensors |= {f"local_cls_norm.{n}": tensors[f"norm.{n}"] + 1 for n in ("weight", "bias")}
    third = [("mlp.fc2", "mlp.w3")] if backbone.architecture.ffn == "swiglu" else []
    names = [
        ("reg_token", "storage_tokens"),
        ("rope.periods", "rope_embed.periods"),
        ("gamma_1", "ls1.gamma"),
        ("gamma_2", "ls2.gamma"),
        ("mlp.fc1_g", "mlp.w1"),
        ("mlp.fc1_x", "mlp.w2"),
        *third,
    ]
    return {prefix + name: t for name, t in _renamed(tensors, names).items()}


def timm(backbone):
    dropped = ("rope.periods", "mask_token")
    return {name: t for name, t in canonical(backbone).items() if name not in dropped}


def huggingface(backbone, generation, prefix=""):
    """Names of transformers' DINOv3ViTModel, before (``early``) or after leaves were renamed."""
    tensors = timm(backbone)
    tensors["mask_token"] = backbone.mask_token.detach().clone()[None]  # (1, 1, D) there
    for i in range(backbone.depth):
        parts = tensors.pop(f"blocks.{i}.attn.qkv.weight").chunk(3)
        tensors |= {f"blocks.{i}.attn.{n}.weight": t for n, t in zip("qkv", parts, strict=True)}
    gated = backbone.architecture.ffn == "swiglu"
    early = [
        ("attention.q.", "attention.query."),
        ("attention.q_bias", "attention.query.bias"),
        ("attention.k.", "attention.key."),
        ("attention.v.", "attention.value."),
        ("attention.v_bias", "attention.value.bias"),
        ("gamma_1", "layer_scale1.gamma"),
        ("gamma_2", "layer_scale2.gamma"),
        ("mlp.fc1_g", "mlp.w1"),
        ("mlp.fc1_x", "mlp.w2"),
        *([("mlp.fc2", "mlp.w3")] if gated else []),
        ("patch_embed.proj", "patch_embeddings.proj"),
    ]
    late = [
        ("attention.q.", "attention.q_proj."),
        ("attention.q_bias", "attention.q_proj.bias"),
        ("attention.k.", "attention.k_proj."),
        ("attention.v.", "attention.v_proj."),
        ("attention.v_bias", "attention.v_proj.bias"),
        ("attention.proj", "attention.o_proj"),
        ("gamma_1", "layer_scale1.lambda1"),
        ("gamma_2", "layer_scale2.lambda1"),
        ("mlp.fc1_g", "mlp.gate_proj"),
        ("mlp.fc1_x", "mlp.up_proj"),
        ("mlp.fc1", "mlp.up_proj"),
        ("mlp.fc2", "mlp.down_proj"),
        ("patch_embed.proj", "patch_embeddings"),
    ]
    names = [("blocks.", "layer."), ("attn.", "attention."), ("reg_token", "register_tokens")]
    tensors = _renamed(tensors, names + (early if generation == "early" else late))
    top = ("cls_token", "mask_token", "register_tokens", "patch_embeddings")
    out = {}
    for name, tensor in tensors.items():
        part = name.split(".")[0]
        name = f"embeddings.{name}" if part in top else name
        out[f"{prefix}{name}" if part == "layer" else name] = tensor
    return out


def training(backbone):
    """The teacher under test, beside a student and a Gram teacher with other weights, and heads."""
    others = [random_backbone(seed, **backbone.architecture.to_dict()) for seed in (7, 8)]
    out = meta(others[0], "student.backbone.") | meta(others[1], "gram_teacher.backbone.")
    for side in ("student", "teacher"):
        for head in ("dino_head", "ibot_head"):
            out[f"{side}.{head}.last_layer.weight"] = torch.randn(6, 4)
    return out | meta(backbone, "teacher.backbone.") | {"dino_loss.center": torch.zeros(1, 6)}


def segmenter(backbone, naming):
    """The backbone in a segmenter, the reference's or ours, with a stub of a decoder."""
    if naming == "reference":
        decoder = {"up_projection.decode.4.weight": torch.zeros(2, 8, 1, 1)}
        return meta(backbone, "dino_encoder.") | decoder
    own = {f"backbone.vit.{name}": t for name, t in canonical(backbone).items()}
    return own | {"decoder.seg_layers.0.weight": torch.zeros(2, 8, 1, 1)}


def write_pth(content, folder, levels=0):
    """A torch file with the first ``levels`` parts of the keys as nested dictionaries."""
    nested = {"iteration": 12, "name": "a run"} if levels else {}
    for key, tensor in content.items():
        place, (*outer, last) = nested, key.split(".", levels)
        for part in outer:
            place = place.setdefault(part, {})
        place[last] = tensor
    torch.save(nested, folder / "weights.pth")
    return folder / "weights.pth"


def write_safetensors(content, folder, name="model.safetensors", metadata=None):
    save_file({k: t.contiguous() for k, t in content.items()}, folder / name, metadata)
    return folder / name


def write_huggingface(content, folder, shards=1):
    """A folder as save_pretrained leaves it."""
    config = {"model_type": "dinov3_vit", "num_attention_heads": 4, "layer_norm_eps": 3e-3}
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        write_safetensors(content, folder)
        return folder
    names = [f"model-{n + 1:05d}-of-{shards:05d}.safetensors" for n in range(shards)]
    keys = list(content)
    for n, name in enumerate(names):
        write_safetensors({k: content[k] for k in keys[n::shards]}, folder, name)
    index = {"metadata": {}, "weight_map": {k: names[n % shards] for n, k in enumerate(keys)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_dcp(content, folder, outer=None):
    state = dict(content)
    if outer:
        state = {outer: state, "optimizer": {"exp_avg": torch.ones(3)}, "iteration": 5}
    path = folder / "12"
    dcp.save(state, checkpoint_id=path, no_dist=True)
    return path


def ours(backbone, folder):
    """The keys of our own file, and its metadata."""
    save_backbone(backbone, folder / "saved.safetensors", licence="CC0")
    with safe_open(folder / "saved.safetensors", framework="pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118


@dataclass(frozen=True)
class Format:
    """One kind of checkpoint.

    ``keys`` gives the content of its file, ``write`` puts it into a folder and returns what to
    load; ``fields`` are what the backbone must have for the format's defaults to find it.
    """

    keys: Callable
    write: Callable
    norm_eps: float = 1e-5
    periods: bool = True
    num_heads: int = 2

    def backbone(self, kind="mlp", **fields):
        fields = {"num_heads": self.num_heads, "norm_eps": self.norm_eps, **KINDS[kind], **fields}
        return random_backbone(periods=self.periods, **fields)


def _pth(levels):
    return lambda content, folder: write_pth(content, folder, levels)


def _huggingface(generation, prefix="", shards=1):
    return Format(
        lambda backbone: huggingface(backbone, generation, prefix),
        lambda content, folder: write_huggingface(content, folder, shards),
        norm_eps=3e-3,
        periods=False,
        num_heads=4,
    )


WRAPPED = "module._orig_mod."
FORMATS = {
    "hub": Format(meta, write_pth),
    "hub with local norms": Format(lambda b: meta(b, local_norm=True), write_pth),
    "wrapped hub": Format(
        lambda b: {
            f"{WRAPPED}{k.replace('.attn.', '._checkpoint_wrapped_module.attn.')}": t
            for k, t in meta(b).items()
        },
        write_pth,
    ),
    "hub as safetensors": Format(meta, write_safetensors),
    "release": Format(lambda b: meta(b, "teacher.backbone."), _pth(1), norm_eps=1e-6),
    "training": Format(training, _pth(1), norm_eps=1e-6),
    "timm": Format(timm, write_safetensors, periods=False),
    "huggingface early": _huggingface("early"),
    "huggingface late": _huggingface("late"),
    "huggingface with model.": _huggingface("late", "model."),
    "huggingface in shards": _huggingface("late", shards=3),
    "distributed": Format(training, lambda c, folder: write_dcp(c, folder, "model"), norm_eps=1e-6),
    "flat distributed": Format(meta, write_dcp),
    "reference segmenter": Format(lambda b: segmenter(b, "reference"), write_pth, norm_eps=1e-6),
    "our segmenter": Format(lambda b: segmenter(b, "ours"), write_pth, norm_eps=1e-6),
}


def features(backbone, size=(32, 48)):
    """Every token of every block for a fixed image, as one tensor."""
    channels = backbone.architecture.input_channels
    images = torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        blocks = backbone.eval().intermediate_tokens(images, list(range(backbone.depth)))
    return torch.cat([torch.cat([t.cls[:, None], t.registers, t.patches], 1) for t in blocks])
