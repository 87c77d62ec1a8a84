"""The segmenter: images of any channel count -> backbone tokens of several depths -> logits."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_meddinov3.models.architecture import Architecture, check_layers, default_layers
from nnunetv2_meddinov3.models.backbone import Backbone
from nnunetv2_meddinov3.models.decoder import CHUNK, TokenDecoder
from nnunetv2_meddinov3.models.precision import has_bf16


class Segmenter(nn.Module):
    """MedDINOv3's segmentation network (https://arxiv.org/abs/2509.02379, sec. 3.1).

    The constructor takes what nnU-Net's ``get_network_from_plans`` gives, so plans that name this
    class build it. It reads no file and no variable.

    Args:
        input_channels: Channels of the images, cascade one-hot channels included. One channel is
            repeated to the stem's three; otherwise the stem has as many.
        num_classes: Output channels K.
        backbone: Fields of an ``Architecture``.
        layers: Blocks whose patch tokens are concatenated, in depth order; None for the end of
            every quarter of the depth, ``"last"`` for the last block alone.
        drop_path: Rate of stochastic depth.
        activation_checkpointing: Whether the backbone's blocks are recomputed in the backward pass.
        decoder_chunk: Tokens decoded at a time; None decodes whole maps, as the reference does.
        deep_supervision: Must be False: there is one output resolution.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        backbone: dict[str, Any],
        layers: list[int] | str | None = None,
        drop_path: float = 0.0,
        activation_checkpointing: bool = False,
        decoder_chunk: int | None = CHUNK,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        if deep_supervision:
            raise ValueError("this network has no deep supervision: deep_supervision must be False")
        architecture = Architecture(**backbone)
        stem = architecture.input_channels
        if input_channels != stem and (input_channels, stem) != (1, 3):
            raise ValueError(
                f"a backbone with {stem} input channels takes {stem} image channels"
                f"{' or 1' if stem == 3 else ''}, got {input_channels}"
            )
        self.input_channels = input_channels
        self.layers = resolve_layers(layers, architecture.depth)
        self.backbone = Backbone(
            architecture,
            drop_path=drop_path,
            activation_checkpointing=activation_checkpointing,
        )
        # blocks behind the last one read get no gradient, which DDP forbids for trainable ones
        for block in self.backbone.vit.blocks[self.layers[-1] + 1 :]:
            block.requires_grad_(False)
        self.decoder = TokenDecoder(
            len(self.layers) * architecture.embed_dim,
            num_classes,
            architecture.patch_size,
            chunk=decoder_chunk,
        )
        # fp16 needs a gradient scaler and its predictions overflow first: prefer native bf16
        self.autocast_dtype = torch.bfloat16 if has_bf16() else None

    def forward(
        self, images: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch classes height width"]:
        """Segment images of any size; sides are padded with zeros to whole patches and cropped.

        Returns:
            Logits, in fp32 where bf16 autocast is active.
        """
        if self.autocast_dtype and images.is_cuda and torch.is_autocast_enabled():
            with torch.autocast("cuda", dtype=self.autocast_dtype):
                logits = self._forward(images)
            return logits.float()
        return self._forward(images)

    def _forward(
        self, images: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch classes height width"]:
        height, width = images.shape[-2:]
        p = self.backbone.patch_size
        images = F.pad(images, (0, -width % p, 0, -height % p))
        if self.input_channels == 1 and self.backbone.architecture.input_channels == 3:
            images = images.expand(-1, 3, -1, -1)
        tokens = self.backbone.intermediate_tokens(images, self.layers)
        aggregated = torch.cat([t.patches for t in tokens], dim=-1)  # (B, P, layers * D)
        grid_size = images.shape[-2] // p, images.shape[-1] // p
        return self.decoder(aggregated, grid_size)[..., :height, :width]


def resolve_layers(layers: list[int] | str | None, depth: int) -> list[int]:
    """Return block indices for a list of them, ``"last"`` or None (the end of every quarter).

    Raises:
        ValueError: If they are not block indices of a ViT of that depth in depth order.
    """
    if layers is None:
        return default_layers(depth)
    if layers == "last":
        return [depth - 1]
    if isinstance(layers, str):
        raise ValueError(f'layers must be block indices or "last", got {layers!r}')
    check_layers(layers, depth)
    return list(layers)
