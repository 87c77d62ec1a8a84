import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.files import read_rows
from nnunetv2_meddinov3.pretrain.checkpoints import CheckpointFolder, read_state
from nnunetv2_meddinov3.pretrain.config import flatten, load_config
from nnunetv2_meddinov3.pretrain.distributed import Runtime
from nnunetv2_meddinov3.pretrain.train import Stage
from nnunetv2_meddinov3.signals import Stop

ROOT = Path(__file__).parents[2]
TIMINGS = ("images_per_second", "data_wait_percent", "memory_gb")
ALONE = Runtime(0, 1, torch.device("cpu"), "fp32", False)


def stage_of(overrides, folder, **changes):
    more = [f"{key}={value}" for key, value in changes.items()]
    config = load_config("tiny_stage1", [*overrides, *more])
    return Stage(config, folder, ALONE, previous=None, stream=io.StringIO())


def stop_at(stage, step):
    """A signal that comes while a step is at work."""
    stop = Stop()
    original = stage.distillation.update_teacher

    def update(momentum):
        original(momentum)
        if stage.step == step - 2:
            stop.number = signal.SIGTERM  # seen by the step after

    stage.distillation.update_teacher = update
    return stop


def same(a, b):
    """Whether two training states are equal to the last bit."""
    a, b = flatten(a), flatten(b)
    if set(a) != set(b):
        return False
    return all(
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else repr(a[k]) == repr(b[k])
        for k in a
    )


def rows(folder):
    kept = read_rows(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in kept]


@pytest.fixture(scope="module")
def unbroken(small_stage, tmp_path_factory):
    """Six steps at once."""
    folder = tmp_path_factory.mktemp("unbroken") / "stage1"
    stage = stage_of(small_stage("optim.steps=6"), folder)
    assert stage.run(Stop())
    return folder


@pytest.mark.parametrize(("workers", "broken_after"), [(0, 3), (2, 2), (0, 5)])
def test_a_resumed_run_equals_an_unbroken_one_to_the_last_bit(
    small_stage, unbroken, tmp_path, workers, broken_after
):
    folder = tmp_path / "stage1"
    first = stage_of(small_stage("optim.steps=6"), folder)
    assert not first.run(stop_at(first, broken_after))
    assert CheckpointFolder(folder / "checkpoints").steps() == [broken_after]
    torch.manual_seed(99)  # whatever a process did before
    second = stage_of(small_stage("optim.steps=6"), folder, **{"data.workers": workers})
    assert second.step == broken_after
    assert second.run(Stop())
    wanted = read_state(unbroken / "checkpoints/step_0000006/state.pt")
    found = read_state(folder / "checkpoints/step_0000006/state.pt")
    assert found.keys() == wanted.keys()
    for key in found.keys() - {"config"}:  # whose data.workers differs
        assert same({key: found[key]}, {key: wanted[key]}), key
    assert rows(folder) == rows(unbroken)
    ours, theirs = (f / "teacher.safetensors" for f in (folder, unbroken))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_run_with_sigreg_resumes_to_the_last_bit(small_stage, tmp_path):
    words = small_stage("optim.steps=4", "losses.regulariser=sigreg", "losses.sigreg_slices=64")
    whole, broken = (tmp_path / name / "stage1" for name in ("whole", "broken"))
    assert stage_of(words, whole).run(Stop())
    first = stage_of(words, broken)
    assert not first.run(stop_at(first, 2))
    assert stage_of(words, broken).run(Stop())
    ours, theirs = (f / "teacher.safetensors" for f in (whole, broken))
    assert ours.read_bytes() == theirs.read_bytes()
    assert rows(whole) == rows(broken)
    assert all("loss_koleo" not in row and row["loss_sigreg"] > 0 for row in rows(whole))
    assert len({row["loss_sigreg"] for row in rows(whole)}) == 4
    weighted = [row["loss_total"] - 0.05 * row["loss_sigreg"] for row in rows(whole)]
    parts = [
        row["loss_ibot"] + (2 * row["loss_dino_global"] + 4 * row["loss_dino_local"]) / 6
        for row in rows(whole)
    ]
    assert weighted == pytest.approx(parts, rel=1e-5)


def test_a_checkpoint_holds_what_a_resume_reads_and_what_describes_it(unbroken):
    state = read_state(unbroken / "checkpoints/step_0000006/state.pt")
    resumed = {"model", "optimizer", "step", "gram_refreshes", "bad_in_a_row", "config", "store"}
    described = {"format", "stage", "architecture", "licence", "base", "intensity", "world_size"}
    assert state.keys() == resumed | described | {"precision", "gram_architecture"}


def test_a_run_does_not_go_on_in_another_precision_that_the_device_chose(
    small_stage, unbroken, tmp_path
):
    folder = tmp_path / "stage1"
    shutil.copytree(unbroken, folder)
    path = folder / "checkpoints/step_0000006/state.pt"
    state = read_state(path)
    torch.save(state | {"precision": "bf16"}, path)  # as a GPU does where auto is asked for
    with pytest.raises(UserError, match=r"continued in bf16.*computes in fp32.*engine.precision"):
        stage_of(small_stage("optim.steps=6"), folder)
    del state["precision"]  # as earlier versions wrote it
    torch.save(state, path)
    assert stage_of(small_stage("optim.steps=6"), folder).step == 6


def test_a_checkpoint_with_more_in_it_as_earlier_versions_wrote_goes_on(
    small_stage, unbroken, tmp_path
):
    folder = tmp_path / "stage1"
    first = stage_of(small_stage("optim.steps=6"), folder)
    assert not first.run(stop_at(first, 3))
    path = folder / "checkpoints/step_0000003/state.pt"
    more = {"sampler": {"seed": 0, "next_step": 3}, "rates": {"lr": 0.1}, "rng": [torch.zeros(9)]}
    torch.save(read_state(path) | more, path)
    assert stage_of(small_stage("optim.steps=6"), folder).run(Stop())
    ours, theirs = (f / "teacher.safetensors" for f in (folder, unbroken))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_resume_reads_the_training_state_once(small_stage, unbroken, reads_of_states):
    stage_of(small_stage("optim.steps=6"), unbroken)
    assert reads_of_states == [unbroken / "checkpoints/step_0000006/state.pt"]


def test_the_comparison_sees_a_single_bit(unbroken):
    state = read_state(unbroken / "checkpoints/step_0000006/state.pt")["model"]
    other = {k: t.clone() for k, t in state.items()}
    key = "student.backbone.vit.blocks.1.mlp.fc1.weight"
    other[key].view(torch.int32)[0, 0] ^= 1
    assert same(state, state)
    assert not same(state, other)


def test_checkpoints_are_pruned_to_the_last_and_the_multiples(small_stage, tmp_path):
    more = ("optim.steps=7", "engine.save_every=1", "engine.keep_last=2", "engine.keep_every=3")
    stage_of(small_stage(*more), tmp_path / "stage1").run(Stop())
    assert CheckpointFolder(tmp_path / "stage1/checkpoints").steps() == [3, 6, 7]


def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(small_stage, tmp_path, monkeypatch):
    folder = tmp_path / "stage1"
    stage = stage_of(small_stage("optim.steps=4", "engine.save_every=2"), folder)
    original = torch.save

    def full(value, file):
        if stage.step == 4:
            file.write(b"torn")
            raise OSError(28, "No space left on device")
        original(value, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"No space left on device; the last one is of step 2"):
        stage.run(Stop())
    monkeypatch.undo()
    kept = CheckpointFolder(folder / "checkpoints")
    assert kept.steps() == [2]
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step_0000002"]
    assert read_state(kept.latest())["step"] == 2
    again = stage_of(small_stage("optim.steps=4", "engine.save_every=2"), folder)
    assert again.run(Stop())


def test_another_config_another_store_and_a_damaged_state_are_refused(
    small_stage, unbroken, tmp_path, make_ct, write_image
):
    with pytest.raises(UserError, match=r"optim.clip_grad is 1.0 instead of 3.0: give the same"):
        stage_of(small_stage("optim.steps=6"), unbroken, **{"optim.clip_grad": 1.0})
    from nnunetv2_meddinov3.curate.pipeline import curate

    for i in range(3):
        write_image(tmp_path / f"v/p{i}.nii.gz", make_ct(5, 64, seed=50 + i))
    curate([tmp_path / "v"], tmp_path / "other")
    with pytest.raises(UserError, match=r"the store now holds others \(24 before, 15 now\)"):
        stage_of(small_stage("optim.steps=6", f"data.store={tmp_path / 'other'}"), unbroken)
    path = tmp_path / "checkpoints/step_0000002/state.pt"
    path.parent.mkdir(parents=True)
    path.write_bytes((unbroken / "checkpoints/step_0000006/state.pt").read_bytes()[:5000])
    with pytest.raises(UserError, match=r"damaged .* delete the folder step_0000002"):
        read_state(path)
    torch.save({"format": 99}, path)
    with pytest.raises(UserError, match="must be a training state of format 1"):
        read_state(path)


def test_steps_that_are_not_finite_are_skipped_and_end_the_run_with_the_batch_kept(
    small_stage, tmp_path
):
    stage = stage_of(small_stage("optim.steps=9", "engine.save_every=1"), tmp_path / "stage1")
    original = stage.distillation.losses
    before = {}

    def poisoned(*arguments, **options):
        losses, observed = original(*arguments, **options)
        if stage.step >= 2:
            before.update({k: t.clone() for k, t in stage.distillation.state_dict().items()})
            losses["total"] = losses["total"] * float("nan")
        return losses, observed

    stage.distillation.losses = poisoned
    with pytest.raises(UserError, match=r"3 steps in a row up to step 4 were not"):
        stage.run(Stop())
    assert all(torch.equal(t, before[k]) for k, t in stage.distillation.state_dict().items())
    batch = torch.load(tmp_path / "stage1/bad_steps/step_0000004_rank0.pt", weights_only=True)
    assert batch["micro_batches"][0]["global_crops"].shape == (16, 1, 48, 48)
    kept = rows(tmp_path / "stage1")
    assert [row["skipped"] for row in kept] == [0, 0, 1, 1]


def test_one_bad_step_is_left_out_and_the_run_goes_on(small_stage, tmp_path):
    stage = stage_of(small_stage("optim.steps=4"), tmp_path / "stage1")
    original = stage.distillation.losses

    def once(*arguments, **options):
        losses, observed = original(*arguments, **options)
        factor = float("inf") if stage.step == 1 else 1
        return losses | {"total": losses["total"] * factor}, observed

    stage.distillation.losses = once
    assert stage.run(Stop())
    assert [row["skipped"] for row in rows(tmp_path / "stage1")] == [0, 1, 0, 0]


def command(overrides, out):
    return [
        *(sys.executable, "-m", "nnunetv2_meddinov3", "pretrain", "tiny", "--stage", "1"),
        *("--out", str(out), *overrides),
    ]


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_an_unbroken_one(small_stage, tmp_path):
    overrides = small_stage("optim.steps=21", "engine.save_every=3", "data.workers=1")
    rng = np.random.default_rng(int(os.environ.get("MEDDINOV3_TEST_SEED", "0")))
    done = subprocess.run(
        command(overrides, tmp_path / "whole"), env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    kills = 0
    for _ in range(6):
        process = subprocess.Popen(
            command(overrides, tmp_path / "killed"),
            env=environment(),
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        checkpoints = CheckpointFolder(tmp_path / "killed/stage1/checkpoints")
        before = checkpoints.steps()[-1:]
        while process.poll() is None and checkpoints.steps()[-1:] == before:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills >= 3
    done = subprocess.run(
        command(overrides, tmp_path / "killed"), env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    whole, killed = (tmp_path / n / "stage1" for n in ("whole", "killed"))
    assert (whole / "teacher.safetensors").read_bytes() == (
        killed / "teacher.safetensors"
    ).read_bytes()
    assert rows(whole) == rows(killed)
    assert not list((killed / "checkpoints").glob("*.part"))


@pytest.mark.slow
def test_a_signal_saves_leaves_a_mark_and_the_same_command_goes_on(small_stage, tmp_path):
    overrides = small_stage("optim.steps=400")
    process = subprocess.Popen(
        command(overrides, tmp_path), env=environment(), stderr=subprocess.PIPE, text=True
    )
    while " 3/400 steps" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 143, text
    assert "the same command goes on" in text
    assert (tmp_path / "interrupted").is_file()
    step = CheckpointFolder(tmp_path / "stage1/checkpoints").steps()[-1]
    assert 3 <= step < 400
    assert rows(tmp_path / "stage1")[-1]["step"] == step
    last = json.loads((tmp_path / "stage1/run.json").read_text())
    assert last["world_size"] == 1
