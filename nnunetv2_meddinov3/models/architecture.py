"""Backbone architectures as plain data: what tensors show, and what they cannot say."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

ROPE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Two ViTs that agree in these are of one size.
SIZE_FIELDS = ("embed_dim", "depth", "num_heads", "ffn", "ffn_hidden")


@dataclass(frozen=True)
class Architecture:
    """Everything that is needed to build a backbone, as JSON-able values.

    Attributes:
        embed_dim: Token width D.
        depth: Number of blocks.
        num_heads: Attention heads; the head width ``embed_dim / num_heads`` is a multiple of 4.
        ffn: ``"mlp"`` or ``"swiglu"``.
        ffn_hidden: Hidden width of the feed-forward layer.
        qkv_bias: Whether queries and values have a bias (keys never have one).
        num_registers: Register (storage) tokens.
        norm_eps: Epsilon of every LayerNorm: 1e-5 in DINOv3's hub models, 1e-6 in MedDINOv3's.
        rope_base: Base of the rotary periods, ``base ** (4 k / head width)``; those of a file win.
        rope_dtype: ``"fp32"`` or ``"bf16"``, the dtype in which queries and keys are rotated.
        layer_scale: Initial value of LayerScale; None for a network without it.
        patch_size: Patch side in pixels.
        input_channels: Channels of the patch embedding.
    """

    embed_dim: int
    depth: int
    num_heads: int
    ffn: str = "mlp"
    ffn_hidden: int = 0
    qkv_bias: bool = True
    num_registers: int = 4
    norm_eps: float = 1e-5
    rope_base: float = 100.0
    rope_dtype: str = "fp32"
    layer_scale: float | None = 1e-5
    patch_size: int = 16
    input_channels: int = 3

    def __post_init__(self) -> None:
        if not self.ffn_hidden:
            object.__setattr__(self, "ffn_hidden", 4 * self.embed_dim)
        self._check_numbers()
        if self.ffn not in ("mlp", "swiglu"):
            raise ValueError(f"ffn must be 'mlp' or 'swiglu', got {self.ffn!r}")
        if self.rope_dtype not in ROPE_DTYPES:
            raise ValueError(
                f"rope_dtype must be one of {list(ROPE_DTYPES)}, got {self.rope_dtype!r}"
            )
        if self.embed_dim % (4 * self.num_heads):
            raise ValueError(
                f"embed_dim must be a multiple of 4 * num_heads, got embed_dim={self.embed_dim} "
                f"and num_heads={self.num_heads}"
            )

    def _check_numbers(self) -> None:
        least = dict.fromkeys(
            ("embed_dim", "depth", "num_heads", "ffn_hidden", "patch_size", "input_channels"), 1
        )
        for name, lowest in {**least, "num_registers": 0}.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < lowest:
                raise ValueError(f"{name} must be a whole number from {lowest} up, got {value!r}")
        if not isinstance(self.rope_base, float | int) or not 1 < self.rope_base < math.inf:
            raise ValueError(f"rope_base must be a number above 1, got {self.rope_base!r}")
        if not isinstance(self.norm_eps, float | int) or not 0 < self.norm_eps < 1:
            raise ValueError(f"norm_eps must be a number between 0 and 1, got {self.norm_eps!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-able dictionary, the inverse of ``Architecture(**d)``."""
        return asdict(self)


# DINOv3, table 2 and the published models; `vit_tiny` is ours, for tests and demonstrations: its
# LayerScale starts large because such runs are too short to grow it from 1e-5.
SIZES: dict[str, Architecture] = {
    "vit_tiny": Architecture(128, 4, 2, layer_scale=0.1),
    "vit_small": Architecture(384, 12, 6),
    "vit_small_plus": Architecture(384, 12, 6, ffn="swiglu", ffn_hidden=1536),
    "vit_base": Architecture(768, 12, 12),
    "vit_large": Architecture(1024, 24, 16),
    "vit_huge_plus": Architecture(1280, 32, 20, ffn="swiglu", ffn_hidden=5120),
    "vit_7b": Architecture(4096, 40, 32, ffn="swiglu", ffn_hidden=8192, qkv_bias=False),
}


def architecture_of(size: str, **overrides: Any) -> Architecture:
    """Return the architecture of a named size with some fields replaced.

    Raises:
        ValueError: If the size or a field is unknown.
    """
    if size not in SIZES:
        raise ValueError(f"backbone must be one of {', '.join(SIZES)}, got {size!r}")
    return override(SIZES[size], **overrides)


def override(architecture: Architecture, **overrides: Any) -> Architecture:
    """Return ``architecture`` with some fields replaced.

    Raises:
        ValueError: If a field is unknown.
    """
    unknown = sorted(set(overrides) - set(asdict(architecture)))
    if unknown:
        raise ValueError(
            f"an architecture has the fields {', '.join(asdict(architecture))}, got {unknown[0]!r}"
        )
    return replace(architecture, **overrides)


def differences(
    ours: Architecture, theirs: Architecture, names: Iterable[str] | None = None
) -> dict[str, tuple[Any, Any]]:
    """Return the fields in which two architectures differ: name -> (our value, their value).

    Args:
        ours: One of them.
        theirs: The other.
        names: The fields to compare, such as ``SIZE_FIELDS``; all of them by default.
    """
    names = [f.name for f in fields(ours)] if names is None else names
    pairs = {name: (getattr(ours, name), getattr(theirs, name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def default_layers(depth: int) -> list[int]:
    """Return the blocks whose tokens are aggregated: the end of every quarter of the depth.

    For 12 blocks these are the paper's 2, 5, 8 and 11 (MedDINOv3, sec. 3.1).
    """
    return sorted({max(0, math.ceil(depth * quarter / 4) - 1) for quarter in (1, 2, 3, 4)})


def check_layers(layers: list[int], depth: int) -> None:
    """Raise ValueError unless ``layers`` are block indices of a ViT in depth order."""
    layers = list(layers)
    if not layers or sorted(set(layers)) != layers or not 0 <= layers[0] <= layers[-1] < depth:
        raise ValueError(
            f"layers must be block indices from 0 to {depth - 1} in depth order, got {layers}"
        )
