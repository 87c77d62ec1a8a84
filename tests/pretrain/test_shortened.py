"""``--steps N``: what counts steps in a config follows its number of steps."""

import re

import pytest

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.pretrain.config import (
    available,
    differences,
    flatten,
    from_yaml,
    load_config,
    to_yaml,
)
from nnunetv2_meddinov3.pretrain.schedules import schedules_of
from nnunetv2_meddinov3.pretrain.shortened import with_steps
from nnunetv2_meddinov3.pretrain.stages import check, gram_teachers_in_warm_up, settled, stages_of


def test_what_counts_steps_keeps_its_share():
    one, two, three = stages_of(["vitb16"], [], steps=1000)
    assert [c.optim.steps for c in (one, two, three)] == [1000] * 3
    assert one.optim.lr.warmup_steps == one.losses.teacher_temp.warmup_steps == 100
    assert one.optim.freeze_last_layer_steps == 30
    assert one.engine.export_at == [200]
    assert two.losses.gram.teacher == "previous@200"
    assert two.losses.gram.weight.cosine_steps == two.losses.local_weight.cosine_steps == 100
    assert three.optim.lr.cosine_steps == 330
    assert (one.engine.save_every, one.engine.keep_every, one.engine.report_every) == (10, 100, 50)
    assert (two.engine.save_every, two.engine.keep_every) == (100, 1000)


def test_a_refreshed_gram_teacher_follows_and_a_longer_run_is_saved_as_often():
    gram = ["losses.gram.refresh_every=500", "losses.gram.refresh_from=1001"]
    config = with_steps(load_config("vitb16_stage2_gram", gram), 1000, None)
    assert (config.losses.gram.refresh_every, config.losses.gram.refresh_from) == (50, 100)
    assert config.losses.gram.teacher == "previous@20000"  # of a stage that is not known
    longer = with_steps(load_config("vitb16_stage1"), 200_000, None)
    assert (longer.optim.lr.warmup_steps, longer.engine.export_at) == (20_000, [40_000])
    assert longer.engine == load_config("vitb16_stage1", ["engine.export_at=[40000]"]).engine


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 99, 12_345, 1_000_000])
def test_any_number_of_steps_gives_a_stage_that_can_run(name, steps):
    (config,) = stages_of([name], [], steps=steps)
    assert len(schedules_of(config).lr) == steps
    assert all(1 <= step <= steps for step in config.engine.export_at)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 99, 12_345])
@pytest.mark.parametrize("size", ["vits16", "vitb16", "vitl16", "tiny"])
def test_the_gram_teacher_is_one_that_the_stage_before_exports(size, steps):
    one, two, _ = stages_of([size], [], steps=steps)
    assert two.losses.gram.teacher == f"previous@{one.engine.export_at[0]}"
    (alone,) = stages_of([size], [], stage="2", steps=steps)
    (named,) = stages_of([f"{size}_stage2_gram"], [], steps=steps)
    assert alone == named == two


def test_the_same_number_changes_nothing_and_keys_still_win():
    for name in available():
        config = load_config(name)
        assert with_steps(config, config.optim.steps, None) == config
    (one,) = stages_of(["tiny_stage1"], ["engine.save_every=3"], steps=8)
    assert flatten(one.model_dump())["engine.save_every"] == 3


def test_a_warm_up_that_is_a_share_follows_any_change_of_the_steps(tmp_path):
    shared = load_config("vitb16_stage1", ["optim.steps=500"])  # no other key is needed
    assert shared.optim.lr.warmup_steps == shared.losses.teacher_temp.warmup_steps == 50
    assert from_yaml(to_yaml(shared)) == shared
    other = ["optim.lr.warmup_share=0.03", "losses.teacher_temp.warmup_share=0.5"]
    config = load_config("vitb16_stage1", other)
    assert (config.optim.lr.warmup_steps, config.losses.teacher_temp.warmup_steps) == (3000, 50_000)
    lr = schedules_of(config).lr
    assert lr[3000] == 2e-4 > lr[2999]


def test_a_warm_up_in_steps_takes_the_place_of_a_share_and_scales(tmp_path):
    config = load_config("vitb16_stage1", ["optim.lr.warmup_steps=30000"])
    assert (config.optim.lr.warmup_share, config.optim.lr.warmup_steps) == (None, 30_000)
    assert with_steps(config, 1000, None).optim.lr.warmup_steps == 300
    (tmp_path / "mine.yaml").write_text("optim: {steps: 100, lr: {warmup_steps: 40}}\n")
    mine = load_config(str(tmp_path / "mine.yaml"))
    assert (mine.optim.lr.warmup_steps, mine.losses.teacher_temp.warmup_steps) == (40, 10)
    back = load_config(str(tmp_path / "mine.yaml"), ["optim.lr.warmup_share=0.2"])
    assert back.optim.lr.warmup_steps == 20
    assert differences(mine, load_config(str(tmp_path / "mine.yaml"))) == []
    share = ["optim.lr.warmup_share=0.4"]  # what comes to the same is the same
    assert differences(mine, load_config(str(tmp_path / "mine.yaml"), share)) == []


def saved_before(name, changes=()):
    """A config as versions saved it that knew no share."""
    config = load_config(name, changes)
    return re.sub(r" *warmup_share: .*\n", "", to_yaml(config))


def test_a_stage_begun_before_warm_ups_were_shares_keeps_its_warm_up(tmp_path):
    keys = ["optim.lr.warmup_steps=30000", "losses.teacher_temp.warmup_steps=30000"]
    (tmp_path / "stage1").mkdir()
    (tmp_path / "stage1/config.yaml").write_text(saved_before("vitb16_stage1", keys))
    stages = settled(stages_of(["vitb16"], [], store="x"), tmp_path)
    assert stages[0].optim.lr.warmup_steps == 30_000
    assert stages[0].losses.teacher_temp.warmup_steps == 30_000
    before = from_yaml((tmp_path / "stage1/config.yaml").read_text())
    assert [key for key in differences(before, stages[0]) if "warmup" in key] == []
    assert settled(stages_of(["vitb16"], [], store="x"), None)[0].optim.lr.warmup_steps == 10_000
    (said, temperature) = gram_teachers_in_warm_up(stages, tmp_path)
    assert "is taken at step 20000 of stage 1, inside the warm-up of optim.lr (30000" in said
    assert "losses.teacher_temp" in temperature
    (alone,) = settled(stages_of(["vitb16"], [], stage="2", store="x"), tmp_path)
    assert gram_teachers_in_warm_up((alone,), tmp_path) == [said, temperature]


@pytest.mark.parametrize("size", ["vits16", "vitb16", "vitl16", "tiny"])
@pytest.mark.parametrize("steps", [None, 10, 500])
def test_no_shipped_gram_teacher_is_taken_inside_a_warm_up(size, steps):
    assert gram_teachers_in_warm_up(stages_of([size], [], steps=steps), None) == []


def test_a_gram_teacher_that_is_taken_inside_a_warm_up_is_said(ct_store, tmp_path):
    changes = ["optim.batch_size=8", "stage1.optim.lr.warmup_share=0.9", "engine.parallel=ddp"]
    stages = stages_of(["tiny"], changes, store=str(ct_store))
    (said,) = gram_teachers_in_warm_up(stages, tmp_path)
    assert "at step 100 of stage 1, inside the warm-up of optim.lr (360 steps)" in said


@pytest.mark.parametrize("steps", [0, -3])
def test_no_steps_are_one_sentence(steps):
    with pytest.raises(UserError, match="--steps must be at least 1"):
        stages_of(["tiny"], [], steps=steps)


def advised(sentence):
    """The changes that a sentence names."""
    return re.findall(r"stage\d\.[\w.]+=(?:\[[\d,]+\]|previous@\d+)", sentence.partition(": ")[2])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["stage1.optim.steps=50", "stage1.optim.lr.warmup_steps=0"], 2),
        (["stage1.optim.steps=50", "stage1.engine.export_at=[30]"], 2),
        (["stage1.engine.export_at=[]"], 1),
        (["stage1.engine.export_at=[7, 9000]"], 1),
        (["stage2.losses.gram.teacher=previous@33"], 1),
    ],
)
def test_what_the_sentence_on_a_gram_teacher_says_works(ct_store, tmp_path, changes, expected):
    changes = [*changes, "optim.batch_size=8"]
    with pytest.raises(UserError) as caught:
        check(stages_of(["tiny"], changes, store=str(ct_store)), tmp_path)
    advice = advised(str(caught.value))
    assert len(advice) == expected, caught.value
    check(stages_of(["tiny"], [*changes, *advice], store=str(ct_store)), tmp_path)


@pytest.mark.parametrize("state", ["finished", "past the step"])
def test_a_stage_that_is_past_the_step_is_not_told_to_export_it(ct_store, tmp_path, state):
    folder = tmp_path / "stage1"
    (folder / "checkpoints/step_0000150").mkdir(parents=True)
    if state == "finished":
        (folder / "teacher.safetensors").touch()
    changes, store = ["optim.batch_size=8"], str(ct_store)
    with pytest.raises(UserError, match=r"past that step and it exported none: set .* to previous"):
        check(stages_of(["tiny"], changes, store=store), tmp_path)
    (folder / "exports").mkdir()
    (folder / "exports/teacher_step_000120.safetensors").touch()
    with pytest.raises(UserError, match=r"of steps \[120\]: set .* to previous@120 or previous"):
        check(stages_of(["tiny"], changes, store=store), tmp_path)
    changes.append("stage2.losses.gram.teacher=previous@120")
    check(stages_of(["tiny"], changes, store=store), tmp_path)
