"""The token decoder: matrix products on chunks of tokens against convolutions on whole maps."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nnunetv2_meddinov3.models.decoder import TokenDecoder

WIDTH, CLASSES, GRID = 64, 3, (3, 5)


def pair(chunk, **arguments):
    """Two decoders with the same random weights: one on whole maps, one on chunks."""
    torch.manual_seed(0)
    plain = TokenDecoder(WIDTH, CLASSES, chunk=None, **arguments)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    chunked = TokenDecoder(WIDTH, CLASSES, chunk=chunk, **arguments)
    chunked.load_state_dict(plain.state_dict())
    return plain, chunked


def test_whole_maps_are_decoded_by_plain_layers_of_torch():
    """Against transposed convolutions, a norm over channels, GELU and a 1x1 convolution."""
    decoder, _ = pair(None)
    decoder.double()  # in fp32 the rounding of two kernels differs as much as the processor's
    tokens = torch.randn(2, 15, WIDTH, dtype=torch.float64)
    x = tokens.transpose(1, 2).unflatten(2, GRID)
    for stage in decoder.upsampling:
        x = F.conv_transpose2d(x, stage.conv.weight, stage.conv.bias, stride=2)
        x = F.layer_norm(
            x.movedim(1, -1), x.shape[1:2], stage.norm.weight, stage.norm.bias, eps=1e-6
        )
        x = F.gelu(x.movedim(-1, 1))
    x = F.conv2d(x, decoder.seg_layers[0].weight, decoder.seg_layers[0].bias)
    torch.testing.assert_close(decoder(tokens, GRID), x, rtol=1e-9, atol=1e-9)
    assert x.shape == (2, CLASSES, 48, 80)


@pytest.mark.parametrize("chunk", [1, 7, 10, 16, 29])
@pytest.mark.parametrize("grid", [(3, 5), (5, 3), (1, 15)])
def test_chunks_of_any_size_give_values_and_gradients_of_whole_maps(chunk, grid):
    plain, chunked = pair(chunk)
    tokens = torch.randn(2, 15, WIDTH)
    results = []
    for decoder in (plain, chunked):
        given = tokens.clone().requires_grad_()
        logits = decoder(given, grid)
        weight = torch.linspace(-1, 1, logits.numel()).view_as(logits)
        (logits * weight).sum().backward()
        results.append([logits.detach(), given.grad, *(p.grad for p in decoder.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4 * float(one.abs().max()))


@pytest.mark.parametrize("patch_size", [2, 4, 8, 16])
def test_every_patch_size_has_both_ways(patch_size):
    plain, chunked = pair(4, patch_size=patch_size)
    tokens = torch.randn(1, 15, WIDTH)
    with torch.no_grad():
        one, other = plain(tokens, GRID), chunked(tokens, GRID)
    assert one.shape == (1, CLASSES, 3 * patch_size, 5 * patch_size)
    torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


def test_a_pixel_sees_its_own_token_only():
    _, decoder = pair(4)
    tokens = torch.randn(1, 15, WIDTH)
    with torch.no_grad():
        before = decoder(tokens, GRID)
        tokens[0, 7] += 1  # row 1, column 2
        changed = (decoder(tokens, GRID) != before).any(dim=1)[0]
    expected = torch.zeros(48, 80, dtype=torch.bool)
    expected[16:32, 32:48] = True
    assert torch.equal(changed, expected)


@pytest.mark.parametrize(
    ("chunk", "tokens", "pieces"),
    [("auto", 15, [15]), ("auto", 150, [128, 22]), (7, 15, [7, 7, 1])],
)
def test_tokens_are_decoded_so_many_at_a_time_and_weights_laid_out_once(
    chunk, tokens, pieces, monkeypatch
):
    """However few they are: whole maps are slower at any size."""
    _, decoder = pair(chunk)
    seen, laid_out = [], []
    decode, matrix = decoder._decode, type(decoder.upsampling[0]).matrix
    monkeypatch.setattr(decoder, "_decode", lambda x, m: seen.append(len(x)) or decode(x, m))
    monkeypatch.setattr(
        type(decoder.upsampling[0]), "matrix", lambda stage: laid_out.append(stage) or matrix(stage)
    )
    with torch.no_grad():
        decoder(torch.randn(1, tokens, WIDTH), (tokens // 5, 5))
    assert seen == pieces
    assert laid_out == list(decoder.upsampling)


def test_parameters_have_the_names_and_shapes_of_the_references():
    shapes = {n: tuple(p.shape) for n, p in pair(7)[1].state_dict().items()}
    expected = {"seg_layers.0.weight": (CLASSES, 4, 1, 1), "seg_layers.0.bias": (CLASSES,)}
    for i, width in enumerate((64, 32, 16, 8)):
        expected |= {
            f"upsampling.{i}.conv.weight": (width, width // 2, 2, 2),
            f"upsampling.{i}.conv.bias": (width // 2,),
            f"upsampling.{i}.norm.weight": (width // 2,),
            f"upsampling.{i}.norm.bias": (width // 2,),
        }
    assert shapes == expected
    assert isinstance(pair(7)[1].upsampling[0].conv, nn.ConvTranspose2d)


def _kept_bytes(decoder, tokens, grid):
    """Bytes of every distinct storage that the forward pass keeps for the backward pass."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)  # so that no address is used twice
        return tensor

    alive = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = decoder(tokens, grid)
    return sum(kept.values()), logits


def test_no_full_map_is_kept_for_the_backward_pass():
    plain, chunked = pair(8)
    tokens, grid = torch.randn(2, 64, WIDTH, requires_grad=True), (8, 8)
    one, logits = _kept_bytes(plain, tokens, grid)
    other, _ = _kept_bytes(chunked, tokens, grid)
    assert other < one / 3
    assert other < logits.nbytes  # less than even the logits: the tokens and the parameters


@pytest.mark.parametrize(("tokens", "is_recomputed"), [(512, False), (516, True)])
def test_few_tokens_are_not_recomputed(tokens, is_recomputed, monkeypatch):
    decoder = TokenDecoder(WIDTH, CLASSES)
    decoded, decode = [], decoder._decode
    monkeypatch.setattr(decoder, "_decode", lambda x, m: decoded.append(len(x)) or decode(x, m))
    decoder(torch.randn(1, tokens, WIDTH), (tokens // 4, 4)).sum().backward()
    assert sum(decoded) == tokens * (2 if is_recomputed else 1)


def test_without_gradients_nothing_is_recomputed(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("nothing is recomputed without gradients")

    monkeypatch.setattr("nnunetv2_meddinov3.models.decoder.checkpoint", refuse)
    plain, chunked = pair(4)
    tokens = torch.randn(1, 15, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(chunked(tokens, GRID), plain(tokens, GRID), rtol=1e-4, atol=1e-5)
    with pytest.raises(AssertionError, match="nothing is recomputed"):
        chunked(tokens, GRID)


def test_chunks_work_under_autocast():
    plain, chunked = pair(7)
    tokens = torch.randn(2, 15, WIDTH)
    with torch.no_grad():
        exact = plain(tokens, GRID)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = chunked(tokens, GRID)
    assert rounded.shape == exact.shape
    assert (rounded - exact).abs().mean() < 0.02 * exact.abs().mean()


@pytest.mark.parametrize(
    "arguments", [{"patch_size": 12}, {"in_channels": 72}, {"chunk": 0}, {"chunk": -5}]
)
def test_impossible_decoders_are_refused(arguments):
    with pytest.raises(ValueError, match="must be"):
        TokenDecoder(**{"in_channels": WIDTH, "num_classes": 2, **arguments})
