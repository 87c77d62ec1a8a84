"""The token decoder: a chain of transposed convolutions computed as matrix products on tokens.

In MedDINOv3's decoder (Primus' patch decoder, sec. 3.1) every transposed convolution has kernel =
stride = 2, the norm runs over channels and the last convolution is 1x1, so no pixel sees another
token. The chain is therefore a tree of per-token MLPs: it is computed on (tokens, children,
channels) with one rearrangement at the end, and in chunks of tokens that are recomputed in the
backward pass, so that full-resolution maps with many channels never exist for a whole batch.
"""

import math
from collections.abc import Sequence
from typing import Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

_CPU_CHUNK = 128  # tokens; fast for ViT-S and ViT-B alike, see docs/benchmarks.md
_KEPT = 512  # tokens: no more are decoded in training without recomputing them afterwards


class _Upsampling(nn.Module):
    """One transposed convolution with its norm over channels and GELU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(channels, channels // 2, kernel_size=2, stride=2)
        self.norm = nn.LayerNorm(channels // 2, eps=1e-6)

    def matrix(self) -> tuple[Float[Tensor, "dim 2*dim"], Float[Tensor, " 2*dim"]]:
        """Return weight and bias as those of one product, laid out anew: once for all chunks."""
        # (C, C/2, 2, 2) -> (C, 2 * 2 * C/2): the children of a token lie beside each other
        weight = self.conv.weight.permute(0, 2, 3, 1).flatten(1)
        assert self.conv.bias is not None
        return weight, self.conv.bias.repeat(4)

    def forward(
        self,
        tokens: Float[Tensor, "token dim"],
        weight: Float[Tensor, "dim 2*dim"],
        bias: Float[Tensor, " 2*dim"],
    ) -> Float[Tensor, "4*token dim//2"]:
        """Map tokens to their four children in row-major order, given ``matrix``."""
        children = torch.addmm(bias, tokens, weight).view(-1, self.conv.out_channels)
        return F.gelu(self.norm(children))

    def on_maps(
        self, maps: Float[Tensor, "batch dim height width"]
    ) -> Float[Tensor, "batch dim//2 2*height 2*width"]:
        """Double the sides of maps, step for step as the reference does."""
        x = self.conv(maps)
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + self.norm.eps)
        weight, bias = self.norm.weight[:, None, None], self.norm.bias[:, None, None]
        return F.gelu(weight * x + bias)


class TokenDecoder(nn.Module):
    """Decode patch tokens into logits at full resolution.

    Args:
        in_channels: Width of the (concatenated) tokens, a multiple of ``patch_size``.
        num_classes: Output channels K.
        patch_size: Patch side in pixels, a power of two.
        chunk: Tokens decoded at a time and recomputed in the backward pass. With ``"auto"`` as many
            as are fast on the device, and recomputed if there are more than 512; with None whole
            maps go through the convolutions as in the reference.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        patch_size: int = 16,
        chunk: int | Literal["auto"] | None = "auto",
    ) -> None:
        super().__init__()
        self.stages = int(math.log2(patch_size))
        if 2**self.stages != patch_size or in_channels % patch_size:
            raise ValueError(
                "the patch size must be a power of two that divides the token width, got "
                f"patch size {patch_size} and width {in_channels}"
            )
        if isinstance(chunk, int) and chunk < 1:
            raise ValueError(f'chunk must be at least 1 token, "auto" or None, got {chunk}')
        self.chunk = chunk
        upsampling = nn.ModuleList(_Upsampling(in_channels // 2**s) for s in range(self.stages))
        self.upsampling = cast("Sequence[_Upsampling]", upsampling)
        # nnU-Net's -pretrained_weights leaves out what is called seg_layers
        head = nn.Conv2d(in_channels // patch_size, num_classes, 1)
        self.seg_layers = cast("Sequence[nn.Conv2d]", nn.ModuleList([head]))
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.bias is not None:
                nn.init.kaiming_normal_(module.weight, a=1e-2)
                nn.init.zeros_(module.bias)

    def forward(
        self, tokens: Float[Tensor, "batch patch dim"], grid_size: tuple[int, int]
    ) -> Float[Tensor, "batch classes height width"]:
        """Decode tokens to logits.

        Args:
            tokens: In row-major order.
            grid_size: Patches along height and width, as many as there are tokens.
        """
        if self.chunk is None:
            return self._decode_maps(tokens.transpose(1, 2).unflatten(2, grid_size))
        if self.chunk == "auto":
            chunk, kept = _CPU_CHUNK if tokens.device.type == "cpu" else _KEPT, _KEPT
        else:
            chunk = kept = self.chunk
        matrices = [stage.matrix() for stage in self.upsampling]
        every = tokens.flatten(0, 1)
        pieces = every.split(chunk)
        if len(every) > kept and torch.is_grad_enabled():
            decoded = [
                checkpoint(self._decode, piece, matrices, use_reentrant=False) for piece in pieces
            ]
        else:
            decoded = [self._decode(piece, matrices) for piece in pieces]
        return self._rearrange(torch.cat(decoded), len(tokens), *grid_size)

    def _decode_maps(
        self, maps: Float[Tensor, "batch dim rows columns"]
    ) -> Float[Tensor, "batch classes height width"]:
        """Decode whole maps of tokens to logits."""
        for stage in self.upsampling:
            maps = stage.on_maps(maps)
        return self.seg_layers[0](maps)

    def _decode(
        self, tokens: Float[Tensor, "token dim"], matrices: Sequence[tuple[Tensor, Tensor]]
    ) -> Float[Tensor, "token logits"]:
        """Map tokens to the logits of their pixels, 4 ** stages * K for each."""
        x = tokens
        for stage, (weight, bias) in zip(self.upsampling, matrices, strict=True):
            x = stage(x, weight, bias)
        head = self.seg_layers[0]
        return F.linear(x, head.weight.flatten(1), head.bias).view(len(tokens), -1)

    def _rearrange(
        self, logits: Float[Tensor, "token logits"], batch: int, h: int, w: int
    ) -> Float[Tensor, "{batch} classes height width"]:
        """Put the pixels of every token in their place."""
        s, p = self.stages, 2**self.stages
        # a pixel's row is (token row, row bit of stage 1, ..., row bit of stage s); columns alike
        x = logits.view(batch, h, w, *(2,) * (2 * s), -1)
        rows, columns = (range(3 + first, 3 + 2 * s, 2) for first in (0, 1))
        x = x.permute(0, 3 + 2 * s, 1, *rows, 2, *columns)
        return x.reshape(batch, -1, h * p, w * p)
