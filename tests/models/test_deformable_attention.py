"""Deformable attention: equal to bilinear sampling written out sample by sample."""

import math

import pytest
import torch

from nnunetv2_meddinov3.models.deformable_attention import (
    DeformableAttention,
    pixel_centres,
    sample_deformable,
)


def bilinear(image, x, y):
    """The value of one image (H, W) at (x, y) from 0 to 1 between its outer edges; zero outside."""
    height, width = image.shape
    column, row = x * width - 0.5, y * height - 0.5
    left, top = math.floor(column), math.floor(row)
    value = 0.0
    for j, i, part in (
        (top, left, (1 - (row - top)) * (1 - (column - left))),
        (top, left + 1, (1 - (row - top)) * (column - left)),
        (top + 1, left, (row - top) * (1 - (column - left))),
        (top + 1, left + 1, (row - top) * (column - left)),
    ):
        if 0 <= j < height and 0 <= i < width:
            value += part * float(image[j, i])
    return value


def by_hand(values, locations, weights):
    batch, heads, channels = values.shape[:3]
    queries, points = locations.shape[1], locations.shape[3]
    out = torch.zeros(batch, queries, heads, channels, dtype=torch.float64)
    for b in range(batch):
        for q in range(queries):
            for h in range(heads):
                for c in range(channels):
                    for p in range(points):
                        x, y = map(float, locations[b, q, h, p])
                        part = float(weights[b, q, h, p])
                        out[b, q, h, c] += part * bilinear(values[b, h, c], x, y)
    return out.flatten(2)


@pytest.mark.parametrize("size", [(5, 7), (8, 3), (1, 1)])
@pytest.mark.parametrize("reach", [1.0, 3.0])
def test_sampling_is_bilinear_and_zero_outside(size, reach):
    generator = torch.Generator().manual_seed(1)
    kw = {"generator": generator, "dtype": torch.float64}
    values = torch.randn(2, 3, 2, *size, **kw)
    locations = 0.5 + reach * (torch.rand(2, 6, 3, 4, 2, **kw) - 0.5)
    weights = torch.randn(2, 6, 3, 4, **kw)
    ours = sample_deformable(values, locations, weights)
    torch.testing.assert_close(ours, by_hand(values, locations, weights), rtol=0, atol=1e-12)


@torch.no_grad()
def test_the_layer_is_the_formula_of_its_paper():
    torch.manual_seed(0)
    layer = DeformableAttention(32, heads=4, points=3, value_ratio=0.5)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    queries, maps = torch.randn(2, 5, 32), torch.randn(2, 32, 6, 4)
    references = torch.rand(5, 2)
    values = torch.einsum("bchw,dc->bdhw", maps, layer.values.weight)
    values = (values + layer.values.bias[:, None, None]).reshape(2, 4, 4, 6, 4)
    offsets = layer.offsets(queries).reshape(2, 5, 4, 3, 2)
    locations = references[None, :, None, None] + offsets / torch.tensor([4.0, 6.0])
    weights = layer.weights(queries).reshape(2, 5, 4, 3).softmax(-1)
    wanted = layer.output(by_hand(values, locations, weights).float())
    torch.testing.assert_close(layer(queries, references, maps), wanted, rtol=1e-4, atol=1e-5)


def test_a_pixel_looks_at_itself_where_offsets_are_zero():
    layer = DeformableAttention(16, heads=1, points=1, value_ratio=1.0)
    for p in (layer.offsets, layer.weights):
        torch.nn.init.zeros_(p.weight)
        torch.nn.init.zeros_(p.bias)
    for p in (layer.values, layer.output):
        torch.nn.init.eye_(p.weight)
    maps = torch.randn(1, 16, 3, 5)
    centres = pixel_centres(3, 5, maps.device)
    seen = layer(torch.randn(1, 15, 16), centres, maps)
    torch.testing.assert_close(seen, maps.flatten(2).transpose(1, 2))


def test_all_three_inputs_of_sampling_get_their_gradients():
    generator = torch.Generator().manual_seed(2)
    kw = {"generator": generator, "dtype": torch.float64, "requires_grad": True}
    inputs = (
        torch.randn(1, 2, 2, 4, 3, **kw),
        torch.rand(1, 3, 2, 2, 2, **kw),
        torch.randn(1, 3, 2, 2, **kw),
    )
    assert torch.autograd.gradcheck(sample_deformable, inputs)


def test_values_that_the_heads_cannot_share_are_refused():
    with pytest.raises(ValueError, match="multiple of the 16 heads, got 20"):
        DeformableAttention(40)
