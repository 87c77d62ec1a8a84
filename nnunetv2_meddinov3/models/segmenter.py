"""The segmenter: images of any channel count -> backbone tokens of several depths -> logits."""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from nnunetv2_meddinov3.models.decoder import TokenDecoder
from nnunetv2_meddinov3.models.segmentation_network import ViTNetwork, resolve_layers

__all__ = ["Segmenter", "resolve_layers"]


class Segmenter(ViTNetwork):
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
        decoder_chunk: Tokens decoded at a time; ``"auto"`` for as many as are fast on the device,
            None for whole maps, as the reference decodes them.
        copies: How many times the decoder gets the tokens. Four copies of one block's tokens give
            it exactly the size that it has for four blocks.
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
        decoder_chunk: int | Literal["auto"] | None = "auto",
        copies: int = 1,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__(
            input_channels,
            backbone,
            layers,
            drop_path,
            activation_checkpointing,
            deep_supervision=deep_supervision,
        )
        if copies < 1:
            raise ValueError(f"copies must be at least 1, got {copies}")
        self.copies = copies
        self.decoder: TokenDecoder = TokenDecoder(
            len(self.layers) * copies * self.backbone.embed_dim,
            num_classes,
            self.backbone.patch_size,
            chunk=decoder_chunk,
        )

    def _segment(
        self, images: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch classes height width"]:
        tokens = self.backbone.intermediate_tokens(images, self.layers)
        aggregated = torch.cat([t.patches for t in tokens] * self.copies, dim=-1)
        p = self.backbone.patch_size
        return self.decoder(aggregated, (images.shape[-2] // p, images.shape[-1] // p))
