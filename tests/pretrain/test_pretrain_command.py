import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nnunetv2_meddinov3.cli import main
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.locks import locked
from nnunetv2_meddinov3.models.architecture import architecture_of
from nnunetv2_meddinov3.pretrain import distributed
from nnunetv2_meddinov3.pretrain.config import from_yaml
from nnunetv2_meddinov3.pretrain.operations import mean_flops
from nnunetv2_meddinov3.pretrain.stage_plan import PlannedStage, planned_stages
from nnunetv2_meddinov3.watch.cli import read_run

ROOT = Path(__file__).parents[2]
needs_fsdp2 = pytest.mark.skipif(
    not distributed._AVERAGES_ON_CPU, reason="FSDP2 on CPUs needs PyTorch 2.9"
)


def pretrain(*words):
    return main(["pretrain", *map(str, words)])


@pytest.fixture(scope="module")
def three_stages(small_stage, tmp_path_factory):
    """All stages at their smallest, by the command."""
    out = tmp_path_factory.mktemp("run")
    gram = "{start: 1, peak: 1, end: 1, warmup_steps: 0, cosine_steps: 0}"
    words = [
        *("tiny", "--out", out, *small_stage("optim.steps=4", "optim.lr.cosine_steps=0")),
        *("stage1.engine.export_at=[2]", "stage2.losses.gram.teacher=previous@2"),
        *(f"stage{n}.losses.gram.weight={gram}" for n in (2, 3)),
        *(f"stage{n}.losses.local_weight.cosine_steps=0" for n in (2, 3)),
        *("stage2.crops.resolutions.0.gram_size=96", "stage3.crops.resolutions.0.gram_size=96"),
        *("stage3.crops.resolutions.1.global_size=64", "stage3.crops.resolutions.1.local_size=48"),
        *("stage3.crops.resolutions.1.gram_size=96", "stage3.engine.micro_batch=4"),
    ]
    assert pretrain(*words) == 0
    return out, words


def test_three_stages_leave_what_they_should(three_stages):
    out, _ = three_stages
    for n in (1, 2, 3):
        folder = out / f"stage{n}"
        names = {"config.yaml", "run.json", "metrics.jsonl", "health.jsonl"}
        names |= {"teacher.safetensors", "report.html", "checkpoints", "maps"}
        assert names <= {path.name for path in folder.iterdir()}
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2, 3, 4]
        assert ("loss_gram" in rows[0]) == (n > 1)
    assert (out / "stage1/exports/teacher_step_000002.safetensors").is_file()
    assert not (out / "interrupted").exists()


def test_a_run_can_be_watched(three_stages):
    out, _ = three_stages
    view = read_run(out)
    assert [(part.name, part.done, part.total) for part in view.parts] == [
        (f"stage {n}", 4, 4) for n in (1, 2, 3)
    ]
    assert view.is_over
    assert view.page == out / "stage3/report.html"
    rows = [json.loads(line) for line in (out / "stage3/metrics.jsonl").read_text().splitlines()]
    curves = {curve.name: list(curve.values) for curve in view.parts[2].curves}
    assert curves["Gram loss"] == [row["loss_gram"] for row in rows]
    config = from_yaml((out / "stage3/config.yaml").read_text())
    [*_, planned] = planned_stages(out)
    flops = mean_flops(config, architecture_of("vit_tiny"))
    assert planned == PlannedStage(3, 4, 8, pytest.approx(flops / 1e9, abs=1e-3))


def test_the_gram_teacher_is_retained_by_the_third_stage(three_stages):
    out, _ = three_stages
    models = [
        torch.load(out / f"stage{n}/checkpoints/step_0000004/state.pt", weights_only=True)["model"]
        for n in (2, 3)
    ]
    from nnunetv2_meddinov3.models.build import load_backbone

    wanted = load_backbone(out / "stage1/exports/teacher_step_000002.safetensors").state_dict()
    for model in models:
        own = {
            k.removeprefix("gram_teacher.backbone."): t
            for k, t in model.items()
            if k.startswith("gram_teacher.")
        }
        assert all(torch.equal(own[k], t) for k, t in wanted.items())


@pytest.mark.slow
def test_a_short_run_needs_one_option_and_each_stage_says_what_is_next(ct_store, tmp_path, capsys):
    small = ["crops.resolutions.0.global_size=96", "optim.batch_size=8", "data.workers=0"]
    out = tmp_path / "my run"
    words = ["--store", ct_store, "--out", out, "--steps", "2", *small]
    assert pretrain("tiny", "--stage", "1", *words) == 0
    said = capsys.readouterr().err
    assert f"teacher      {out}/stage1/teacher.safetensors" in said
    assert f"report       {out}/stage1/report.html" in said
    assert f"MEDDINOV3_WEIGHTS='{out}/stage1/teacher.safetensors' nnUNetv2_train" in said
    (line,) = [line for line in said.splitlines() if "next stage" in line]
    verb, *again = shlex.split(line)[2:]  # followed as it is
    assert (verb, again[:4]) == ("meddinov3", ["pretrain", "tiny", "--stage", "2"])
    assert main(again) == 0
    assert "--stage 3" in capsys.readouterr().err
    assert pretrain("tiny", *words) == 0
    said = capsys.readouterr().err
    assert "next stage" not in said
    assert f"MEDDINOV3_WEIGHTS='{out}/stage3/teacher.safetensors'" in said


def test_a_finished_run_is_left_alone(three_stages, capsys):
    out, words = three_stages
    before = (out / "stage3/teacher.safetensors").stat().st_mtime_ns
    assert pretrain(*words) == 0
    assert (out / "stage3/teacher.safetensors").stat().st_mtime_ns == before
    assert capsys.readouterr().err.count("is finished") == 3


def test_a_finished_stage_is_not_taken_for_one_with_another_config(three_stages):
    _, words = three_stages
    with pytest.raises(UserError, match=r"finished with another config \(optim.clip_grad is 1"):
        pretrain(*words, "stage2.optim.clip_grad=1")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["tiny", "--store", "nowhere", "--out", "o"], "must be a slice store"),
        (["tiny", "--out", "o"], "needs a slice store: give --store DIR"),
        (["tinny", "--out", "o"], r"did you mean tiny\?"),
        (["optim.steps=3", "--out", "o"], "needs a config: give one of tiny, vitb16"),
        (["tiny_stage2_gram", "tiny_stage1"], r"in their order, got stages \[2, 1\]"),
        (["tiny_stage1", "--stage", "2"], r"--stage 2 must be one of .* \[1\]"),
        (["tiny", "stage4.optim.steps=3"], "must begin with stage1., stage2. or stage3."),
        (["tiny", "stage2.optim.stepz=3"], "unknown key optim.stepz"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(tmp_path, monkeypatch, words, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=sentence) as caught:
        pretrain(*words)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_start_of_the_command_goes_to_the_first_of_its_stages_whatever_its_name():
    from nnunetv2_meddinov3.pretrain.stages import stages_of

    found = stages_of(["tiny"], [], init="weights: [a] #1 = b.pth")
    assert [c.init.source for c in found] == ["weights: [a] #1 = b.pth", "previous", "previous"]
    (second,) = stages_of(["tiny"], [], stage="2", init="timm:vit", store="a: b")
    assert (second.init.source, second.data.store) == ("timm:vit", "a: b")


@pytest.fixture
def told_before_torch(tmp_path):
    """A function that gives what the command says of a mistake in a process without torch."""

    def told(*words):
        code = (
            "import sys\nfrom nnunetv2_meddinov3.cli import main\n"
            f"try: main({['pretrain', *map(str, words)]!r})\n"
            "except ValueError as error: print(error)\n"
            "assert not {'torch', 'timm'} & set(sys.modules)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--out", "o", "optim.stepz=3"], "unknown key optim.stepz"),
        (["--out", "o", "optim.batch_size=12", "engine.micro_batch=8"], "take one of 4, 12"),
        (["--out", "file", "--stage", "1"], "must be writable"),
        (["--out", "file/below", "--stage", "1"], "must be writable"),
        (["--out", "o", "--store", "nowhere"], "must be a slice store"),
        (["--dry-run", "--store", "nowhere"], "must be a slice store"),
        (["--out", "o", "--stage", "3"], "starts from stage 2"),
        (["--out", "held", "--stage", "1"], "one process at a time, but process"),
        ([], "give --out DIR"),
    ],
)
def test_a_mistake_is_told_before_torch_is_imported(
    small_stage, told_before_torch, tmp_path, words, sentence
):
    (tmp_path / "file").touch()
    with locked(tmp_path / "held", print):
        said = told_before_torch("tiny", *small_stage(), *words)
    assert sentence in said
    assert said.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_a_run_that_another_process_works_on_is_refused_and_not_touched(small_stage, tmp_path):
    words = ["tiny", "--stage", "1", "--out", tmp_path / "run", *small_stage("optim.steps=1")]
    with locked(tmp_path / "run", print):
        with pytest.raises(UserError, match=f"but process {os.getpid()} on .*since"):
            pretrain(*words)
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock.json"]
    assert pretrain(*words) == 0
    assert not (tmp_path / "run/lock.json").exists()


def test_a_lock_taken_between_the_check_and_the_start_is_respected(
    small_stage, tmp_path, monkeypatch
):
    monkeypatch.setattr("nnunetv2_meddinov3.pretrain.stages.refuse_locked", lambda folder: None)
    words = ["tiny", "--stage", "1", "--out", tmp_path / "run", *small_stage("optim.steps=1")]
    with locked(tmp_path / "run", print), pytest.raises(UserError, match="one process at a time"):
        pretrain(*words)
    assert not (tmp_path / "run/stage1").exists()


def test_no_folder_to_write_to_is_one_sentence(small_stage):
    with pytest.raises(UserError, match="give --out DIR"):
        pretrain("tiny", *small_stage())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--stage", "2"], "starts from stage 1, but .* holds no teacher.safetensors"),
        (["stage1.init.source=previous"], "stage 1 has no previous stage"),
        (["stage2.losses.gram.teacher=previous@3"], r"exports at \[\] of 400 steps: set stage1"),
        (["optim.batch_size=12", "engine.micro_batch=8"], "take one of 4, 12"),
    ],
)
def test_a_chain_that_cannot_be_is_refused_before_it_starts(small_stage, tmp_path, words, sentence):
    with pytest.raises(UserError, match=sentence):
        pretrain("tiny", "--out", tmp_path / "out", *small_stage(), *words)
    assert not (tmp_path / "out").exists()


def test_a_wrong_number_of_processes_is_one_sentence(small_stage, tmp_path):
    """The command as three processes would see it; refused before any of them waits for others."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": "0", "WORLD_SIZE": "3"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "LOCAL_RANK": "0"}
    words = ["tiny", "--stage", "1", "--out", tmp_path / "out", *small_stage()]
    done = subprocess.run(
        [sys.executable, "-m", "nnunetv2_meddinov3", "pretrain", *map(str, words)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "3 x 4 = 12, got 8: take 12, or another number of processes" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", pytest.param("fsdp2", marks=needs_fsdp2)])
def test_a_run_on_two_ranks_goes_on_on_two_and_on_one(small_stage, tmp_path, way):
    words = ["tiny", "--stage", "1", *small_stage("optim.steps=4", "engine.save_every=2")]
    words += ["model.drop_path=0", f"engine.parallel={way}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]

    def run(name, *launcher):
        command = [*launcher, "-m", "nnunetv2_meddinov3", "pretrain", *words]
        command += ["--out", str(tmp_path / name)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        path = tmp_path / name / "stage1/checkpoints/step_0000004/state.pt"
        return torch.load(path, weights_only=True)

    whole = run("whole", *torchrun)
    assert {key.partition(".")[0] for key in whole["model"]} == {"student", "teacher"}
    for name, launcher in (("two", torchrun), ("one", [sys.executable])):
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        shutil.rmtree(tmp_path / name / "stage1/checkpoints/step_0000004")
        (tmp_path / name / "stage1/teacher.safetensors").unlink()
        again = run(name, *launcher)  # from step 2, which two ranks saved
        assert again["world_size"] == (2 if name == "two" else 1)
        assert again["optimizer"]["state"].keys() == whole["optimizer"]["state"].keys()
        for key, tensor in whole["model"].items():
            tolerance = 0 if name == "two" else 2e-4
            torch.testing.assert_close(again["model"][key], tensor, rtol=0, atol=tolerance)


def test_a_dry_run_says_sizes_memory_and_time_and_writes_nothing(
    small_stage, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert pretrain("tiny", "--stage", "1", "--dry-run", *small_stage()) == 0
    text = capsys.readouterr().out
    for words in ("2 x 48 px (3 x 3 patches)", "sqrt(batch / 512)", "GFLOP", "GB", "one step"):
        assert words in text
    assert list(tmp_path.iterdir()) == []


def test_help_needs_no_torch():
    code = (
        "import sys; from nnunetv2_meddinov3.cli import main\n"
        "try: main(['pretrain', '--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "torchrun --nproc-per-node 8" in done.stdout
