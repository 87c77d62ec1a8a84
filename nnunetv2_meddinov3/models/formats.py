"""Key maps: the state dicts of every DINOv3-family checkpoint to one canonical naming.

The canonical names are timm's, plus ``rope.periods`` and ``mask_token``. Every key of a file ends
up used, named as expected to be dropped, or named in an error.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nnunetv2_meddinov3.errors import UserError

# wrappers that leave their name in the keys
_WRAPPERS = re.compile(r"(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|module)\.")
_FIRST_BLOCK = re.compile(r"^(.*?)(?:vit\.)?(?:blocks|(?:model\.)?layer)\.0\.norm1\.weight$")
# what may accompany a backbone in a checkpoint of a training run or of a whole segmenter
_BESIDE = re.compile(
    r"(?:^|\.)(?:dino_head|ibot_head|dino_loss|ibot_patch_loss|koleo_loss|gram_loss|optimizer"
    r"|up_projection|decoder)\."
)

_TRAINING_NAMES = {
    "teacher",
    "student",
    "model_ema",
    "gram_teacher",
    "backbone",
    "dino_encoder",
}


def _in_blocks(blocks: str, names: dict[str, str]) -> list[tuple[str, str | None]]:
    """Return the rules for layers of every block: their name within it -> the canonical one."""
    return [
        (rf"{blocks}\.(\d+)\.{theirs}\.(\w+)", rf"blocks.\1.{ours}.\2")
        for theirs, ours in names.items()
    ]


# (pattern, canonical name, or None for a key that is expected to be dropped), first match wins
_RULES: dict[str, list[tuple[str, str | None]]] = {
    "meta": [
        (r"(cls_token|mask_token|norm\.\w+|patch_embed\.proj\.\w+)", r"\1"),
        (r"storage_tokens", "reg_token"),
        (r"rope_embed\.periods", "rope.periods"),
        (r"blocks\.(\d+)\.ls([12])\.gamma", r"blocks.\1.gamma_\2"),
        (
            r"blocks\.(\d+)\.(norm[12]\.\w+|attn\.qkv\.(?:weight|bias)|attn\.proj\.\w+"
            r"|mlp\.fc[12]\.\w+)",
            r"blocks.\1.\2",
        ),
        (r"blocks\.(\d+)\.attn\.qkv\.bias_mask", None),
        *_in_blocks(
            "blocks", {r"mlp\.w1": "mlp.fc1_g", r"mlp\.w2": "mlp.fc1_x", r"mlp\.w3": "mlp.fc2"}
        ),
        (r"local_cls_norm\.\w+", None),  # used for local crops in pretraining only (7B, SAT)
    ],
    "timm": [
        (r"(cls_token|reg_token|mask_token|norm\.\w+|patch_embed\.proj\.\w+|rope\.periods)", r"\1"),
        (
            r"blocks\.(\d+)\.(norm[12]\.\w+|gamma_[12]|attn\.(?:qkv\.weight|[qv]_bias|proj\.\w+)"
            r"|mlp\.fc(?:1|1_g|1_x|2)\.\w+)",
            r"blocks.\1.\2",
        ),
    ],
    "huggingface": [
        (r"embeddings\.(cls_token|mask_token)", r"\1"),
        (r"embeddings\.register_tokens", "reg_token"),
        (r"embeddings\.patch_embeddings\.(?:proj\.)?(weight|bias)", r"patch_embed.proj.\1"),
        (r"norm\.(weight|bias)", r"norm.\1"),
        (r"rope_embeddings\.periods", "rope.periods"),
        (r"rope_embeddings\.inv_freq", None),
        (r"layer\.(\d+)\.layer_scale([12])\.(?:lambda1|gamma)", r"blocks.\1.gamma_\2"),
        *_in_blocks(
            "layer",
            {
                "norm1": "norm1",
                "norm2": "norm2",
                r"attention\.(?:query|q_proj)": "attn.q",
                r"attention\.(?:key|k_proj)": "attn.k",
                r"attention\.(?:value|v_proj)": "attn.v",
                r"attention\.(?:proj|o_proj)": "attn.proj",
                r"mlp\.(?:w1|gate_proj)": "mlp.fc1_g",
                r"mlp\.w2": "mlp.fc1_x",
                r"mlp\.(?:fc1|up_proj)": "mlp.fc1",
                r"mlp\.(?:fc2|w3|down_proj)": "mlp.fc2",
            },
        ),
    ],
}


@dataclass
class Parsed:
    """A state dict in canonical names.

    Attributes:
        tensors: Canonical name -> tensor.
        naming: ``meta``, ``timm`` or ``huggingface``.
        prefix: What stood before the backbone's keys, such as ``teacher.backbone.``.
        dropped: Keys that were expected and not used.
    """

    tensors: dict[str, Tensor]
    naming: str
    prefix: str
    dropped: list[str] = field(default_factory=list)

    @property
    def is_training(self) -> bool:
        """Whether the backbone stood under a name that training code gives it, not a mere box.

        ``backbone`` inside a ``state_dict`` is a box, as of a Lightning module around a hub's ViT,
        unless the heads of self-supervised training are beside it.
        """
        names = _TRAINING_NAMES & set(self.prefix.split("."))
        if names == {"backbone"} and "state_dict" in self.prefix.split("."):
            return any("dino_head." in key or "ibot_head." in key for key in self.dropped)
        return bool(names)


def parse_state_dict(state: dict[str, Tensor], where: str, branch: str | None = None) -> Parsed:
    """Find the backbone in a flat state dict and rename its keys to the canonical ones.

    Args:
        state: Key -> tensor; nested checkpoints are flattened with dots.
        where: What to call the file in an error.
        branch: Which backbone to take where there are several, such as ``student``; by default the
            (EMA) teacher.

    Raises:
        UserError: If there is no backbone, several to choose from, or a key nobody knows.
    """
    count, state = len(state), {_WRAPPERS.sub("", key): tensor for key, tensor in state.items()}
    if len(state) < count:
        raise UserError(f"{where} must hold every key once, but some differ in a wrapper's name.")
    if len(prefixes := _backbone_prefixes(state)) == 0:
        raise UserError(
            f"{where} must hold a DINOv3-family ViT, but none of its {len(state)} keys is a first "
            f"block's 'norm1.weight'; its first keys are {listing(state)}."
        )
    prefix = _choose_prefix(prefixes, branch, where)
    own = {key[len(prefix) :]: t for key, t in state.items() if key.startswith(prefix)}
    beside = [key for key in state if not key.startswith(prefix)]
    if prefix == "":
        beside = [key for key in own if _is_beside(key, prefixes)]
        own = {key: t for key, t in own.items() if key not in beside}
    naming = _naming(own)
    tensors, dropped, unknown = _rename(own, naming)
    unknown += [key for key in beside if not _is_beside(key, prefixes)]
    if unknown:
        raise UserError(
            f"every key of {where} must be known, but {len(unknown)} are not: {listing(unknown)}; "
            "is this a ViT of the DINOv3 family?"
        )
    _check_plain(tensors, where)
    if "mask_token" in tensors and tensors["mask_token"].ndim == 3:  # (1, 1, D) in Hugging Face's
        tensors["mask_token"] = tensors["mask_token"].flatten(0, 1)
    return Parsed(
        _split_biases(tensors, dropped, where),
        naming,
        prefix,
        [prefix + key for key in dropped] + [key for key in beside if _is_beside(key, prefixes)],
    )


def listing(names: Iterable[object], count: int = 5) -> str:
    """Return the first names of an iterable, separated by commas."""
    words = list(map(str, names))
    return ", ".join(words[:count]) + (", ..." if len(words) > count else "")


def _backbone_prefixes(state: dict[str, Tensor]) -> list[str]:
    return [m.group(1) for key in state if (m := _FIRST_BLOCK.match(key))]


def _choose_prefix(prefixes: list[str], branch: str | None, where: str) -> str:
    parts = {prefix: prefix.split(".") for prefix in prefixes}
    if branch is not None:
        chosen = [p for p in prefixes if branch in parts[p]]
        if len(chosen) != 1:
            raise UserError(
                f"{where} must hold one backbone called {branch!r}, but it holds "
                f"{listing(p or 'one without a name' for p in prefixes)}."
            )
        return chosen[0]
    for name in ("model_ema", "teacher", "backbone"):
        if len(prefixes) > 1 and (chosen := [p for p in prefixes if name in parts[p]]):
            prefixes = chosen
    if len(prefixes) > 1:
        raise UserError(
            f"{where} holds several backbones ({listing(prefixes)}): say which to take."
        )
    return prefixes[0]


def _is_beside(key: str, prefixes: list[str]) -> bool:
    """Return whether a key outside the chosen backbone is expected there."""
    if _BESIDE.search(key):
        return True
    return any(prefix and key.startswith(prefix) for prefix in prefixes)


def _naming(own: dict[str, Tensor]) -> str:
    if any(re.match(r"(?:model\.)?layer\.0\.|embeddings\.", key) for key in own):
        return "huggingface"
    if any(re.search(r"(?:^|\.)(?:reg_token|gamma_1|q_bias|rope\.periods)$", key) for key in own):
        return "timm"
    return "meta"


def _rename(own: dict[str, Tensor], naming: str) -> tuple[dict[str, Tensor], list[str], list[str]]:
    tensors: dict[str, Tensor] = {}
    dropped, unknown = [], []
    gated = any("gate_proj" in key for key in own)
    for key, tensor in own.items():
        name = re.sub(r"^vit\.", "", key)  # our Backbone keeps timm's module under this name
        name = re.sub(r"^model\.(?=layer\.|norm\.|embeddings\.)", "", name)
        if gated:
            name = name.replace("mlp.up_proj", "mlp.w2")
        for pattern, canonical in _RULES[naming]:
            if match := re.fullmatch(pattern, name):
                if canonical is None:
                    dropped.append(key)
                else:
                    tensors[match.expand(canonical)] = tensor
                break
        else:
            unknown.append(key)
    return tensors, dropped, unknown


def _check_plain(tensors: dict[str, Tensor], where: str) -> None:
    for name, t in tensors.items():
        if not t.is_floating_point() or t.layout != torch.strided or t.is_meta:
            raise UserError(
                f"weights must be plain floating-point tensors, but {name} in {where} is of type "
                f"{t.dtype}, layout {t.layout} and device {t.device}."
            )


def _split_biases(tensors: dict[str, Tensor], dropped: list[str], where: str) -> dict[str, Tensor]:
    """Fuse separate query, key and value weights; split off query and value biases."""
    out = {k: t for k, t in tensors.items() if not re.search(r"attn\.(qkv\.bias|[qkv]\.\w+)$", k)}
    for i in sorted({k.split(".")[1] for k in tensors if k.startswith("blocks.")}, key=int):
        attn = f"blocks.{i}.attn"
        parts = {n: tensors[n] for c in "qkv" if (n := f"{attn}.{c}.weight") in tensors}
        if len(parts) == 3 and {t.ndim for t in parts.values()} == {2} and _alike(parts):
            parts = {f"{attn}.qkv.weight": torch.cat(list(parts.values()))}
        out.update(parts)  # those left separate are unexpected and named in the error
        q, k, v = (tensors.get(f"{attn}.{n}.bias") for n in "qkv")
        if (fused := tensors.get(f"{attn}.qkv.bias")) is not None:
            if fused.ndim != 1 or len(fused) % 3:
                raise UserError(
                    f"the tensors of {where} must fit one architecture, but {attn}.qkv.bias is "
                    f"{tuple(fused.shape)}, which is not one of query, key and value."
                )
            q, k, v = fused.view(3, -1).unbind()
        is_masked = any(key.endswith(f"{attn}.qkv.bias_mask") for key in dropped)
        if k is not None and not is_masked and bool(k.any()):
            raise UserError(
                f"keys must have no bias in DINOv3's attention, but {where} has one in block {i}."
            )
        biases = {f"{attn}.q_bias": q, f"{attn}.v_bias": v}
        out.update({name: bias.clone() for name, bias in biases.items() if bias is not None})
    return out


def _alike(tensors: dict[str, Tensor]) -> bool:
    return len({t.shape for t in tensors.values()}) == 1
