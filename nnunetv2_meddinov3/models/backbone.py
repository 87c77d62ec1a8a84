"""The DINOv3 ViT: timm's ``Eva`` behind a small interface, with its architecture as plain data.

timm's blocks reproduce the original in fp32; added around them are rotary periods that travel with
the weights, a uniform drop-path rate, the original's initialisation and optional bf16 rotary
embeddings (DINOv3, https://arxiv.org/abs/2508.10104; MedDINOv3, https://arxiv.org/abs/2509.02379).
"""

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from timm.layers import DropPath
from timm.models.eva import Eva
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nnunetv2_meddinov3.models.architecture import Architecture, check_layers

ROPE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Tokens(NamedTuple):
    """The tokens of one block after the final norm, patches in row-major order."""

    cls: Float[Tensor, "batch dim"]
    registers: Float[Tensor, "batch register dim"]
    patches: Float[Tensor, "batch patch dim"]


class Window(NamedTuple):
    """Where an image lies in a larger one, in patches.

    Attributes:
        grid_size: Of the larger one.
        row: The first that the image has.
        column: The first that the image has.
    """

    grid_size: tuple[int, int]
    row: int
    column: int


class _Cast(nn.Module):
    """Round queries or keys to the dtype in which the original rotates them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(
        self, x: Float[Tensor, "batch head token width"]
    ) -> Float[Tensor, "batch head token width"]:
        return x.to(self.dtype)


class Backbone(nn.Module):
    """A DINOv3-family ViT that returns the tokens of chosen blocks.

    Args:
        architecture: What to build.
        drop_path: Rate of stochastic depth, the same for every block as in DINOv3.
        mask_token: Whether to hold a mask token, which only pretraining uses.
        activation_checkpointing: Whether blocks are recomputed in the backward pass.
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        drop_path: float = 0.0,
        mask_token: bool = False,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must lie in [0, 1), got {drop_path}")
        self.architecture = a = architecture
        self.vit: Any = Eva(
            patch_size=a.patch_size,
            in_chans=a.input_channels,
            num_classes=0,
            global_pool="token",
            embed_dim=a.embed_dim,
            depth=a.depth,
            num_heads=a.num_heads,
            qkv_bias=a.qkv_bias,
            mlp_ratio=(a.ffn_hidden + 0.5) / a.embed_dim,  # Eva truncates ratio * width
            swiglu_mlp=a.ffn == "swiglu",
            swiglu_align_to=1,
            init_values=a.layer_scale,
            norm_layer=partial(nn.LayerNorm, eps=a.norm_eps),
            num_reg_tokens=a.num_registers,
            use_abs_pos_emb=False,
            use_rot_pos_emb=True,
            rope_type="dinov3",
            rope_temperature=a.rope_base,
            rope_rotate_half=True,
            use_fc_norm=False,
            dynamic_img_size=True,
        )
        self.mask_token = nn.Parameter(torch.zeros(1, a.embed_dim)) if mask_token else None
        self._add_what_timm_lacks(drop_path)
        self.vit.set_grad_checkpointing(activation_checkpointing)
        self.init_weights()

    def _add_what_timm_lacks(self, drop_path: float) -> None:
        """Save the rotary periods, drop paths at one rate, rotate in the architecture's dtype."""
        rope, dtype = self.vit.rope, self.architecture.rope_dtype
        # The released files hold periods rounded to bf16: they are weights, and stay with them.
        rope.register_buffer("periods", rope.periods, persistent=True)
        for block in self.vit.blocks:
            if drop_path:
                block.drop_path1, block.drop_path2 = DropPath(drop_path), DropPath(drop_path)
            if dtype != "fp32":
                block.attn.q_norm = block.attn.k_norm = _Cast(ROPE_DTYPES[dtype])

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw fresh weights as DINOv3 does: N(0, 0.02) for layers and tokens, zero biases."""
        for module in self.vit.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        bound = 1 / math.sqrt(self.architecture.input_channels * self.architecture.patch_size**2)
        for parameter in self.vit.patch_embed.proj.parameters():
            nn.init.uniform_(parameter, -bound, bound)
        nn.init.normal_(self.vit.cls_token, std=0.02)
        if self.vit.reg_token is not None:
            nn.init.normal_(self.vit.reg_token, std=0.02)

    @property
    def embed_dim(self) -> int:
        """Token width D."""
        return self.architecture.embed_dim

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self.architecture.depth

    def intermediate_tokens(
        self,
        images: Float[Tensor, "batch channel height width"],
        layers: list[int],
        window: Window | None = None,
    ) -> list[Tokens]:
        """Return the tokens after chosen blocks, each after the final norm.

        Args:
            images: Height and width are multiples of the patch size.
            layers: Block indices from 0, in depth order and without repetition.
            window: Of what the images are a part, which their positions are then of.

        Raises:
            ValueError: If the layers or the image do not fit this backbone.
        """
        check_layers(layers, self.depth)
        self._check_images(images)
        patches = self.vit.patch_embed(images)  # (B, h, w, D)
        x = self._with_prefix(patches.flatten(1, 2))
        dtype = ROPE_DTYPES[self.architecture.rope_dtype]
        embedding = _rotary_in(window, self.vit.rope.periods, patches.shape[1:3], dtype)
        prefix, tokens = 1 + self.architecture.num_registers, []
        for i, block in enumerate(self.vit.blocks[: layers[-1] + 1]):
            x = self._run_block(block, x, embedding)
            if i in layers:
                y = self.vit.norm(x)
                tokens.append(Tokens(y[:, 0], y[:, 1:prefix], y[:, prefix:]))
        return tokens

    def intermediate_features(
        self, images: Float[Tensor, "batch channel height width"], layers: list[int]
    ) -> list[Float[Tensor, "batch dim rows columns"]]:
        """Return the patch tokens after chosen blocks as maps, each after the final norm.

        That is what the reference decodes (MedDINOv3, sec. 3.1).

        Args:
            images: Height and width are multiples of the patch size.
            layers: Block indices from 0, in depth order and without repetition.

        Returns:
            One map of patches per layer.
        """
        self._check_images(images)
        h, w = (side // self.patch_size for side in images.shape[-2:])
        return [
            t.patches.transpose(1, 2).unflatten(2, (h, w)).contiguous()
            for t in self.intermediate_tokens(images, layers)
        ]

    @property
    def patch_size(self) -> int:
        """Patch side in pixels."""
        return self.architecture.patch_size

    def _with_prefix(
        self, patches: Float[Tensor, "batch patch dim"]
    ) -> Float[Tensor, "batch token dim"]:
        """Put cls and register tokens before patch tokens."""
        prefix = [self.vit.cls_token, self.vit.reg_token]
        return torch.cat(
            [*(t.expand(len(patches), -1, -1) for t in prefix if t is not None), patches], dim=1
        )

    def _run_block(
        self,
        block: nn.Module,
        x: Float[Tensor, "batch token dim"],
        embedding: Float[Tensor, "patch rotary"],
    ) -> Float[Tensor, "batch token dim"]:
        if self.vit.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, embedding, use_reentrant=False)
        return block(x, embedding)

    def _check_images(self, images: Tensor) -> None:
        c, p = self.architecture.input_channels, self.patch_size
        sides = images.shape[2:]
        if images.ndim != 4 or images.shape[1] != c or any(n < p or n % p for n in sides):
            raise ValueError(
                f"images must be (B, {c}, H, W) with H and W multiples of {p} pixels, "
                f"got {tuple(images.shape)}"
            )

    def layer_of(self, name: str) -> int:
        """Return the layer of a parameter, by which its learning rate decays towards the image.

        Args:
            name: Ours or Meta's. Tokens and patch embedding are layer 0, block i is layer i + 1,
                the final norm is the last, ``depth + 1``.
        """
        part, _, rest = name.removeprefix("vit.").partition(".")
        if part == "blocks":
            return int(rest.partition(".")[0]) + 1
        return self.depth + 1 if part == "norm" else 0


def rotary_embedding(
    periods: Float[Tensor, " period"],
    grid_size: tuple[int, int],
    dtype: torch.dtype,
    *,
    shift: Float[Tensor, "*draw 2"] | None = None,
    factor: Float[Tensor, "*draw 2"] | None = None,
) -> Float[Tensor, "*draw patch 8*period"]:
    """Return sines and cosines of the patch centres, computed in ``dtype`` as in the original.

    Args:
        periods: A quarter of the head width of them.
        grid_size: Patches along height and width.
        dtype: fp32, or bf16, which is what DINOv3's and MedDINOv3's training ran.
        shift: Added to the coordinates of each axis, which lie in [-1, 1]; of several draws.
        factor: What the shifted coordinates are multiplied by; of as many draws.

    Returns:
        All sines, then all cosines, twice the head width.
    """
    axes = []
    for n in grid_size:
        centres = torch.arange(0.5, n, device=periods.device, dtype=dtype) / n
        axes.append(2 * centres - 1)
    coords = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)  # (P, 2)
    coords = coords if shift is None else coords + shift[..., None, :]
    coords = coords if factor is None else coords * factor[..., None, :]
    angles = 2 * math.pi * coords[..., None] / periods.to(dtype)
    angles = angles.flatten(-2).tile(2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def _rotary_in(
    window: Window | None,
    periods: Float[Tensor, " period"],
    grid_size: tuple[int, int],
    dtype: torch.dtype,
) -> Float[Tensor, "patch rotary"]:
    """Return the rotary embedding of an image, or that of its part of a larger one."""
    if window is None:
        return rotary_embedding(periods, grid_size, dtype)
    whole = rotary_embedding(periods, window.grid_size, dtype).unflatten(0, window.grid_size)
    rows = slice(window.row, window.row + grid_size[0])
    columns = slice(window.column, window.column + grid_size[1])
    return whole[rows, columns].flatten(0, 1)
