"""Names of parameters as Meta's training code writes them, which papers and goldens use."""

import re

_RULES = [
    (re.compile(r"reg_token$"), "storage_tokens"),
    (re.compile(r"rope\.periods$"), "rope_embed.periods"),
    (re.compile(r"gamma_([12])$"), r"ls\1.gamma"),
    (re.compile(r"attn\.[qv]_bias$"), "attn.qkv.bias"),
    (re.compile(r"mlp\.fc1_g\.(\w+)$"), r"mlp.w1.\1"),
    (re.compile(r"mlp\.fc1_x\.(\w+)$"), r"mlp.w2.\1"),
]


def meta_name(name: str, is_gated: bool = False) -> str:
    """Return Meta's name of one of our parameters, with what stands before it kept.

    Args:
        name: Such as ``vit.blocks.0.gamma_1`` or ``student.backbone.vit.cls_token``.
        is_gated: Whether the feed-forward layers are SwiGLU, whose ``fc2`` is Meta's ``w3``.
    """
    name = re.sub(r"(^|\.)vit\.", r"\1", name)
    for pattern, ours in _RULES:
        name = pattern.sub(ours, name)
    return re.sub(r"mlp\.fc2\.(\w+)$", r"mlp.w3.\1", name) if is_gated else name
