import pytest
import torch
from pretrain_recorded import fill, sine
from timm.models.eva import EvaBlock

from nnunetv2_meddinov3.models.architecture import Architecture
from nnunetv2_meddinov3.models.backbone import Backbone, rotary_embedding
from nnunetv2_meddinov3.pretrain.heads import ProjectionHead
from nnunetv2_meddinov3.pretrain.student import (
    StochasticOptions,
    Student,
    augmented_embeddings,
    encode,
    pack_blocks,
)


def a_vit(**overrides):
    fields = {"patch_size": 4, "norm_eps": 1e-5, **overrides}
    backbone = Backbone(Architecture(32, 2, 2, **fields), mask_token=True)
    return pack_blocks(fill(backbone, 0, 0.05, fields.get("ffn") == "swiglu")).eval()


IMAGES = sine((2, 3, 16, 24), 0.013, 0.5)


@pytest.mark.parametrize(
    ("overrides", "cls_sum", "cls", "patch_sum", "patches"),
    [
        (
            {},
            -1.198811,
            [-0.461753, 0.854320, -0.666032, -0.583238],
            4.558433,
            [0.811168, 0.203963, -1.434615, -0.037795],
        ),
        (
            {"ffn": "swiglu", "ffn_hidden": 88},
            -1.276223,
            [2.066831, 1.592694, 0.652434, -0.138285],
            5.236000,
            [-1.152008, -0.247215, 0.952026, 1.160724],
        ),
        (
            {"qkv_bias": False},
            -1.839787,
            [0.753194, 1.620150, 0.110444, 1.106240],
            -10.587385,
            [-1.227526, -0.012243, 0.555520, 1.943436],
        ),
        (
            {"norm_eps": 1e-6},
            -1.198047,
            [-0.461400, 0.853231, -0.663855, -0.585634],
            4.558918,
            [0.811123, 0.203897, -1.434761, -0.037727],
        ),
    ],
    ids=["base", "swiglu", "without qkv bias", "eps 1e-6"],
)
def test_tokens_are_those_recorded_from_the_original(overrides, cls_sum, cls, patch_sum, patches):
    with torch.no_grad():
        tokens = encode(a_vit(**overrides), [IMAGES])[0]
    assert tokens.cls.sum().item() == pytest.approx(cls_sum, abs=2e-5)
    assert tokens.cls[0, :4].tolist() == pytest.approx(cls, abs=2e-5)
    assert tokens.patches.sum().item() == pytest.approx(patch_sum, abs=1e-4)
    assert tokens.patches[0, 0, :4].tolist() == pytest.approx(patches, abs=2e-5)


def test_masked_tokens_are_those_recorded_from_the_original():
    mask = torch.zeros(2, 24, dtype=torch.bool)
    mask[0, ::3] = True
    with torch.no_grad():
        tokens = encode(a_vit(), [IMAGES], [mask])[0]
    wanted = [-0.300746, 1.006003, -0.763698, -0.558175]
    assert tokens.cls[0, :4].tolist() == pytest.approx(wanted, abs=2e-5)
    assert tokens.patches.sum().item() == pytest.approx(1.149971, abs=1e-4)


def test_several_groups_in_one_pass_give_what_they_give_one_by_one():
    vit = a_vit()
    groups = [IMAGES, IMAGES[:, :, :8, :12], IMAGES[:1, :, :, :16]]
    with torch.no_grad():
        together = encode(vit, groups)
        for group, tokens in zip(groups, together, strict=True):
            alone = encode(vit, [group])[0]
            for a, b in zip(tokens, alone, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_packed_forward_gives_what_the_backbone_of_fine_tuning_gives():
    backbone = Backbone(Architecture(32, 2, 2, rope_dtype="bf16", patch_size=8), mask_token=True)
    images = sine((2, 3, 24, 40), 0.02, 0.1)
    with torch.no_grad():
        wanted = backbone.eval().intermediate_tokens(images, [1])[0]
        found = encode(pack_blocks(backbone), [images])[0]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_packing_takes_over_the_parameters_by_name_and_leaves_timms_blocks_as_they_were():
    backbone = Backbone(Architecture(32, 2, 2, patch_size=8), mask_token=True).eval()
    names = [name for name, _ in backbone.named_parameters()]
    state = backbone.state_dict()
    block, tokens = backbone.vit.blocks[0], torch.randn(2, 9, 32)
    with torch.no_grad():
        before = block(tokens)
        packed = pack_blocks(backbone)
        assert type(block) is EvaBlock
        assert torch.equal(block(tokens), before)
    assert [name for name, _ in packed.named_parameters()] == names
    assert packed.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[k]) for k, t in packed.state_dict().items())
    first = packed.vit.blocks[0]
    assert pack_blocks(packed).vit.blocks[0] is first  # packing twice is packing once


def test_masks_of_zeros_are_no_masks_and_pixels_under_a_mask_do_not_matter():
    vit = a_vit()
    zeros = torch.zeros(2, 24, dtype=torch.bool)
    mask = zeros.clone()
    mask[:, 5] = True  # the patch of rows 0-3 and columns 20-23
    other = IMAGES.clone()
    other[:, :, :4, 20:] = 7
    with torch.no_grad():
        plain, masked, blind = (
            encode(vit, [x], [m])[0].patches
            for x, m in ((IMAGES, zeros), (IMAGES, mask), (other, mask))
        )
        assert torch.equal(plain, encode(vit, [IMAGES])[0].patches)
    assert torch.equal(masked, blind)
    assert not torch.allclose(plain, masked)


def test_the_mask_token_gets_a_gradient_with_and_without_masks():
    vit = a_vit()
    encode(vit, [IMAGES])[0].cls.sum().backward()
    assert vit.mask_token.grad is not None
    mask = torch.ones(2, 24, dtype=torch.bool)
    encode(vit, [IMAGES], [mask])[0].cls.sum().backward()
    assert vit.mask_token.grad.abs().sum() > 0


def drop(rate, batch, seed=0):
    vit = a_vit()
    images = sine((batch, 3, 8, 8), 0.3, 0.2)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        return encode(vit, [images], None, StochasticOptions(drop_path=rate), generator)[0].cls


@pytest.mark.parametrize(
    ("batch", "rate", "kept"), [(10, 0.3, 7), (4, 0.3, 2), (2, 0.1, 1), (1, 0.9, 1)]
)
def test_stochastic_depth_keeps_the_originals_number_of_images(batch, rate, kept):
    calls = []
    vit = a_vit()
    for block in vit.vit.blocks:
        block.mlp.register_forward_pre_hook(lambda m, args: calls.append(args[0].shape[0]))
        block.attn.proj.register_forward_pre_hook(lambda m, args: calls.append(args[0].shape[0]))
    images = sine((batch, 3, 8, 8), 0.3, 0.2)
    encode(vit, [images], None, StochasticOptions(drop_path=rate), torch.Generator().manual_seed(0))
    assert set(calls) == {kept * (1 + 4 + 4)}


def test_the_mean_over_draws_of_one_branch_is_the_branch():
    vit = a_vit()
    vit.vit.blocks = vit.vit.blocks[:1]
    vit.vit.blocks[0].gamma_2.data.zero_()  # attention alone
    vit.vit.norm = torch.nn.Identity()
    images = sine((4, 3, 8, 8), 0.3, 0.2)
    with torch.no_grad():
        whole = encode(vit, [images])[0].cls
        generator = torch.Generator().manual_seed(0)
        draws = [
            encode(vit, [images], None, StochasticOptions(drop_path=0.5), generator)[0].cls
            for _ in range(400)
        ]
    torch.testing.assert_close(torch.stack(draws).mean(0), whole, rtol=0, atol=0.02)


def test_draws_come_from_the_generator_alone():
    assert torch.equal(drop(0.5, 8, seed=1), drop(0.5, 8, seed=1))
    assert not torch.equal(drop(0.5, 8, seed=1), drop(0.5, 8, seed=2))
    with pytest.raises(ValueError, match="need a generator"):
        encode(a_vit(), [IMAGES], None, StochasticOptions(drop_path=0.5))


def test_every_block_and_every_group_sees_another_scale(monkeypatch):
    from nnunetv2_meddinov3.pretrain import student

    seen = []
    original = student.rotary_embedding

    def note(*args, **kwargs):
        seen.append(kwargs["factor"].tolist())
        return original(*args, **kwargs)

    monkeypatch.setattr(student, "rotary_embedding", note)
    noise = StochasticOptions(rope_rescale=2.0)
    encode(a_vit(), [IMAGES, IMAGES[:, :, :8, :8]], None, noise, torch.Generator().manual_seed(0))
    assert len(seen) == 2
    seen = [factor for group in seen for factor in group]
    assert len(seen) == 4
    assert len({tuple(f) for f in seen}) == 4
    assert all(h == w and 0.5 <= h <= 2 for h, w in seen)


def test_an_embedding_of_several_draws_is_each_draws_own():
    periods, grid = torch.tensor([1.0, 3.0]), (2, 3)
    shift = torch.tensor([[0.1, -0.3], [0.0, 0.2]])
    factor = torch.tensor([[1.5, 0.7], [0.9, 1.0]])
    together = rotary_embedding(periods, grid, torch.float32, shift=shift, factor=factor)
    for i in range(2):
        own = rotary_embedding(periods, grid, torch.float32, shift=shift[i], factor=factor[i])
        assert torch.equal(together[i], own)


def test_shift_jitter_and_scale_keep_to_their_limits(monkeypatch):
    from nnunetv2_meddinov3.pretrain import student

    vit, noise = a_vit(), StochasticOptions(rope_shift=0.3, rope_jitter=1.5, rope_rescale=2.0)
    vit.vit.blocks = torch.nn.ModuleList(list(vit.vit.blocks) * 500)
    seen = {}
    original = student.rotary_embedding

    def note(*args, **kwargs):
        seen.update(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(student, "rotary_embedding", note)
    augmented_embeddings(vit, (2, 3), noise, torch.Generator().manual_seed(0))
    shift, factor = seen["shift"], seen["factor"]
    assert shift.abs().max() <= 0.3
    assert shift.abs().mean().item() == pytest.approx(0.15, abs=0.01)
    assert not torch.equal(shift[:, 0], shift[:, 1])
    ratio = (factor[:, 0] / factor[:, 1]).log()  # the scale is that of both axes, the jitter is not
    assert 1.5 < ratio.exp().max() <= 1.5**2
    assert 2.5 < factor.max() <= 3


def test_shift_and_jitter_act_on_each_axis():
    vit = a_vit()
    generator = torch.Generator().manual_seed(0)
    plain = augmented_embeddings(vit, (2, 3), StochasticOptions(), generator)
    shifted = augmented_embeddings(vit, (2, 3), StochasticOptions(rope_shift=0.5), generator)
    jittered = augmented_embeddings(vit, (2, 3), StochasticOptions(rope_jitter=1.5), generator)
    assert not torch.allclose(plain, shifted)
    assert not torch.allclose(plain, jittered)


def test_one_channel_is_repeated_to_the_backbones():
    vit = a_vit()
    grey = IMAGES[:, :1]
    with torch.no_grad():
        a, b = encode(vit, [grey])[0].cls, encode(vit, [grey.repeat(1, 3, 1, 1)])[0].cls
    assert torch.equal(a, b)


def test_activation_checkpointing_changes_no_gradient():
    def gradient(recompute):
        vit = a_vit().train()
        vit.vit.set_grad_checkpointing(recompute)
        generator = torch.Generator().manual_seed(3)
        noise = StochasticOptions(drop_path=0.5, rope_rescale=2.0)
        encode(vit, [IMAGES], None, noise, generator)[0].patches.square().sum().backward()
        return vit.vit.blocks[0].attn.qkv.weight.grad

    torch.testing.assert_close(gradient(True), gradient(False))


def test_the_head_gives_the_recorded_logits():
    head = fill(ProjectionHead(6, 8, 10, 4), 0, 0.2)
    with torch.no_grad():
        row = head(sine((5, 6), 0.83, 0.4))[0]
    wanted = [
        0.1133008,
        -0.1040024,
        -0.1321609,
        0.0800359,
        0.1466749,
        -0.0534374,
        -0.1563654,
        0.0250815,
    ]
    assert row.tolist() == pytest.approx(wanted, abs=1e-6)


def test_a_student_needs_a_mask_token():
    heads = [ProjectionHead(32, 4, 4, 4) for _ in range(2)]
    with pytest.raises(ValueError, match="must have a mask token"):
        Student(Backbone(Architecture(32, 2, 2)), *heads)
