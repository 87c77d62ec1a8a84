"""``--steps N``: what counts steps in a config follows its number of steps."""

import re

import pytest

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.pretrain.config import available, flatten, load_config
from nnunetv2_meddinov3.pretrain.schedules import schedules_of
from nnunetv2_meddinov3.pretrain.shortened import with_steps
from nnunetv2_meddinov3.pretrain.stages import check, stages_of


def test_what_counts_steps_keeps_its_share():
    one, two, three = stages_of(["vitb16"], [], steps=1000)
    assert [c.optim.steps for c in (one, two, three)] == [1000] * 3
    assert one.optim.lr.warmup_steps == one.losses.teacher_temp.warmup_steps == 300
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
    assert (longer.optim.lr.warmup_steps, longer.engine.export_at) == (60_000, [40_000])
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
