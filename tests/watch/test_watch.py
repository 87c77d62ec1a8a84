"""``meddinov3 watch`` on folders as pretraining and nnU-Net write them."""

import io
import json
import math
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from nnunetv2_meddinov3.cli import main
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.files import write_rows
from nnunetv2_meddinov3.locks import LOCK, locked
from nnunetv2_meddinov3.models.architecture import architecture_of
from nnunetv2_meddinov3.pretrain.config import load_config, to_yaml
from nnunetv2_meddinov3.pretrain.operations import mean_flops
from nnunetv2_meddinov3.pretrain.stage_plan import note_stages
from nnunetv2_meddinov3.watch.cli import read_run
from nnunetv2_meddinov3.watch.folds_view import epochs_of, troubles
from nnunetv2_meddinov3.watch.stages_view import pace, seconds_an_image
from nnunetv2_meddinov3.watch.terminal import draw, line, sparkline
from nnunetv2_meddinov3.watch.view import Curve, Part, View

STEPS = ["optim.steps=100", "engine.log_every=10", "optim.batch_size=32"]


def metric(step, speed=8.0, **more):
    return {"step": step, "loss_total": 9 - step / 100, "images_per_second": speed, **more}


class Run:
    """A pretraining run of three stages of 100 steps of 32 images, made by hand."""

    def __init__(self, folder):
        self.folder = folder
        names = ("tiny_stage1", "tiny_stage2_gram", "tiny_stage3_highres")
        self.configs = tuple(load_config(name, STEPS) for name in names)
        folder.mkdir()
        note_stages(folder, self.configs, architecture_of("vit_tiny"))

    def stage(self, number, rows=(), health=(), finished=False):
        folder = self.folder / f"stage{number}"
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_text(to_yaml(self.configs[number - 1]))
        write_rows(folder / "metrics.jsonl", list(rows))
        write_rows(folder / "health.jsonl", list(health))
        if finished:
            (folder / "teacher.safetensors").touch()
        return folder


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "run")


def test_the_time_of_all_stages_follows_from_what_is_measured(run):
    run.stage(1, [metric(10, 4.0), metric(20, 16.0), metric(30, 8.0)])
    with locked(run.folder, print):
        view = read_run(run.folder)
    first, *later = view.parts
    seconds = (1 / 4 + 1 / 16 + 1 / 8) / 3  # an image
    assert (first.done, first.total, first.unit) == (30, 100, "steps")
    assert first.spent == pytest.approx(30 * 32 * seconds)
    assert first.left == pytest.approx(70 * 32 * seconds)
    assert first.state == f"runs, process {os.getpid()} on {os.uname().nodename}"
    a = architecture_of("vit_tiny")
    flops = [mean_flops(config, a) for config in run.configs]
    for part, more in zip(later, flops[1:], strict=True):
        assert part.is_guess
        assert part.state == "waits"
        assert part.done == 0
        assert part.left == pytest.approx(100 * 32 * seconds * more / flops[0], rel=1e-3)
    assert view.left == pytest.approx(sum(part.left for part in view.parts))
    assert view.current == 0
    assert not view.is_over


def test_the_stage_that_runs_is_shown_and_the_ones_before_count_no_more(run):
    run.stage(1, [metric(step, 8.0) for step in range(10, 101, 10)], finished=True)
    run.stage(2, [metric(10, 2.0)])
    for folder in (run.folder, run.folder / "stage1", run.folder / "stage2"):
        view = read_run(folder)
        assert [part.is_finished for part in view.parts] == [True, False, False]
        assert view.parts[0].spent == pytest.approx(100 * 32 / 8)
        assert view.current == 1
        assert view.folder.name == "run"
        assert view.left == pytest.approx(90 * 32 / 2 + view.parts[2].left)


def test_states_are_told_in_words(run):
    folder = run.stage(1, [metric(10)])
    assert read_run(run.folder).parts[0].state == "no process works on it"
    assert read_run(run.folder).parts[1].state == "not begun"
    (run.folder / "interrupted").touch()
    assert read_run(run.folder).parts[0].state == "stopped by a signal; the same command goes on"
    # a lock of another machine counts while that machine touches it
    lock = run.folder / LOCK
    lock.write_text(json.dumps({"host": "node7", "machine": "node7 x", "pid": 7, "since": "then"}))
    assert read_run(run.folder).parts[0].state == "runs, process 7 on node7"
    old = time.time() - 3600
    os.utime(folder / "metrics.jsonl", (old, old))
    [said] = read_run(run.folder).parts[0].wrong
    assert said.startswith(
        "nothing was logged for 60 min, though a line is due every 40 s and proc"
    )
    os.utime(lock, (old, old))
    part = read_run(run.folder).parts[0]
    assert part.state == "stopped by a signal; the same command goes on"
    assert part.wrong == []


def test_before_the_first_line_nothing_is_claimed(run):
    run.stage(1)
    view = read_run(run.folder)
    assert view.left is None
    assert view.parts[0].figures == {}
    assert "time left: unknown yet" in shown(view)
    assert "no numbers yet" in shown(view)
    assert "not checked yet" in shown(view)


def test_a_run_of_an_earlier_version_shows_the_stages_that_have_begun(run):
    (run.folder / "stages.json").unlink()
    run.stage(1, [metric(10)])
    view = read_run(run.folder)
    assert len(view.parts) == 1
    assert view.left == pytest.approx(90 * 32 / 8)


def test_what_the_health_check_said_is_shown(run):
    health = [{"step": 10, "verdicts": ["collapse: all the same."], "cls_rank_teacher": 1.1}]
    run.stage(1, [metric(10), metric(20, loss_koleo=math.nan)], health)
    view = read_run(run.folder)
    assert view.parts[0].wrong == ["collapse: all the same."]
    assert "! collapse: all the same." in shown(view)
    names = [curve.name for curve in view.parts[0].curves]
    assert names[:2] == ["total loss", "effective rank of cls tokens, teacher"]
    assert not any("_" in name for name in names)
    health[0]["verdicts"] = []
    run.stage(1, [metric(10)], health)
    assert "nothing wrong at the check of step 10" in shown(read_run(run.folder))


def test_lines_that_a_kill_tore_are_left_out(run):
    folder = run.stage(1, [metric(10)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "loss_to')
    assert read_run(run.folder).parts[0].done == 10
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('\n[3]\n{"step": 30, "images_per_second": 2.0}\n')
    assert read_run(run.folder).parts[0].done == 30  # read anew, since the file has changed


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([metric(i, data_wait_percent=60.0) for i in range(60)], "60 % of the time goes into wait"),
        (
            [metric(i, 8.0 if i < 150 else 1.0) for i in range(155)],
            "the run has slowed down to 1.0",
        ),
        ([metric(i, skipped=int(i > 57)) for i in range(60)], "2 of the last 50 logged steps were"),
        ([metric(i, data_wait_percent=5.0, skipped=0) for i in range(200)], None),
        ([metric(i, 8.0 if i < 5 else 1.0) for i in range(9)], None),  # too early to say
        ([], None),
    ],
)
def test_the_pace_is_judged(rows, said):
    found = pace(rows)
    assert len(found) == (said is not None)
    assert said is None or found[0].startswith(said)


def test_the_mean_speed_is_of_images_over_time():
    assert 1 / seconds_an_image([metric(1, 10.0), metric(2, 30.0)]) == pytest.approx(15.0)
    assert seconds_an_image([]) is None
    assert seconds_an_image([{"step": 1, "images_per_second": 0.0}]) is None


LOG = """
#######################################################################
Please cite the following paper when using nnU-Net:
#######################################################################

2026-11-26 17:13:18.000001: The ViT starts from random weights.
2026-11-26 17:13:20.000001: Using splits from existing split file: /x/splits_final.json
"""
EPOCH = """2026-11-26 17:16:38.077013:
2026-11-26 17:16:38.077171: Epoch {n}
2026-11-26 17:16:38.077308: Current learning rate: {rate}
2026-11-26 17:16:54.856207: train_loss {loss}
2026-11-26 17:16:54.856447: val_loss {val}
2026-11-26 17:16:54.856545: Pseudo dice [{dice}]
2026-11-26 17:16:54.856647: Epoch time: {seconds} s
2026-11-26 17:16:54.856724: Yayy! New best EMA pseudo Dice: 0.3056
"""
DONE = """2026-11-26 17:17:32.736559: Training done.
2026-11-26 17:17:34.922603: predicting case_1
"""
VALIDATED = """2026-11-26 17:17:45.011514: Validation complete
2026-11-26 17:17:45.011769: Mean Validation Dice:  0.7919417
"""


def an_epoch(n, loss=0.5, val=0.4, dice="np.float32(0.5), np.float32(nan)", seconds=60.0):
    return EPOCH.format(
        n=n, rate=f"{1e-5 * (n + 1):.5g}", loss=loss, val=val, dice=dice, seconds=seconds
    )


class Training:
    """A model folder with logs made by hand."""

    def __init__(self, root):
        self.model = root / "Dataset007_Made" / "nnUNetTrainer__nnUNetPlans__2d"
        self.model.mkdir(parents=True)
        labels = {"background": 0, "liver": 1, "tumour": 2}
        facts = {"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".nii.gz"}
        (self.model / "dataset.json").write_text(json.dumps({**facts, "numTraining": 8}))

    def fold(self, *logs, name="fold_0", epochs="50"):
        folder = self.model / name
        folder.mkdir()
        (folder / "debug.json").write_text(json.dumps({"num_epochs": epochs}))
        for i, text in enumerate(logs):
            (folder / f"training_log_2026_11_{10 + i}_01_00_00.txt").write_text(text)
        return folder


@pytest.fixture
def training(tmp_path):
    return Training(tmp_path)


def test_a_fold_is_read_from_its_logs(training):
    fold = training.fold(LOG + "".join(an_epoch(n, loss=1 - 0.1 * n) for n in range(4)))
    for place in (fold, training.model):
        [part] = read_run(place).parts
        assert (part.name, part.state, part.done, part.total) == ("fold 0", "runs", 4, 50)
        assert part.left == 46 * 60
        assert part.spent == 240
        series = {curve.name: list(curve.values) for curve in part.curves}
        assert series["training loss"] == pytest.approx([1.0, 0.9, 0.8, 0.7])
        assert series["pseudo Dice, mean"] == [0.5] * 4
        assert series["pseudo Dice, liver"] == [0.5] * 4
        assert "pseudo Dice, tumour" not in series  # no number at all
        assert part.wrong == []
        assert part.checked == "epoch 4"
        assert part.figures == {"an epoch": "60 s", "learning rate": "4.00e-05"}


def test_epochs_that_were_trained_again_count_once(training):
    first = LOG + "".join(an_epoch(n, loss=9) for n in range(5)) + EPOCH[:40]
    again = LOG + "".join(an_epoch(n, loss=n) for n in (3, 4, 5))
    training.fold(first, again)
    [part] = read_run(training.model).parts
    assert list(part.curves[0].values) == [9, 9, 9, 3, 4, 5]
    assert part.done == 6


@pytest.mark.parametrize(
    ("end", "state", "is_finished"),
    [
        ("", "runs", False),
        (DONE, "validates", False),
        (DONE + VALIDATED, "finished", True),
    ],
)
def test_the_end_of_a_training_is_seen(training, end, state, is_finished):
    training.fold(LOG + "".join(an_epoch(n) for n in range(2)) + end, epochs="2")
    view = read_run(training.model)
    [part] = view.parts
    assert (part.state, part.is_finished, view.is_over) == (state, is_finished, is_finished)
    assert part.figures.get("mean validation Dice") == ("0.7919" if is_finished else None)


def test_a_silent_training_is_told(training):
    fold = training.fold(LOG + an_epoch(0))
    [log] = fold.glob("training_log*")
    for age, state in ((600, "runs"), (1500, "silent")):
        os.utime(log, (time.time() - age,) * 2)
        [part] = read_run(training.model).parts
        assert part.state == state
        assert len(part.wrong) == (state != "runs")
    log.write_text(LOG)  # its first epoch may take long
    os.utime(log, (time.time() - 1500,) * 2)
    assert read_run(training.model).parts[0].state == "runs"
    os.utime(log, (time.time() - 4000,) * 2)
    assert read_run(training.model).parts[0].wrong[0].startswith("nothing was logged for 67 min: ")


def test_the_fold_that_was_written_last_is_shown(training):
    for name, age in (("fold_0", 900), ("fold_1", 5), ("fold_all", 300)):
        fold = training.fold(LOG + an_epoch(0), name=name)
        os.utime(next(fold.glob("training_log*")), (time.time() - age,) * 2)
    (training.model / "report.html").touch()
    view = read_run(training.model)
    assert [part.name for part in view.parts] == ["fold 0", "fold 1", "fold all"]
    assert view.current == 1
    assert view.page == training.model / "report.html"


def test_without_labels_or_length_what_is_known_is_shown(training):
    (training.model / "dataset.json").unlink()
    fold = training.fold(LOG + an_epoch(0, dice="0.25, 0.75"), name="fold_3")  # as older numpy
    (fold / "debug.json").unlink()
    view = read_run(training.model)
    assert view.left is None
    assert view.parts[0].total is None
    names = {curve.name: curve.values[0] for curve in view.parts[0].curves}
    assert names["pseudo Dice, label 2"] == 0.75
    assert "1 epochs" in shown(view)


def epochs(*, dice=None, loss=0.5, seconds=60.0, number=30):
    found = [{"dice": [0.5, 0.6], "train_loss": 0.4, "val_loss": loss, "seconds": 60.0}]
    found = [dict(found[0]) for _ in range(number)]
    for row in found[-20:]:
        row["dice"] = dice or row["dice"]
    for row in found[-5:]:
        row["seconds"] = seconds
    return found


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (epochs(loss=math.nan), "the validation loss is not a number"),
        (epochs(dice=[1.0, 0.0]), "no voxel of tumour was found in the last 20 epochs"),
        (epochs(dice=[0.3, 0.2]), "the pseudo Dice has fallen to 0.250 from 0.550"),
        (epochs(seconds=200.0, number=60), "epochs take 200 s, they took 60 s"),
        (epochs(), None),
        (epochs(dice=[0.6, math.nan]), None),  # a label that no patch had
        (epochs(dice=[0.55, 0.5]), None),
        (epochs(seconds=200.0, number=10), None),
        ([], None),
    ],
)
def test_troubles_of_a_training_are_told(rows, said):
    found = troubles(rows, ["liver", "tumour"])
    assert len(found) == (said is not None), found
    assert said is None or found[0].startswith(said)


def test_a_training_that_diverged_is_told(training):
    training.fold(LOG + an_epoch(0) + an_epoch(1, loss="nan"))
    [said] = read_run(training.model).parts[0].wrong
    assert said.startswith("the training loss is not a number")


def test_lines_that_look_alike_are_no_epochs():
    lines = [
        "Epoch time: 3 s",
        "Epoch x",
        "train_loss of",
        "Pseudo dice",
        "Epoch 0",
        "train_loss 1",
    ]
    assert epochs_of(lines) == ([], lines[:4] + lines[4:])


@pytest.mark.parametrize(
    ("values", "width", "text"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], 32, "▁▂▃▄▅▆▇█"),
        ([3.0], 32, "▅"),
        ([2, 2, 2], 32, "▅▅▅"),
        ([0, 0, 10, 10], 2, "▁█"),
        (list(range(1000)), 8, "▁▂▃▄▅▆▇█"),
        ([-1e30, 1e30], 4, "▁█"),
    ],
)
def test_a_curve_in_a_line(values, width, text):
    assert sparkline(values, width) == text
    assert len(sparkline(list(range(33)), 32)) == 32


def shown(view, width=120, **options):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(draw(view, **options))
    return console.file.getvalue()


def a_view(tmp_path, curves=20, **more):
    many = [Curve(f"curve {i}", [1.0, 2.0]) for i in range(curves)]
    part = Part("stage 1", "runs", 3, 10, "steps", left=70.0, curves=many, **more)
    return View("pretraining x", tmp_path, [part], 0, None)


def test_the_most_telling_curves_are_shown_unless_all_are_asked_for(tmp_path):
    view = a_view(tmp_path)
    assert "curve 9 " in shown(view)
    assert "curve 10" not in shown(view)
    assert "curve 19" in shown(view, everything=True)
    assert shown(view, blocks=False).replace(str(tmp_path), "").isascii()


def test_markup_in_names_is_text(tmp_path):
    text = shown(a_view(tmp_path / "[bold]x[/nothing]", wrong=["a [red]b[/red]"]), width=300)
    assert "[bold]x[/nothing]" in text
    assert "! a [red]b[/red]" in text


def test_a_line_says_what_matters(tmp_path):
    said = line(a_view(tmp_path, figures={"images/s": "8.0", "memory": "1 GB"}))
    assert said == "stage 1: 3/10 steps, runs, curve 0 2, images/s 8.0; time left: 70 s"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path / "none", "the folder of a run must exist, but there is no folder"),
        (lambda path: path, "has neither stages nor folds: give"),
        (lambda path: Training(path).model.parent, "has neither stages nor folds: give"),
        (lambda path: Training(path).fold(), "has no training_log_*.txt yet: wait"),
    ],
)
def test_other_folders_are_refused_in_a_sentence(make, said, tmp_path):
    with pytest.raises(UserError, match=re.escape(said)):
        main(["watch", str(make(tmp_path)), "--once"])


def test_a_folder_of_models_names_them(training):
    (training.model / "plans.json").write_text("{}")
    with pytest.raises(UserError, match=r"it holds nnUNetTrainer__nnUNetPlans__2d"):
        main(["watch", str(training.model.parent)])


@pytest.mark.parametrize("every", ["0", "-1", "nan", "inf"])
def test_a_wrong_interval_is_refused(every, run):
    run.stage(1, [metric(10)])
    with pytest.raises(UserError, match="--every must be a number of seconds above 0"):
        main(["watch", str(run.folder), "--every", every])


def test_a_plan_of_stages_that_is_damaged_is_told(run):
    run.stage(1, [metric(10)])
    for text in ("{", '[{"stage": 1}]', "3", "[3]"):
        (run.folder / "stages.json").write_text(text)
        with pytest.raises(UserError, match=r"stages\.json must hold the stages of a run, but"):
            read_run(run.folder)


def test_once_shows_the_whole_and_writes_nothing(run, capsys):
    run.stage(1, [metric(10), metric(20)])
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*") if path.is_file()}
    assert main(["watch", str(run.folder), "--once"]) == 0
    out = capsys.readouterr().out
    assert "20 of 100 steps" in out
    assert "total loss" in out
    assert "stage 3" in out
    after = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*") if path.is_file()}
    assert before == after


def test_without_a_terminal_a_change_is_a_line_and_the_end_ends_it(run, monkeypatch, capsys):
    health = [{"step": 10, "verdicts": ["only 1 % (of 8) are used."]}]
    moments = [
        lambda: run.stage(1, [metric(10), metric(20)], health),
        lambda: None,  # nothing new: no line
        lambda: run.stage(1, [metric(10), metric(30)], health),
        lambda: [run.stage(n, [metric(100)], finished=True) for n in (1, 2, 3)],
    ]
    run.stage(1, [metric(10)])
    monkeypatch.setattr(time, "sleep", lambda seconds: moments.pop(0)())
    assert main(["watch", str(run.folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [text.partition(" steps")[0] for text in lines] == [
        "stage 1: 10/100",
        "stage 1: 20/100",
        "stage 1: only 1 % (of 8) are used.",
        "stage 1: 30/100",
        "stage 3: 100/100",
    ]
    assert lines[-1].endswith("everything is finished")


@pytest.mark.slow
def test_a_terminal_shows_it_until_ctrl_c_and_ends_with_the_run(run):
    run.stage(1, [metric(10)])
    command = [sys.executable, "-m", "nnunetv2_meddinov3", "watch", str(run.folder)]
    command += ["--every", "0.2"]

    def in_a_terminal(act):
        ours, theirs = pty.openpty()
        job = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            # jobs in the background, and so perhaps these tests, are started with it ignored
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        os.close(theirs)
        text, acted, end = b"", False, time.monotonic() + 120
        try:
            while time.monotonic() < end:
                if select.select([ours], [], [], 0.2)[0]:
                    try:
                        text += os.read(ours, 65536)
                    except OSError:  # closed at its other end
                        break
                if not acted and b"10 of 100 steps" in text:
                    act(job)
                    acted = True
            return job.wait(10), text.decode()
        finally:
            job.kill()
            job.wait()
            os.close(ours)

    code, text = in_a_terminal(lambda job: job.send_signal(signal.SIGINT))
    assert code == 0
    assert "Traceback" not in text
    code, text = in_a_terminal(
        lambda job: [run.stage(n, [metric(100)], finished=True) for n in (1, 2, 3)]
    )
    assert code == 0
    assert "everything is finished" in text
    assert "Traceback" not in text


@pytest.mark.slow
def test_a_terminal_without_our_characters_gets_others(run):
    run.stage(1, [metric(10), metric(20)])
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "60"}
    command = [sys.executable, "-m", "nnunetv2_meddinov3", "watch", str(run.folder), "--once"]
    done = subprocess.run(command, capture_output=True, env=environment, check=True)
    assert done.stderr == b""
    assert b"=" in done.stdout
    assert done.stdout.isascii()
