"""Projection heads: tokens to prototype logits (DINO; DINOv2; DINOv3, sec. 3)."""

from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class ProjectionHead(nn.Module):
    """An MLP to a bottleneck, its output normalised, then one linear layer to the prototypes.

    The last layer has no bias and, as in DINOv3, no weight normalisation.

    Args:
        in_dim: Token width D.
        prototypes: Logits K.
        hidden_dim: Width of the hidden layers.
        bottleneck_dim: Width before the prototypes.
        layers: Linear layers up to the bottleneck.
    """

    def __init__(
        self,
        in_dim: int,
        prototypes: int,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        layers: int = 3,
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers must be at least 1, got {layers}")
        widths = [in_dim, *[hidden_dim] * (layers - 1), bottleneck_dim]
        modules: list[nn.Module] = []
        for wide, narrow in pairwise(widths):
            modules += [nn.Linear(wide, narrow), nn.GELU()]
        self.mlp = nn.Sequential(*modules[:-1])
        self.last_layer = nn.Linear(bottleneck_dim, prototypes, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw fresh weights: N(0, 0.02), zero biases."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, tokens: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens prototype"]:
        """Return the logits of tokens."""
        return self.last_layer(F.normalize(self.mlp(tokens), dim=-1))
