import io
import math

import pytest
import torch

from nnunetv2_meddinov3.curate.pipeline import curate
from nnunetv2_meddinov3.demo.phantom import make_phantom
from nnunetv2_meddinov3.files import read_rows
from nnunetv2_meddinov3.pretrain.config import load_config
from nnunetv2_meddinov3.pretrain.distributed import Runtime
from nnunetv2_meddinov3.pretrain.monitor.health import (
    effective_rank,
    entropy,
    gram_distance,
    measure,
    similarity,
    verdicts,
)
from nnunetv2_meddinov3.pretrain.train import Stage
from nnunetv2_meddinov3.signals import Stop


def test_the_effective_rank_counts_the_directions_in_use():
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(32, 32, generator=g)).Q
    for rank in (1, 4, 16):
        features = torch.randn(4000, rank, generator=g) @ basis[:rank]
        assert effective_rank(features) == pytest.approx(rank, rel=0.02)
    assert effective_rank(torch.ones(10, 8)) == 1
    assert effective_rank(torch.ones(10, 8) + 1e-7 * torch.randn(10, 8, generator=g)) == 1
    assert math.isnan(effective_rank(torch.full((4, 4), float("nan"))))


def test_similarity_and_entropy_have_their_ends():
    assert similarity(torch.ones(6, 4)) == pytest.approx(1)
    assert similarity(torch.eye(6)) == pytest.approx(0, abs=1e-6)
    assert entropy(torch.full((3, 8), 1 / 8)) == pytest.approx(math.log(8))
    assert entropy(torch.eye(8)) == pytest.approx(0, abs=1e-6)


def test_the_gram_distance_ignores_rotations_of_feature_space():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 10, 8, generator=g)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=g)).Q
    assert gram_distance(x, x @ rotation) == pytest.approx(0, abs=1e-6)
    assert gram_distance(x, torch.randn(2, 10, 8, generator=g)) > 0.1


def observed(features, k=64):
    g = torch.Generator().manual_seed(1)
    sharp = (torch.randn(len(features), k, generator=g) * 4).softmax(-1)
    patches = torch.randn(len(features), 9, features.shape[1], generator=g)
    return {
        "cls_student": features,
        "cls_teacher": features,
        "patches_student": patches,
        "patches_teacher": patches,
        "cls_targets": sharp,
        "patch_targets": sharp,
    }


def a_check(step, features=None, **changes):
    g = torch.Generator().manual_seed(step)
    features = torch.randn(64, 32, generator=g) if features is None else features
    return {"step": step, "loss": 9.0, "update": 1e-3, **measure(observed(features)), **changes}


def test_a_healthy_run_is_not_blamed():
    assert verdicts([a_check(step) for step in (1, 100, 200)]) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"features": torch.ones(64, 32)},
            "collapse: the student gives all images nearly the same",
        ),
        ({"patch_rank_teacher": 1.1}, "collapse: the teacher gives all patches nearly the same"),
        ({"cls_similarity_teacher": 0.995}, "cls tokens of different images point the same way"),
        ({"loss": float("nan")}, "loss is not a number: the run has diverged"),
        ({"loss": 30.0}, "the loss is 30.00 after it was 9.00: the run diverges"),
        ({"cls_target_entropy_share": 0.9999}, "the teacher's targets are uniform"),
        ({"prototypes_used": 0.01}, "only 1.0 % of the prototypes"),
        ({"update": 0.0}, "the weights do not change"),
    ],
)
def test_each_thing_that_goes_wrong_is_said_in_words(changes, words):
    history = [a_check(1), a_check(600), a_check(700, **changes)]
    assert any(words in sentence for sentence in verdicts(history))


def test_uniform_targets_of_fresh_heads_are_not_blamed():
    history = [a_check(s, cls_target_entropy_share=0.9999) for s in (1, 20, 60)]
    assert verdicts(history) == []


@pytest.fixture(scope="module")
def phantom_store(tmp_path_factory):
    import numpy as np
    import SimpleITK as sitk

    folder = tmp_path_factory.mktemp("phantoms")
    for i in range(4):
        ct, _ = make_phantom(np.random.default_rng(i), (12, 96, 96), (12.0, 4.0, 4.0))
        image = sitk.GetImageFromArray(ct)
        image.SetSpacing((4.0, 4.0, 12.0))
        sitk.WriteImage(image, str(folder / f"p{i}.nii.gz"))
    curate([folder], folder / "store")
    return folder / "store"


def run_phantom(store, folder, *overrides):
    config = load_config(
        "tiny_stage1",
        [
            *(f"data.store={store}", "data.workers=0", "engine.device=cpu", "engine.export_at=[]"),
            *("optim.steps=60", "optim.lr.warmup_steps=10", "optim.batch_size=16"),
            *("crops.resolutions.0.global_size=64", "crops.resolutions.0.local_size=32"),
            *("crops.local_crops=2", "engine.log_every=5", "engine.health_every=10", *overrides),
        ],
    )
    runtime = Runtime(0, 1, torch.device("cpu"), "fp32", False)
    Stage(config, folder, runtime, previous=None, stream=io.StringIO()).run(Stop())
    health = read_rows(folder / "health.jsonl")
    return (
        read_rows(folder / "metrics.jsonl"),
        health,
        [v for row in health for v in row["verdicts"]],
    )


def smoke(metrics, health, said):
    """What must hold of a run that learns."""
    first, last = metrics[0]["loss_total"], metrics[-1]["loss_total"]
    assert last < first - 0.05, f"the loss must fall, but is {first} and then {last}"
    assert said == []
    assert health[-1]["cls_rank_teacher"] > 3
    assert health[-1]["cls_similarity_teacher"] < health[0]["cls_similarity_teacher"]


@pytest.mark.slow
def test_sixty_steps_on_the_phantom_lower_the_loss_without_collapse(phantom_store, tmp_path):
    smoke(*run_phantom(phantom_store, tmp_path / "run"))


@pytest.mark.slow
def test_the_same_run_with_a_learning_rate_of_0_fails_the_smoke_test(phantom_store, tmp_path):
    outcome = run_phantom(phantom_store, tmp_path / "run", "optim.lr.peak=0", "optim.lr.end=0")
    with pytest.raises(AssertionError):
        smoke(*outcome)
    assert any("the weights do not change" in sentence for sentence in outcome[2])


@pytest.mark.slow
def test_a_collapse_by_a_hundredfold_learning_rate_is_said_within_fifty_steps(
    phantom_store, tmp_path
):
    _, health, _ = run_phantom(
        phantom_store, tmp_path / "run", "optim.lr.peak=0.1", "optim.lr.end=0.1"
    )
    early = [v for row in health if row["step"] <= 50 for v in row["verdicts"]]
    assert any("collapse" in sentence for sentence in early), health
