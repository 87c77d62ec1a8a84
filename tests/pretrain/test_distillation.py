import json
from pathlib import Path

import pytest
import torch
from pretrain_recorded import fill, sine
from safetensors.torch import load_file

from nnunetv2_meddinov3.models.architecture import Architecture
from nnunetv2_meddinov3.models.backbone import Backbone
from nnunetv2_meddinov3.models.build import load_backbone
from nnunetv2_meddinov3.pretrain.distillation import Distillation, LossOptions, resize_tokens
from nnunetv2_meddinov3.pretrain.heads import ProjectionHead
from nnunetv2_meddinov3.pretrain.networks import student_of
from nnunetv2_meddinov3.pretrain.optim import clip_gradients, meta_name
from nnunetv2_meddinov3.pretrain.student import StochasticOptions, Student
from nnunetv2_meddinov3.pretrain.views.batch import ViewBatch, join

GOLDEN = Path(__file__).parents[1] / "golden"


def losses_of(distillation, batch, teacher_temp=0.07, local_weight=1.0, gram_weight=2.0):
    """The losses of a batch that is a whole step."""
    (targets,) = distillation.targets([batch], teacher_temp)
    losses, _ = distillation.losses(
        distillation.student, batch, targets, local_weight=local_weight, gram_weight=gram_weight
    )
    return losses


def golden_step(case):
    """Losses of the golden step, the networks that gave them, and what was recorded."""
    facts = json.loads((GOLDEN / "golden.json").read_text())[case]
    step = load_file(GOLDEN / f"{case}.step.safetensors")
    tensors = load_file(GOLDEN / f"{case}.weights.safetensors")
    weights = facts["weights"]
    gram_teacher = None
    if case == "stage2":
        path = GOLDEN / f"{case}.weights.safetensors"
        gram_teacher = load_backbone(path, branch="gram_teacher")
    distillation = Distillation(
        student_of(tensors, "student", case),
        student_of(tensors, "teacher", case),
        gram_teacher,
        LossOptions(
            dino_weight=weights["dino"],
            ibot_weight=weights["ibot"],
            koleo_weight=weights["koleo"],
            gram=case == "stage2",
        ),
    )
    batch = ViewBatch(
        step["global_crops"], step["local_crops"], step["masks"], step.get("gram_crops")
    )
    losses = losses_of(distillation, batch, facts["teacher_temp"], gram_weight=weights["gram"])
    return losses, distillation, step


@pytest.mark.parametrize("case", ["stage1", "stage2"])
def test_a_whole_step_has_the_losses_and_gradients_of_the_original(case):
    losses, distillation, step = golden_step(case)
    wanted = {k.removeprefix("loss."): v for k, v in step.items() if k.startswith("loss.")}
    assert set(losses) == set(wanted)
    for name, value in wanted.items():
        assert losses[name].item() == pytest.approx(value.item(), rel=1e-5), name
    losses["total"].backward()
    found = 0
    for name, parameter in distillation.named_parameters():
        key = f"grad.{meta_name(name)}"
        if key in step:
            error = (parameter.grad - step[key].view_as(parameter)).abs().max()
            assert error / step[key].abs().max() < 1e-4, name
            found += 1
    assert found == sum(key.startswith("grad.") for key in step)


def recorded_networks(options):
    """The small networks of which one step was recorded from the original."""

    def backbone(phase):
        architecture = Architecture(32, 2, 2, patch_size=4, norm_eps=1e-5)
        return fill(Backbone(architecture, mask_token=True), phase, 0.05)

    def student(phases):
        dino = fill(ProjectionHead(32, 48, 24, 8), phases[1], 0.4)
        ibot = fill(ProjectionHead(32, 40, 24, 8), phases[2], 0.4)
        return Student(backbone(phases[0]), dino, ibot)

    teacher = student((0.03, 0.15, 0.25))
    gram = backbone(0.07) if options.gram and not options.gram_from_teacher else None
    return Distillation(student((0, 0.1, 0.2)), teacher, gram, options)


def recorded_batch():
    masks = torch.zeros(6, 16, dtype=torch.bool)
    masks[0, [1, 2, 5, 6]] = True
    masks[3, [0, 15]] = True
    masks[4, [3, 7, 8, 9, 10, 11]] = True
    return ViewBatch(
        sine((6, 3, 16, 16), 0.013, 0.5),
        sine((9, 3, 8, 8), 0.017, 0.9),
        masks,
        sine((6, 3, 32, 32), 0.0071, 0.2),
    )


@pytest.mark.parametrize(
    ("options", "local_weight", "wanted", "norms"),
    [
        (
            {},
            1.0,
            {"total": 7.855443, "dino_local": 4.408137, "dino_global": 4.419848}
            | {"koleo": 2.427836, "ibot": 2.958811},
            (40.134174, 12.700899, 14.083838),
        ),
        (
            {"ignore_diagonal": False},
            1.0,
            {"total": 7.857205, "dino_global": 4.419863},
            (40.007763, 12.725201, 14.083838),
        ),
        ({}, 0.5, {"total": 6.202392}, (37.766220, 7.953216, 14.083838)),
        (
            {"gram": True},
            1.0,
            {"total": 8.405768, "gram": 0.275163},
            (40.153694, 12.700899, 14.083838),
        ),
        (
            {"gram": True, "gram_from_teacher": True},
            1.0,
            {"total": 7.890501, "gram": 0.017529},
            (40.143158, 12.700899, 14.083838),
        ),
    ],
    ids=["stage 1", "diagonal kept", "local weight 0.5", "Gram teacher", "Gram = EMA teacher"],
)
def test_a_step_has_the_recorded_losses_and_gradient_norms(options, local_weight, wanted, norms):
    distillation = recorded_networks(LossOptions(**options))
    losses = losses_of(distillation, recorded_batch(), local_weight=local_weight)
    for name, value in wanted.items():
        assert losses[name].item() == pytest.approx(value, rel=2e-6, abs=1e-6), name
    losses["total"].backward()
    found = clip_gradients(distillation.student, 3.0)
    for name, value in zip(("backbone", "dino_head", "ibot_head"), norms, strict=True):
        assert found[name].item() == pytest.approx(value, rel=2e-6), name


def test_clipped_gradients_are_the_recorded_ones():
    distillation = recorded_networks(LossOptions())
    losses_of(distillation, recorded_batch())["total"].backward()
    clip_gradients(distillation.student, 3.0)
    backbone = distillation.student.backbone
    found = [
        backbone.vit.patch_embed.proj.weight.grad.flatten()[:3],
        backbone.vit.cls_token.grad.flatten()[:3],
        backbone.mask_token.grad.flatten()[:3],
    ]
    wanted = [
        [-0.0118741, -0.0116956, -0.0115151],
        [-0.1143668, -0.0548865, -0.0538185],
        [-0.0792001, 0.0551345, 0.0621999],
    ]
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.tolist() == pytest.approx(theirs, rel=1e-5, abs=2e-7)


def test_targets_and_losses_are_computed_in_fp32_under_autocast():
    distillation = recorded_networks(LossOptions(gram=True))
    batch = recorded_batch()
    arguments = {"masks": batch.masks, "local_crops": batch.local_crops}
    with torch.no_grad():
        student = distillation.student(batch.global_crops, batch.mask_indices, **arguments)
        teacher = distillation.teacher(batch.global_crops, batch.mask_indices)
        anchor = distillation.gram_teacher(batch.gram_crops)
    # the networks give the same tokens both times, so that all that can differ is what follows
    distillation.student.forward = lambda *args, **kwargs: student
    distillation.teacher.forward = lambda *args, **kwargs: teacher
    distillation.gram_teacher.forward = lambda *args, **kwargs: anchor
    wanted, wanted_targets = losses_of(distillation, batch), distillation.targets([batch], 0.07)[0]
    with torch.autocast("cpu", torch.bfloat16):
        found, targets = losses_of(distillation, batch), distillation.targets([batch], 0.07)[0]
    for ours, theirs in zip(targets, wanted_targets, strict=True):
        assert torch.equal(ours, theirs)
    assert found == wanted
    assert {loss.dtype for loss in found.values()} == {torch.float32}


def test_the_networks_still_run_in_bf16_under_autocast():
    distillation = recorded_networks(LossOptions(gram=True))
    dtypes = set()
    for network in (distillation.student, distillation.teacher, distillation.gram_teacher):
        mlp = network.backbone.vit.blocks[0].mlp
        mlp.register_forward_hook(lambda module, args, out: dtypes.add(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        losses_of(distillation, recorded_batch())
    assert dtypes == {torch.bfloat16}


def test_teachers_get_no_gradient_and_stay_in_evaluation_mode():
    distillation = recorded_networks(LossOptions(gram=True))
    distillation.train()
    losses_of(distillation, recorded_batch())["total"].backward()
    for frozen in (distillation.teacher, distillation.gram_teacher):
        assert not any(module.training for module in frozen.modules())
        assert all(p.grad is None for p in frozen.parameters())
    missing = [n for n, p in distillation.student.named_parameters() if p.grad is None]
    assert missing == []


def test_the_gram_teacher_is_not_run_while_its_weight_is_0():
    distillation = recorded_networks(LossOptions(gram=True))
    distillation.gram_teacher.forward = None
    losses = losses_of(distillation, recorded_batch(), gram_weight=0.0)
    assert losses["gram"] == 0
    assert losses["total"].item() == pytest.approx(7.855443, rel=2e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
def test_the_teacher_moves_towards_the_student(momentum):
    distillation = recorded_networks(LossOptions())
    before = {n: p.clone() for n, p in distillation.teacher.named_parameters()}
    distillation.update_teacher(momentum)
    student = dict(distillation.student.named_parameters())
    for name, parameter in distillation.teacher.named_parameters():
        wanted = momentum * before[name] + (1 - momentum) * student[name]
        torch.testing.assert_close(parameter, wanted.detach())


def test_a_refreshed_gram_teacher_is_the_teacher():
    distillation = recorded_networks(LossOptions(gram=True))
    distillation.refresh_gram_teacher()
    theirs = distillation.teacher.backbone.state_dict()
    for name, tensor in distillation.gram_teacher.backbone.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


def test_halving_a_map_takes_the_bicubic_taps_without_antialiasing():
    tokens = sine((1, 3, 4, 4), 0.37, 0.2).flatten(2).transpose(1, 2)
    small = resize_tokens(tokens, (4, 4), (2, 2))[0, :, 0]
    wanted = [0.7590809, 0.8190408, -0.6872349, -0.8501860]
    assert small.tolist() == pytest.approx(wanted, abs=1e-6)


def test_drop_path_acts_on_the_student_alone_and_comes_from_the_generator():
    distillation = recorded_networks(LossOptions())
    distillation.student.stochastic = StochasticOptions(drop_path=0.5)
    targets = distillation.targets([recorded_batch()], 0.07)[0]
    again = distillation.targets([recorded_batch()], 0.07)[0]
    assert torch.equal(targets.cls, again.cls)
    values = [
        distillation.losses(
            distillation.student,
            recorded_batch(),
            targets,
            local_weight=1.0,
            gram_weight=0.0,
            generator=torch.Generator().manual_seed(seed),
        )[0]["total"]
        for seed in (0, 0, 1)
    ]
    assert values[0] == values[1] != values[2]


def test_splitting_a_batch_and_joining_it_gives_it_back():
    batch = recorded_batch()
    parts = batch.split(1)
    assert [p.images for p in parts] == [1, 1, 1]
    assert torch.equal(parts[1].global_crops, batch.global_crops[[1, 4]])
    assert parts[1].mask_indices.tolist() == [19, 23, 24, 25, 26, 27]
    whole = join(parts)
    for name in ("global_crops", "local_crops", "masks", "gram_crops", "mask_indices"):
        assert torch.equal(getattr(whole, name), getattr(batch, name)), name
    with pytest.raises(ValueError, match="do not divide"):
        batch.split(2)


def test_batches_of_any_number_of_images_are_joined_without_looking_at_the_masks(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    batches = [
        ViewBatch(
            torch.randn(2 * n, 1, 32, 32, generator=generator),
            torch.randn(3 * n, 1, 16, 16, generator=generator),
            torch.rand(2 * n, 4, generator=generator) < 0.4,
            images=n,
        )
        for n in (1, 3, 2)
    ]
    with monkeypatch.context() as patch:  # on a GPU it is a wait
        patch.setattr(torch.Tensor, "nonzero", None)
        joined = join(batches)
    assert joined.images == 6
    assert torch.equal(joined.mask_indices, joined.masks.flatten().nonzero()[:, 0])


def test_swapping_the_images_of_a_batch_changes_no_loss():
    distillation = recorded_networks(LossOptions(gram=True))
    batch = recorded_batch()
    order = torch.tensor([2, 0, 1])
    swap = lambda t: t.unflatten(0, (-1, 3))[:, order].flatten(0, 1)  # noqa: E731
    swapped = ViewBatch(
        swap(batch.global_crops), swap(batch.local_crops), swap(batch.masks), swap(batch.gram_crops)
    )
    a, b = losses_of(distillation, batch), losses_of(distillation, swapped)
    for name in a:
        assert a[name].item() == pytest.approx(b[name].item(), rel=1e-5), name
