"""SegFormer (https://arxiv.org/abs/2105.15203) on segmentation-models-pytorch's encoder and head.

The library is an extra (``benchmark``). It is preferred to transformers because all that it needs
is needed here anyway, because it runs on every Python that this package runs on, and because its
ImageNet weights are plain files of one naming.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.models.build import adapt_stem, stem_channels
from nnunetv2_meddinov3.models.formats import listing
from nnunetv2_meddinov3.models.resolve import fetch, parse_source
from nnunetv2_meddinov3.models.segmentation_network import Network
from nnunetv2_meddinov3.models.tensor_files import read_files

LICENCE = "NVIDIA Source Code License for SegFormer (research and evaluation only)"
_STEM = "patch_embed1.proj.weight"
# The encoder that stands beside a ViT of each size; B2 beside ViT-B is the paper's.
ENCODERS = {
    "vit_tiny": "mit_b0",
    "vit_small": "mit_b1",
    "vit_small_plus": "mit_b1",
    "vit_base": "mit_b2",
    "vit_large": "mit_b5",
    "vit_huge_plus": "mit_b5",
    "vit_7b": "mit_b5",
}


@dataclass(frozen=True)
class EncoderWeights:
    """An ImageNet encoder from a file.

    Attributes:
        tensors: Name -> tensor, those of the encoder and no other.
        source: Where they come from.
        licence: Their terms.
    """

    tensors: dict[str, Tensor]
    source: str
    licence: str = LICENCE

    @property
    def metadata(self) -> dict[str, Any]:
        """What the file states besides tensors: nothing."""
        return {}

    def report(self) -> str:
        """Say what was read."""
        return f"{self.source}: {len(self.tensors)} tensors used"


class SkipMixFFN(nn.Module):
    """SegFormer's MixFFN with a skip around its depth-wise convolution, and a LayerNorm.

    ``fc2(GELU(norm(dwconv(fc1(x)) + fc1(x))))``, as MISSFormer has it
    (https://arxiv.org/abs/2109.07162) and the networks compared in MedDINOv3.

    Args:
        mlp: The MixFFN whose layers are taken over.
    """

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.fc1, self.dwconv, self.fc2 = mlp.fc1, mlp.dwconv, mlp.fc2
        self.norm = nn.LayerNorm(mlp.fc1.out_features)
        self.act = nn.GELU()

    def forward(
        self, x: Float[Tensor, "batch token dim"], height: int, width: int
    ) -> Float[Tensor, "batch token dim"]:
        """Mix the tokens of a map with ``height`` times ``width`` of them."""
        hidden = self.fc1(x)
        return self.fc2(self.act(self.norm(self.dwconv(hidden, height, width) + hidden)))


class Head(nn.Module):
    """SegFormer's MLP head, and a transposed convolution from stride 4 to full resolution.

    Args:
        channels: Channels of the encoder's outputs, as the library counts them.
        width: Channels to which each of them is brought.
        num_classes: Output channels K.
        dropout: Rate of dropped channels before the classification.
    """

    def __init__(
        self, channels: list[int], width: int, num_classes: int, dropout: float = 0.2
    ) -> None:
        super().__init__()
        from segmentation_models_pytorch.decoders.segformer.decoder import SegformerDecoder

        self.fusion = SegformerDecoder(channels, segmentation_channels=width)
        self.dropout = nn.Dropout2d(dropout)
        # nnU-Net's -pretrained_weights leaves out what is called seg_layers
        self.seg_layers = nn.ModuleList(
            [
                nn.Conv2d(width, num_classes, 1),
                nn.ConvTranspose2d(num_classes, num_classes, kernel_size=4, stride=4),
            ]
        )

    def forward(self, features: list[Tensor]) -> Float[Tensor, "batch classes height width"]:
        """Decode the encoder's maps to logits."""
        x = self.dropout(self.fusion(features))
        for layer in self.seg_layers:
            x = layer(x)
        return x


class SegFormer(Network):
    """A Mix Transformer and SegFormer's head.

    Args:
        input_channels: Channels of the images. One is repeated to the encoder's three; otherwise
            the encoder has as many.
        num_classes: Output channels K.
        encoder: ``mit_b0`` to ``mit_b5``.
        skip_in_ffn: Whether the MixFFN has a skip, as the networks compared in MedDINOv3 do; the
            published ImageNet weights are for encoders without.
        deep_supervision: Must be False.

    Raises:
        UserError: If segmentation-models-pytorch is not installed.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        encoder: str = "mit_b2",
        skip_in_ffn: bool = False,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__(input_channels, stem_channels(3, input_channels), 32, deep_supervision)
        library = require_library()
        if not encoder.startswith("mit_b") or encoder not in library.encoders.encoders:
            raise ValueError(f"encoder must be one of mit_b0 to mit_b5, got {encoder!r}")
        self.encoder: Any = library.encoders.get_encoder(encoder, weights=None)
        if skip_in_ffn:
            for block in _blocks(self.encoder):
                block.mlp = SkipMixFFN(block.mlp)
        width = 256 if encoder in ("mit_b0", "mit_b1") else 768  # SegFormer, sec. 4.1
        self.decoder = Head(self.encoder.out_channels, width, num_classes)
        if skip_in_ffn:
            self.apply(_draw_as_the_reference)
        if self.stem_channels != 3:
            stem = self.encoder.patch_embed1.proj
            self.encoder.patch_embed1.proj = nn.Conv2d(
                self.stem_channels,
                stem.out_channels,
                stem.kernel_size,
                stride=stem.stride,
                padding=stem.padding,
            )

    def load_encoder(self, weights: EncoderWeights, image_channels: int) -> None:
        """Copy an ImageNet encoder, its stem made to fit the channels of the images.

        Args:
            weights: From ``read_encoder``.
            image_channels: Channels of the images without one-hot channels.
        """
        tensors = dict(weights.tensors)
        if self.input_channels != 1:  # else grey is repeated
            tensors[_STEM] = adapt_stem(tensors[_STEM], image_channels, self.stem_channels)
        self.encoder.load_state_dict(tensors)

    def _segment(
        self, images: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch classes height width"]:
        return self.decoder(self.encoder(images))


def require_library() -> Any:
    """Import segmentation-models-pytorch.

    Raises:
        UserError: If it is not installed.
    """
    try:
        import segmentation_models_pytorch
    except ImportError as error:
        raise UserError(
            "SegFormer needs the library segmentation-models-pytorch, for prediction too, but it "
            f"cannot be imported ({error}): pip install 'nnunetv2-meddinov3[benchmark]'."
        ) from error
    return segmentation_models_pytorch


def imagenet_source(encoder: str) -> str:
    """Return where the library's ImageNet weights of an encoder are, as a source of weights."""
    place = require_library().encoders.encoders[encoder]["pretrained_settings"]["imagenet"]
    return f"hf:{place['repo_id']}/model.safetensors@{place['revision']}"


def read_encoder(source: str, encoder: str) -> EncoderWeights:
    """Read an ImageNet encoder, in the names of the original code and of the library.

    Args:
        source: A path or ``hf:OWNER/REPO/FILE[@REV]``.
        encoder: ``mit_b0`` to ``mit_b5``.

    Raises:
        UserError: If it cannot be reached or read, or is not that encoder, whole and finite.
    """
    if parse_source(source).kind not in ("path", "hf"):
        raise UserError(
            f"weights of SegFormer must be a path or hf:OWNER/REPO/FILE[@REV], got {source!r}."
        )
    found = read_files(fetch(source), source).tensors
    found = {name: t for name, t in found.items() if not name.startswith("head.")}
    wanted = require_library().encoders.get_encoder(encoder, weights=None).state_dict()
    wrong = [n for n in wanted if n not in found or found[n].shape != wanted[n].shape]
    wrong += [n for n in found if n not in wanted]
    if wrong:
        raise UserError(
            f"{source} must hold the encoder {encoder} as segmentation-models-pytorch and the "
            f"original code name it, but it differs in {listing(wrong)}: unset MEDDINOV3_WEIGHTS, "
            "or set it to such a file."
        )
    if broken := [n for n, t in found.items() if not torch.isfinite(t).all()]:
        raise UserError(
            f"weights must be finite numbers, but {source} holds NaN or infinity in "
            f"{listing(broken)}: fetch the file again."
        )
    return EncoderWeights({n: t.float() for n, t in found.items()}, source)


def _blocks(encoder: Any) -> list[Any]:
    return [b for n in (1, 2, 3, 4) for b in getattr(encoder, f"block{n}")]


def _draw_as_the_reference(module: nn.Module) -> None:
    """Draw Xavier weights and zero biases, as the networks compared in MedDINOv3 start."""
    if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
