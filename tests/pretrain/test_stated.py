"""What a config states of its ViT is what is used and what is saved, or it is refused."""

import io
import json
import shutil

import pytest
import torch
import yaml

from nnunetv2_meddinov3.cli import main
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.models.architecture import architecture_of
from nnunetv2_meddinov3.models.backbone import Backbone
from nnunetv2_meddinov3.models.build import save_backbone
from nnunetv2_meddinov3.models.weights import read_checkpoint
from nnunetv2_meddinov3.pretrain.config import differences, load_config, to_yaml
from nnunetv2_meddinov3.pretrain.distributed import Runtime
from nnunetv2_meddinov3.pretrain.networks import load_start
from nnunetv2_meddinov3.pretrain.train import Stage
from nnunetv2_meddinov3.signals import Stop

ALONE = Runtime(0, 1, torch.device("cpu"), "fp32", False)
GRAM = [
    "losses.gram.weight={start: 1, peak: 1, end: 1, warmup_steps: 0, cosine_steps: 0}",
    "crops.resolutions.0.gram_size=96",
    "losses.local_weight.cosine_steps=0",
]


@pytest.fixture
def weights(tmp_path):
    """A function that writes random weights of a tiny ViT with fields of its own."""

    def write(name="weights.safetensors", **fields):
        backbone = Backbone(architecture_of("vit_tiny", **fields))
        save_backbone(backbone, tmp_path / name, licence="x")
        return tmp_path / name

    return write


def start(*overrides, name="tiny_stage1", previous=None):
    return load_start(load_config(name, overrides), previous)


def build(folder, overrides, name="tiny_stage1", previous=None):
    config = load_config(name, overrides)
    return Stage(config, folder, ALONE, previous=previous, stream=io.StringIO())


def epsilons(start):
    return {
        module.eps
        for branch in (start.distillation.student, start.distillation.teacher)
        for module in branch.backbone.modules()
        if isinstance(module, torch.nn.LayerNorm)
    }


@pytest.mark.parametrize(
    ("theirs", "stated", "used"),
    [
        ({"norm_eps": 1e-5}, [], ("norm_eps", 1e-5)),
        ({"norm_eps": 1e-5}, ["model.norm_eps=1e-6"], ("norm_eps", 1e-6)),
        ({"norm_eps": 1e-6}, ["model.norm_eps=1e-5"], ("norm_eps", 1e-5)),
        ({"norm_eps": 1e-6}, ["model.norm_eps=null"], ("norm_eps", 1e-6)),
        ({"rope_dtype": "bf16"}, [], ("rope_dtype", "bf16")),
        ({"rope_dtype": "bf16"}, ["model.rope_dtype=fp32"], ("rope_dtype", "fp32")),
        ({"rope_dtype": "fp32"}, ["model.rope_dtype=bf16"], ("rope_dtype", "bf16")),
        ({"qkv_bias": False}, [], ("qkv_bias", False)),
        ({"qkv_bias": False}, ["model.qkv_bias=false"], ("qkv_bias", False)),
        ({"input_channels": 1}, [], ("input_channels", 3)),
    ],
)
def test_weights_are_used_as_they_are_or_as_the_config_states(weights, theirs, stated, used):
    name, value = used
    found = start(f"init.source={weights(**theirs)}", *stated)
    assert getattr(found.architecture, name) == value
    if name == "norm_eps":
        assert epsilons(found) == {value}


def test_a_training_checkpoint_of_metas_epsilon_can_be_started_from(released_file, tmp_path):
    released_file(tmp_path / "model.pth")
    source = f"init.source={tmp_path / 'model.pth'}"
    assert epsilons(start(source)) == {1e-6}
    assert epsilons(start(source, "model.norm_eps=1e-5")) == {1e-5}


def test_random_weights_are_as_before_unless_stated():
    found = start().architecture
    assert (found.qkv_bias, found.norm_eps, found.rope_dtype) == (True, 1e-6, "fp32")
    found = start("model.qkv_bias=false", "model.norm_eps=1e-5", "model.rope_dtype=bf16")
    stated = found.architecture
    assert (stated.qkv_bias, stated.norm_eps, stated.rope_dtype) == (False, 1e-5, "bf16")


@pytest.mark.parametrize("has", [True, False])
def test_biases_that_weights_have_or_lack_cannot_be_stated_otherwise(weights, has):
    wanted = str(not has).lower()
    with pytest.raises(UserError, match=f"has {str(has).lower()} and the config .* says {wanted}"):
        start(f"init.source={weights(qkv_bias=has)}", f"model.qkv_bias={wanted}")


def test_an_epsilon_of_one_or_more_is_one_sentence():
    with pytest.raises(UserError, match=r"model.norm_eps must be below 1, got 2"):
        load_config("tiny_stage1", ["model.norm_eps=2.0"])


@pytest.fixture
def from_weights(small_stage, weights):
    """The overrides of a stage from weights that are in everything not like random ones."""
    source = weights(qkv_bias=False, norm_eps=1e-5, rope_dtype="bf16")
    return small_stage(f"init.source={source}", "optim.steps=2", "engine.save_every=1")


def test_what_was_used_is_in_config_run_checkpoint_and_export(from_weights, tmp_path):
    words = ["tiny", "--stage", "1", "--out", str(tmp_path / "run"), *from_weights]
    assert main(["pretrain", *words]) == 0
    folder = tmp_path / "run/stage1"
    used = {"qkv_bias": False, "norm_eps": 1e-5, "rope_dtype": "bf16"}
    state = torch.load(folder / "checkpoints/step_0000002/state.pt", weights_only=True)
    places = {
        "config.yaml": yaml.safe_load((folder / "config.yaml").read_text())["model"],
        "run.json": json.loads((folder / "run.json").read_text())["architecture"],
        "config of the checkpoint": yaml.safe_load(state["config"])["model"],
        "checkpoint": state["architecture"],
        "export": read_checkpoint(folder / "teacher.safetensors").architecture.to_dict(),
    }
    for place, found in places.items():
        assert {name: found[name] for name in used} == used, place
    assert main(["pretrain", *words]) == 0  # finished, and not taken for another


def test_a_stage_goes_on_with_what_it_used_and_is_refused_with_something_else(
    from_weights, tmp_path
):
    stage = build(tmp_path, from_weights)
    stage.step = 1
    stage.save()
    for same in ([], ["model.norm_eps=1e-5"], ["model.rope_dtype=bf16", "model.qkv_bias=false"]):
        again = build(tmp_path, [*from_weights, *same])
        assert again.step == 1
        assert again.start.architecture == stage.start.architecture
        assert to_yaml(again.config) == to_yaml(stage.config)
    with pytest.raises(UserError, match=r"model.norm_eps is 1e-06 instead of 1e-05"):
        build(tmp_path, [*from_weights, "model.norm_eps=1e-6"])


def test_a_run_that_logged_what_it_did_not_use_goes_on_with_the_same_command(
    from_weights, tmp_path, monkeypatch
):
    """Earlier versions saved the config's own values with weights that overruled them."""
    stage = build(tmp_path, from_weights)
    logged = ["model.qkv_bias=true", "model.norm_eps=1e-6", "model.rope_dtype=fp32"]
    before = load_config("tiny_stage1", [*from_weights, *logged])
    monkeypatch.setattr(stage, "config", before)
    stage.step = 1
    stage.save()
    for now in ([], logged):
        again = build(tmp_path, [*from_weights, *now])
        assert again.start.architecture == stage.start.architecture
        assert again.config.model.norm_eps == 1e-5
    assert differences(before, load_config("tiny_stage1", from_weights)) == []


@pytest.mark.parametrize("stated", ["qkv_bias=true", "input_channels=1"])
def test_a_later_stage_that_contradicts_the_weights_is_refused_before_the_first_starts(
    from_weights, tmp_path, stated
):
    words = ["tiny", "--out", str(tmp_path / "run"), *from_weights, "optim.lr.cosine_steps=0"]
    words += [f"stage{n}.{gram}" for n in (2, 3) for gram in GRAM]
    words += ["stage1.engine.export_at=[1]", "stage2.losses.gram.teacher=previous@1"]
    words = [w if not w.startswith("init.") else f"stage1.{w}" for w in words]
    with pytest.raises(UserError, match=f"model.{stated.split('=')[0]} must be that of the"):
        main(["pretrain", *words, f"stage2.model.{stated}"])
    assert not (tmp_path / "run/stage1/metrics.jsonl").read_text()  # no step was made
    assert not (tmp_path / "run/lock.json").exists()


def test_a_gram_teacher_of_another_epsilon_keeps_it_on_resume_and_in_the_next_stage(
    small_stage, weights, tmp_path
):
    gram = weights("gram.safetensors", norm_eps=1e-3, qkv_bias=False)
    same = small_stage(*GRAM, "init.source=none", "init.optimizer=false", "optim.steps=2")
    same = [o for o in same if not o.startswith("optim.lr.warmup")]
    second = [*same, f"losses.gram.teacher={gram}"]
    assert build(tmp_path / "stage2", second, "tiny_stage2_gram").run(Stop())
    shutil.copytree(tmp_path / "stage2", tmp_path / "copy")
    resumed = build(tmp_path / "copy", second, "tiny_stage2_gram")
    third = start(
        *same,
        "losses.gram.teacher=retained",
        "model.norm_eps=1e-4",
        name="tiny_stage2_gram",
        previous=tmp_path / "stage2",
    )
    for distillation in (resumed.distillation, third.distillation):
        assert distillation.gram_teacher.backbone.architecture.norm_eps == 1e-3
        assert not distillation.gram_teacher.backbone.architecture.qkv_bias
    assert resumed.start.architecture.norm_eps == 1e-6
    assert third.architecture.norm_eps == 1e-4


def test_an_earlier_stage_goes_on_with_another_epsilon_where_it_is_stated(small_stage, tmp_path):
    stage = build(tmp_path, small_stage("optim.steps=1"))
    assert stage.run(Stop())
    same = small_stage(f"init.source={tmp_path}")
    assert start(*same).architecture.norm_eps == 1e-6
    assert epsilons(start(*same, "model.norm_eps=1e-5")) == {1e-5}
    with pytest.raises(UserError, match=r"model.input_channels must be that of the weights"):
        start(*same, "model.input_channels=1")
