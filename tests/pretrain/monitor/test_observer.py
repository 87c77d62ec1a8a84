import io
import json
import re
import signal

import pytest
import torch

from nnunetv2_meddinov3.cli import main
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.pretrain.config import load_config
from nnunetv2_meddinov3.pretrain.distributed import Runtime
from nnunetv2_meddinov3.pretrain.train import Stage
from nnunetv2_meddinov3.signals import Stop

ALONE = Runtime(0, 1, torch.device("cpu"), "fp32", False)
BOTH = ("engine.tensorboard=true", "engine.wandb=ct")


def stage_of(overrides, folder, stream=None):
    config = load_config("tiny_stage1", overrides)
    return Stage(config, folder, ALONE, previous=None, stream=stream)


def opened_and_closed(events):
    """(package, what, exit code) of every start and end, in order."""
    return [
        (package, what, facts if what == "finish" else None)
        for package, what, facts in events
        if what in ("open", "close", "init", "finish")
    ]


ONE_STAGE = [
    ("tensorboard", "open", None),
    ("wandb", "init", None),
    ("wandb", "finish", 0),
    ("tensorboard", "close", None),
]


def test_a_line_of_progress_stands_at_every_logged_step(small_stage, tmp_path):
    stream = io.StringIO()
    overrides = small_stage("optim.steps=5", "engine.log_every=2")
    assert stage_of(overrides, tmp_path / "run" / "stage1", stream).run(Stop())
    lines = [line for line in stream.getvalue().splitlines() if "images/s" in line]
    pattern = r"stage 1: (\d)/5 steps, loss \d+\.\d{4}, \d+\.\d images/s, \d:\d\d:\d\d left"
    assert [re.fullmatch(pattern, line)[1] for line in lines] == ["2", "4", "5"]
    rows = (tmp_path / "run/stage1/metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [2, 4, 5]


def test_a_row_holds_losses_rates_gradients_and_speed(small_stage, tmp_path):
    stage_of(small_stage("optim.steps=1"), tmp_path / "stage1").run(Stop())
    row = json.loads((tmp_path / "stage1/metrics.jsonl").read_text())
    assert list(row) == [
        *("step", "loss_dino_local", "loss_dino_global", "loss_koleo", "loss_ibot", "loss_total"),
        *("lr", "last_layer_lr", "weight_decay", "momentum", "teacher_temp", "local_weight"),
        *("gram_weight", "grad_backbone", "grad_dino_head", "grad_ibot_head", "skipped"),
        *("images_per_second", "data_wait_percent", "memory_gb"),
    ]


def test_a_finished_stage_closes_tensorboard_and_wandb(small_stage, tmp_path, events):
    overrides = small_stage("optim.steps=2", *BOTH)
    assert stage_of(overrides, tmp_path / "run" / "stage1").run(Stop())
    assert opened_and_closed(events) == ONE_STAGE
    assert [step for package, what, step in events if (package, what) == ("wandb", "log")] == [1, 2]


@pytest.mark.parametrize("where", ["one_step", "save", "export"])
def test_an_error_in_training_closes_them_and_marks_the_run_as_failed(
    small_stage, tmp_path, events, monkeypatch, where
):
    def fail(*arguments, **options):
        raise RuntimeError("out of memory")

    stage = stage_of(small_stage("optim.steps=2", "engine.export_at=[1]", *BOTH), tmp_path / "s")
    monkeypatch.setattr(stage, where, fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        stage.run(Stop())
    failed = [(p, w, 1 if w == "finish" else f) for p, w, f in ONE_STAGE]
    assert opened_and_closed(events) == failed


def test_an_error_before_the_first_step_closes_them_too(small_stage, tmp_path, events, monkeypatch):
    def fail():
        raise UserError("the probe cannot start")

    stage = stage_of(small_stage("optim.steps=2", *BOTH), tmp_path / "s")
    monkeypatch.setattr(stage.observer, "start", fail)
    with pytest.raises(UserError, match="cannot start"):
        stage.run(Stop())
    assert ("wandb", "finish", 1) in events
    assert ("tensorboard", "close", None) in events


def test_a_stopped_stage_is_closed_and_its_resume_continues_the_run(small_stage, tmp_path, events):
    overrides, stop = small_stage("optim.steps=3", "engine.wandb=ct"), Stop()
    stop.number = signal.SIGTERM
    assert not stage_of(overrides, tmp_path / "run" / "stage1").run(stop)
    assert stage_of(overrides, tmp_path / "run" / "stage1").run(Stop())
    assert [what for _, what, _ in events if what != "log"] == ["init", "finish"] * 2
    first, second = (facts for _, what, facts in events if what == "init")
    assert first.id == second.id
    assert first.name == second.name == "run-stage1"
    assert [step for _, what, step in events if what == "log"] == [1, 2, 3]


@pytest.mark.slow
def test_three_stages_are_three_runs_each_finished_before_the_next(small_stage, tmp_path, events):
    gram = "{start: 1, peak: 1, end: 1, warmup_steps: 0, cosine_steps: 0}"
    words = [
        *("tiny", "--out", tmp_path / "run", *small_stage("optim.steps=1", *BOTH)),
        *("optim.lr.cosine_steps=0", "stage2.losses.gram.teacher=previous"),
        *(f"stage{n}.losses.gram.weight={gram}" for n in (2, 3)),
        *(f"stage{n}.losses.local_weight.cosine_steps=0" for n in (2, 3)),
        *("stage2.crops.resolutions.0.gram_size=96", "stage3.crops.resolutions.0.gram_size=96"),
        *("stage3.crops.resolutions.1.global_size=64", "stage3.crops.resolutions.1.local_size=48"),
        "stage3.crops.resolutions.1.gram_size=96",
    ]
    assert main(["pretrain", *map(str, words)]) == 0
    assert opened_and_closed(events) == ONE_STAGE * 3
    runs = [facts for _, what, facts in events if what == "init"]
    assert [run.name for run in runs] == ["run-stage1", "run-stage2", "run-stage3"]
    assert len({run.id for run in runs}) == 3
