import dataclasses
from pathlib import Path

import pytest

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.pretrain.config import (
    StageConfig,
    available,
    check_world,
    differences,
    effective_lr_factor,
    flatten,
    from_yaml,
    load_config,
    to_yaml,
)

STAGES = ("stage1", "stage2_gram", "stage3_highres")


def test_four_sizes_of_three_stages_are_shipped():
    assert set(available()) == {
        f"{size}_{stage}" for size in ("vits16", "vitb16", "vitl16", "tiny") for stage in STAGES
    }


@pytest.mark.parametrize("name", available())
def test_every_shipped_config_is_complete_valid_and_survives_a_round_trip(name):
    import yaml

    config = load_config(name)
    assert from_yaml(to_yaml(config)) == config
    text = Path(__file__).parents[2] / "nnunetv2_meddinov3/pretrain/configs" / f"{name}.yaml"
    given = set(flatten(yaml.safe_load(text.read_text(encoding="utf-8"))))
    assert set(flatten(dataclasses.asdict(config))) == given


@pytest.mark.parametrize("size", ["vits16", "vitb16", "vitl16"])
def test_the_papers_values_are_in_the_configs(size):
    one, two, three = (load_config(f"{size}_{stage}") for stage in STAGES)
    assert [c.optim.steps for c in (one, two, three)] == [100_000, 10_000, 10_000]
    assert [c.optim.lr.end for c in (one, two, three)] == [2e-4, 5e-5, 2.5e-5]
    assert {c.optim.batch_size for c in (one, two, three)} == {512}
    assert (one.losses.gram.weight, two.losses.gram.weight.end) == (None, 2.0)
    assert two.losses.gram.teacher == "previous@20000"
    assert one.engine.export_at == [20_000]
    assert two.crops.resolutions[0].gram_size == 512
    sizes = [(r.global_size, r.local_size) for r in three.crops.resolutions]
    assert {s[0] for s in sizes} == {512, 768}
    assert (min(s[1] for s in sizes), max(s[1] for s in sizes)) == (112, 336)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("optim.stepz=3", "unknown key optim.stepz in tiny_stage1: did you mean optim.steps?"),
        ("koleo_group=4", "unknown key koleo_group .* did you mean losses.koleo_group?"),
        ("optim.lr.peek=1", "unknown key optim.lr.peek .* did you mean optim.lr.peak?"),
        ("zzz=1", "unknown key zzz .* known here: stage, init"),
        ("crops.resolutions.0.globl_size=64", "did you mean crops.resolutions.0.global_size?"),
        ("optim.steps=many", "optim.steps .* is wrong"),
        ("optim.steps=0", "optim.steps must be at least 1, got 0"),
        ("optim.batch_size=33", "optim.batch_size must be a multiple of losses.koleo_group=8"),
        ("losses.koleo_group=1", "losses.koleo_group must be at least 2"),
        ("crops.resolutions.0.global_size=100", "must be a multiple of 16 pixels"),
        ("crops.resolutions.0.local_size=256", "at most its global_size"),
        ("crops.resolutions.0.probability=0.5", "probabilities that sum to 1"),
        ("crops.resolutions.3.global_size=96", "crops.resolutions must have an entry 3"),
        ("masks.ratio=[0.5,0.1]", "masks.ratio must be two numbers in order"),
        ("masks.probability=1.5", "masks.probability must be between 0 and 1"),
        ("model.size=vit_huge", "model.size must be one of vit_tiny"),
        ("engine.device=gpu", "engine.device must be one of auto, cpu, cuda"),
        ("losses.gram.teacher=previous@x", "must be previous or previous@STEP"),
        ("engine.compile=on", "engine.compile must be one of auto, always, never"),
        ("engine.parallel=fsdp", "engine.parallel must be one of ddp, fsdp2"),
        ("augment.blur_probability=[0.5]", "augment.blur_probability must be three numbers"),
        ("augment.gamma=[2,1]", "augment.gamma must be two numbers in order"),
        ("optim.lr.warmup_steps=1000", "at most the 400 steps"),
        ("data.values=[ct]", "data.values must be a list of some of hu, windowed"),
        ("losses.teacher_temp.peak=0", "losses.teacher_temp.peak must be above 0"),
        ("engine.probe_every=10", "engine.probe_dataset must be a labelled nnU-Net raw dataset"),
        ("steps", "written key=value"),
        ("optim.steps=[1", "the value of optim.steps must be a number"),
    ],
)
def test_a_mistake_is_one_sentence(override, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        load_config("tiny_stage1", [override])
    assert "\n" not in str(caught.value)


def test_a_gram_teacher_needs_gram_crops():
    with pytest.raises(UserError, match="gram_size must be a size in pixels"):
        load_config("tiny_stage2_gram", ["crops.resolutions.0.gram_size=null"])


def test_changes_are_applied_to_values_lists_and_entries_of_lists():
    config = load_config(
        "tiny_stage3_highres",
        [
            "crops.resolutions.1.global_size=160",
            "optim.lr.end=1e-4",
            "data.values=[hu,mr]",
            "model.drop_path=0.1",
        ],
    )
    assert [r.global_size for r in config.crops.resolutions] == [128, 160]
    assert (config.optim.lr.end, config.data.values, config.model.drop_path) == (
        1e-4,
        ["hu", "mr"],
        0.1,
    )


def test_an_unknown_config_is_one_sentence_with_the_nearest(tmp_path):
    with pytest.raises(UserError, match="did you mean vitb16_stage1"):
        load_config("vitb_stage1")
    (tmp_path / "bad.yaml").write_text("optim: [unclosed")
    with pytest.raises(UserError, match="must be a readable YAML file"):
        load_config(str(tmp_path / "bad.yaml"))
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match="must hold sections"):
        load_config(str(tmp_path / "list.yaml"))


def test_a_file_of_ones_own_may_leave_out_what_it_does_not_change(tmp_path):
    (tmp_path / "mine.yaml").write_text("stage: 1\noptim: {steps: 7}\n")
    config = load_config(str(tmp_path / "mine.yaml"))
    assert config.optim.steps == 7
    assert config.crops == StageConfig().crops


def test_differences_name_what_changes_results_and_nothing_else():
    a = load_config("tiny_stage1")
    b = load_config("tiny_stage1", ["engine.save_every=3", "data.workers=0", "data.store=x"])
    assert differences(a, b) == []
    c = load_config("tiny_stage1", ["optim.lr.peak=0.5", "data.part=train"])
    assert differences(a, c) == [
        "data.part is train instead of None",
        "optim.lr.peak is 0.5 instead of 0.001",
    ]


def test_a_batch_that_does_not_divide_is_refused_with_numbers_that_do():
    config = load_config("tiny_stage1")
    check_world(config, 2)
    with pytest.raises(UserError, match="take 24 or 48"):
        check_world(config, 3)
    with pytest.raises(UserError, match="take one of 8, 16, 32"):
        check_world(load_config("tiny_stage1", ["engine.micro_batch=12"]), 1)


def test_learning_rates_scale_with_the_square_root_of_the_batch():
    assert effective_lr_factor(load_config("vitb16_stage1")) == 1
    assert effective_lr_factor(load_config("vitb16_stage1", ["optim.batch_size=128"])) == 0.5
