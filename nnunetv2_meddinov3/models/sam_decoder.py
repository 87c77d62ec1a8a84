"""A ViT with the mask decoder of Segment Anything (https://arxiv.org/abs/2304.02643), app. A.

As the authors of MedDINOv3 use it (their code has it, their paper does not): no prompts, one mask
token per class. SAM's token and head for the quality of a mask are left out, because nothing here
reads them and DDP forbids parameters without a gradient.
"""

import math
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_meddinov3.models.segmentation_network import LayerNorm2d, ViTNetwork, resize


class Attention(nn.Module):
    """Attention whose inner width may be smaller than that of its tokens.

    Args:
        dim: Width of the tokens.
        heads: Attention heads.
        downsampling: Width of the tokens over inner width.
    """

    def __init__(self, dim: int, heads: int, downsampling: int = 1) -> None:
        super().__init__()
        inner = dim // downsampling
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(dim, inner) for _ in range(3))
        self.output = nn.Linear(inner, dim)

    def forward(
        self,
        q: Float[Tensor, "batch query dim"],
        k: Float[Tensor, "batch key dim"],
        v: Float[Tensor, "batch key dim"],
    ) -> Float[Tensor, "batch query dim"]:
        """Attend from ``q`` to ``k``, and return what is there of ``v``."""
        parts = [f(x) for f, x in ((self.q, q), (self.k, k), (self.v, v))]
        parts = [x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in parts]
        attended = F.scaled_dot_product_attention(*parts)
        return self.output(attended.transpose(1, 2).flatten(2))


class TwoWayBlock(nn.Module):
    """Class tokens look at each other and at the image, then the image looks at them.

    Args:
        dim: Width of class tokens and image tokens.
        heads: Attention heads.
        hidden: Hidden width of the feed-forward layer.
    """

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.self_attention = Attention(dim, heads)
        self.to_image = Attention(dim, heads, downsampling=2)
        self.to_classes = Attention(dim, heads, downsampling=2)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(4))

    def forward(
        self,
        classes: Float[Tensor, "batch class dim"],
        image: Float[Tensor, "batch patch dim"],
        tokens: Float[Tensor, "batch class dim"],
        places: Float[Tensor, "1 patch dim"],
        is_first: bool,
    ) -> tuple[Float[Tensor, "batch class dim"], Float[Tensor, "batch patch dim"]]:
        """Return class tokens and image tokens after the block.

        Args:
            classes: What the class tokens have become.
            image: What the image tokens have become.
            tokens: The class tokens themselves, added again in every attention.
            places: Where the image tokens are, likewise.
            is_first: Whether ``classes`` are still the tokens themselves.
        """
        if is_first:
            classes = self.norms[0](self.self_attention(classes, classes, classes))
        else:
            q = classes + tokens
            classes = self.norms[0](classes + self.self_attention(q, q, classes))
        seen = self.to_image(classes + tokens, image + places, image)
        classes = self.norms[1](classes + seen)
        classes = self.norms[2](classes + self.mlp(classes))
        seen = self.to_classes(image + places, classes + tokens, classes)
        return classes, self.norms[3](image + seen)


class ClassMasks(nn.Module):
    """A token and a small network for each class: what depends on the number of classes.

    Args:
        num_classes: Classes K.
        dim: Width of a token.
        width: Channels of the maps that are weighed.
    """

    def __init__(self, num_classes: int, dim: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(num_classes, dim))
        self.networks = nn.ModuleList(
            nn.Sequential(
                *(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU()),
                nn.Linear(dim, width),
            )
            for _ in range(num_classes)
        )

    def forward(
        self, classes: Float[Tensor, "batch class dim"], maps: Float[Tensor, "batch width h w"]
    ) -> Float[Tensor, "batch class h w"]:
        """Weigh the channels of maps for each class."""
        weights = [network(classes[:, n]) for n, network in enumerate(self.networks)]
        return torch.einsum("bkc,bchw->bkhw", torch.stack(weights, dim=1), maps)


class MaskDecoder(nn.Module):
    """SAM's neck, positional encoding, two-way transformer and mask head.

    Args:
        in_channels: Width of the ViT's maps.
        num_classes: Output channels K.
        dim: Width of the decoder.
        depth: Two-way blocks.
        heads: Attention heads.
        hidden: Hidden width of the feed-forward layers.
    """

    places: Tensor

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        dim: int = 256,
        depth: int = 2,
        heads: int = 8,
        hidden: int = 2048,
    ) -> None:
        super().__init__()
        self.neck = nn.Sequential(
            nn.Conv2d(in_channels, dim, 1, bias=False),
            LayerNorm2d(dim, eps=1e-6),
            nn.Conv2d(dim, dim, 3, padding=1, bias=False),
            LayerNorm2d(dim, eps=1e-6),
        )
        self.no_prompt = nn.Parameter(torch.randn(dim))
        self.register_buffer("places", torch.randn(2, dim // 2))
        self.blocks = nn.ModuleList(TwoWayBlock(dim, heads, hidden) for _ in range(depth))
        self.last_look = Attention(dim, heads, downsampling=2)
        self.last_norm = nn.LayerNorm(dim)
        self.up = nn.Sequential(
            nn.ConvTranspose2d(dim, dim // 4, kernel_size=2, stride=2),
            LayerNorm2d(dim // 4, eps=1e-6),
            nn.GELU(),
            nn.ConvTranspose2d(dim // 4, dim // 8, kernel_size=2, stride=2),
            nn.GELU(),
        )
        # nnU-Net's -pretrained_weights leaves out what is called seg_layers
        self.seg_layers = nn.ModuleList([ClassMasks(num_classes, dim, dim // 8)])

    def forward(
        self, maps: Float[Tensor, "batch channel rows columns"]
    ) -> Float[Tensor, "batch classes 4*rows 4*columns"]:
        """Decode maps of the ViT to logits, at a quarter of their stride."""
        embedded = self.neck(maps) + self.no_prompt[:, None, None]
        image, places = embedded.flatten(2).transpose(1, 2), self._encode(maps)
        masks = cast("ClassMasks", self.seg_layers[0])
        tokens = masks.tokens.expand(len(maps), -1, -1)
        classes = tokens
        for n, block in enumerate(self.blocks):
            classes, image = block(classes, image, tokens, places, n == 0)
        seen = self.last_look(classes + tokens, image + places, image)
        classes = self.last_norm(classes + seen)
        return masks(classes, self.up(image.transpose(1, 2).unflatten(2, maps.shape[2:])))

    def _encode(self, maps: Tensor) -> Float[Tensor, "1 patch dim"]:
        """Return random Fourier features of the places of a map's pixels."""
        rows, columns = (
            (torch.arange(n, device=maps.device) + 0.5) * 2 / n - 1 for n in maps.shape[2:]
        )
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        with torch.autocast(maps.device.type, enabled=False):  # bf16 would blur the places
            angles = 2 * math.pi * (torch.stack([x, y], dim=-1).flatten(0, 1) @ self.places.float())
        return torch.cat([angles.sin(), angles.cos()], dim=-1)[None]


class SamSegmenter(ViTNetwork):
    """A ViT and SAM's mask decoder on its last block.

    Args:
        input_channels: Channels of the images.
        num_classes: Output channels K.
        backbone: Fields of an ``Architecture``.
        layers: The one block that is read; the last by default.
        drop_path: Rate of stochastic depth.
        activation_checkpointing: Whether the ViT's blocks are recomputed in the backward pass.
        input_scale: How many times the images are enlarged first. Logits have a quarter of the
            ViT's stride; with 4, as the reference does, that is one pixel for patches of 16, at 16
            times the tokens. With 1 they are interpolated, as SAM does.
        deep_supervision: Must be False.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        backbone: dict[str, Any],
        layers: list[int] | str | None = "last",
        drop_path: float = 0.0,
        activation_checkpointing: bool = False,
        input_scale: int = 1,
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
        if len(self.layers) != 1 or input_scale < 1:
            raise ValueError(
                "this decoder reads one block, of images enlarged 1 or more times, got blocks "
                f"{self.layers} and a scale of {input_scale}"
            )
        self.input_scale = input_scale
        self.decoder = MaskDecoder(self.backbone.embed_dim, num_classes)

    def _segment(
        self, images: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch classes height width"]:
        size = images.shape[2:]
        if self.input_scale != 1:
            images = resize(images, [side * self.input_scale for side in size])
        logits = self.decoder(*self._features(images))
        return logits if logits.shape[2:] == size else resize(logits, size)
