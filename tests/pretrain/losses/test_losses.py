"""Losses against the original's numbers, by hand, and by law."""

import inspect
import math
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError
from safetensors.torch import load_file

from nnunetv2_meddinov3.pretrain.losses import (
    DINOLoss,
    GramLoss,
    IBOTLoss,
    KoLeoLoss,
    sinkhorn_knopp,
)

GOLDEN = load_file(Path(__file__).parents[2] / "golden" / "losses.safetensors")


def assert_golden(loss, leaf, name):
    """Value within 1e-5 and gradient within 1e-4 of the original, relative, max over max."""
    torch.testing.assert_close(loss, GOLDEN[f"{name}.loss"], rtol=1e-5, atol=0)
    loss.backward()
    expected = GOLDEN[f"{name}.grad"]
    assert (leaf.grad - expected).abs().max() <= 1e-4 * expected.abs().max()


def leaf_of(name):
    return GOLDEN[name].clone().requires_grad_()


def sine(shape, a, b):
    """Flat sin(a i + b) in float64, then fp32: how the numbers by hand were made."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(a * i + b).reshape(shape).float()


def test_sinkhorn_equals_the_original():
    got = sinkhorn_knopp(GOLDEN["sinkhorn.logits"], float(GOLDEN["sinkhorn.temp"]))
    expected = GOLDEN["sinkhorn.probs"]
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    got = sinkhorn_knopp(GOLDEN["ibot.teacher_logits"], float(GOLDEN["ibot.teacher_temp"]))
    assert (got - GOLDEN["ibot.teacher_probs"]).abs().max() <= 1e-5


def test_dino_equals_the_original_for_local_and_global_views():
    teacher = GOLDEN["dino_local.teacher_probs"]
    student = leaf_of("dino_local.student_logits")
    assert_golden(DINOLoss()(student, teacher), student, "dino_local")
    student = leaf_of("dino_global.student_logits")
    assert_golden(DINOLoss()(student, teacher, ignore_diagonal=True), student, "dino_global")


def test_ibot_equals_the_original():
    student = leaf_of("ibot.student_logits")
    loss = IBOTLoss()(student, GOLDEN["ibot.teacher_probs"], GOLDEN["ibot.masks"])
    assert_golden(loss, student, "ibot")


def test_koleo_equals_the_original():
    x = leaf_of("koleo.x")
    assert_golden(KoLeoLoss()(x), x, "koleo")


@pytest.mark.parametrize(("remove", "name"), [(False, "gram"), (True, "gram_remove_neg")])
def test_gram_equals_the_original(remove, name):
    student = leaf_of("gram.student")
    loss = GramLoss(remove_negatives=remove)(student, GOLDEN["gram.teacher"])
    assert_golden(loss, student, name)


def test_sinkhorn_of_four_numbers():
    logits = torch.tensor([[0.07 * math.log(2), 0.0], [0.0, 0.0]])
    once = sinkhorn_knopp(logits, 0.07, n_iterations=1)
    torch.testing.assert_close(once, torch.tensor([[4 / 7, 3 / 7], [0.4, 0.6]]))
    thrice = torch.tensor([[0.585774, 0.414226], [0.414201, 0.585799]])
    torch.testing.assert_close(sinkhorn_knopp(logits, 0.07), thrice, rtol=0, atol=1e-6)


def test_dino_ibot_koleo_and_gram_give_the_recorded_values():
    z = 0.5 * sine((3, 2, 8), 0.31, 0.1)
    p = (2 * sine((2, 2, 8), 0.9, 0.2)).softmax(-1)
    assert float(DINOLoss()(z, p)) == pytest.approx(3.886434, abs=1e-5)
    assert float(DINOLoss()(z, p, ignore_diagonal=True)) == pytest.approx(3.842142, abs=1e-5)
    assert float(DINOLoss()(z[:2], p)) == pytest.approx(4.492044, abs=1e-5)
    assert float(DINOLoss()(z[:2], p, ignore_diagonal=True)) == pytest.approx(5.009071, abs=1e-5)
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[0, :3] = mask[2, 0] = True
    z = 0.5 * sine((4, 8), 0.41, 0.2)
    p = (2 * sine((4, 8), 0.77, 0.5)).softmax(-1)
    assert float(IBOTLoss()(z, p, mask)) == pytest.approx(2.313976, abs=1e-5)
    assert float(KoLeoLoss()(sine((5, 6), 0.83, 0.4))) == pytest.approx(-0.0250800, abs=1e-6)
    student, teacher = sine((2, 5, 6), 0.53, 0.1), sine((2, 5, 6), 0.29, 0.7)
    assert float(GramLoss()(student, teacher)) == pytest.approx(1.552891, abs=1e-5)
    assert float(GramLoss(True)(student, teacher)) == pytest.approx(0.300158, abs=1e-5)


def test_koleo_in_groups_is_the_mean_of_the_groups():
    x = sine((4, 6), 0.83, 0.4)
    assert float(KoLeoLoss()(x)) == pytest.approx(-0.1813841, abs=1e-6)
    groups = [float(KoLeoLoss()(part)) for part in x.split(2)]
    assert float(KoLeoLoss(group=2)(x)) == pytest.approx(sum(groups) / 2, abs=1e-6)


def test_sinkhorn_survives_ranges_that_leave_fp32():
    # the original overflows from logits / temp > 88 on; float64 logarithms are the truth
    logits = 3 * torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    z = logits.double() / 0.07
    for _ in range(3):
        z = z - z.logsumexp(0)
        z = z - z.logsumexp(1, keepdim=True)
    got = sinkhorn_knopp(logits, 0.07)
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got, z.exp().float(), rtol=0, atol=1e-4)


def test_sinkhorn_does_not_see_a_constant():
    logits = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    shifted = sinkhorn_knopp(logits + 1000, 0.07)
    torch.testing.assert_close(shifted, sinkhorn_knopp(logits, 0.07), rtol=0, atol=1e-3)
    torch.testing.assert_close(shifted.sum(1), torch.ones(16))


def test_gram_ignores_a_rotation_of_feature_space():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(2, 5, 6, generator=generator)
    teacher = torch.randn(2, 5, 6, generator=generator)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    torch.testing.assert_close(
        GramLoss()(student @ rotation, teacher), GramLoss()(student, teacher)
    )


def test_koleo_is_computed_in_fp32():
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert KoLeoLoss()(x) == KoLeoLoss()(x.float())


def test_no_gradient_reaches_a_teacher():
    student = torch.randn(2, 3, 4, requires_grad=True)
    teacher = torch.randn(2, 3, 4, requires_grad=True)
    for loss in (DINOLoss()(student, teacher.softmax(-1)), GramLoss()(student, teacher)):
        loss.backward()
    assert teacher.grad is None
    assert student.grad is not None


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: sinkhorn_knopp(torch.zeros(2, 2), 0.0), "temp must be positive"),
        (lambda: DINOLoss()(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), True), "no pair of views"),
        (
            lambda: IBOTLoss()(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(1, 3).bool()),
            "3 masked patches",
        ),
        (lambda: KoLeoLoss()(torch.zeros(1, 3)), "at least two images"),
        (lambda: KoLeoLoss(group=4)(torch.zeros(6, 3)), "whole groups of 4"),
    ],
)
def test_what_does_not_fit_is_said(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


@pytest.mark.parametrize(
    ("function", "arguments", "sentence"),
    [
        (sinkhorn_knopp, (torch.zeros(2), 0.1), r"must be \(B, K\)"),
        (
            DINOLoss.forward,
            (DINOLoss(), torch.zeros(2, 3, 4), torch.zeros(2, 2, 4)),
            "must share B and K",
        ),
        (
            GramLoss.forward,
            (GramLoss(), torch.zeros(1, 2, 3), torch.zeros(1, 3, 3)),
            "equal B and P",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_the_signature_and_in_words(
    function, arguments, sentence
):
    with pytest.raises(TypeCheckError):
        function(*arguments)
    with pytest.raises(ValueError, match=sentence):  # as it runs where shapes are not checked
        inspect.unwrap(function)(*arguments)


def _ranks(rank, folder, logits, expected):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    part = logits.chunk(2)[rank]
    for scale in (1.0, 40.0):  # scaling vectors, then logarithms
        got = sinkhorn_knopp(scale * part, 0.07)
        torch.testing.assert_close(got, expected[scale].chunk(2)[rank], rtol=1e-5, atol=1e-6)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_share_their_sums(tmp_path):
    logits = torch.randn(12, 16, generator=torch.Generator().manual_seed(0))
    expected = {scale: sinkhorn_knopp(scale * logits, 0.07) for scale in (1.0, 40.0)}
    torch.multiprocessing.spawn(_ranks, (str(tmp_path), logits, expected), nprocs=2)
