"""Batches with NaN or infinity: left out and named, on every rank, and no run of them alone."""

import json
import os
import subprocess
import sys

import blosc2
import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.step_guard import StepGuard
from nnunetv2_meddinov3.trainers.meddinov3_trainers import MedDINOv3Trainer_scratch

LABELS = {"background": 0, "one": 1}


def poison(folder, cases, value, where=np.s_[:]):
    """Write ``value`` into preprocessed images."""
    for case in cases:
        file = str(folder / "nnUNetPlans_2d" / f"{case}.b2nd")
        image = blosc2.open(file, mode="r")[:]
        image[where] = value
        os.remove(file)  # noqa: PTH107
        blosc2.asarray(image, urlpath=file)


def checkpoint_of(fold):
    return torch.load(fold / "checkpoint_final.pth", weights_only=False)


def tensors_in(content):
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, dict | list | tuple):
        for value in content.values() if isinstance(content, dict) else content:
            yield from tensors_in(value)


def log_of(fold):
    return "\n".join(p.read_text() for p in sorted(fold.glob("training_log*.txt")))


@pytest.fixture
def poisoned(workplace, monkeypatch):
    """A function: Dataset ``number`` with training cases poisoned, trained; returns the fold."""
    monkeypatch.setenv("MEDDINOV3_EPOCHS", "2")
    monkeypatch.setenv("MEDDINOV3_ITERATIONS", "8")

    def train(number, cases, value, where=np.s_[:]):
        workplace.add_dataset(number, labels=LABELS)
        folder = workplace.prepare(number)
        # fold "all" trains on every case, and its validation is not what is tested
        poison(folder, cases, value, where)
        monkeypatch.setattr(nnUNetTrainer, "perform_actual_validation", lambda *args: None)
        return workplace.train(number, fold="all")

    return train


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "cases", "value", "where"),
    [
        (41, ["case_1"], np.inf, np.s_[0, 1:3, 20, 20]),
        (42, ["case_0"], -np.inf, np.s_[:]),
        (43, ["case_3", "case_4"], np.nan, np.s_[:]),
    ],
    ids=["a few pixels of inf", "a case of -inf", "two cases of NaN"],
)
def test_poisoned_cases_cost_their_batches_and_are_named(number, cases, value, where, poisoned):
    fold = poisoned(number, cases, value, where)
    checkpoint = checkpoint_of(fold)
    for part in ("network_weights", "optimizer_state"):
        assert all(torch.isfinite(t).all() for t in tensors_in(checkpoint[part]))
    assert np.isfinite(checkpoint["logging"]["train_losses"]).all()
    lines = [line for line in log_of(fold).splitlines() if "is left out" in line]
    assert lines
    assert len(lines) < 16
    named = {n for line in lines for n in line.partition("images of ")[2].rstrip(". ").split(", ")}
    assert named <= set(cases)


@pytest.mark.slow
def test_a_run_of_poisoned_cases_alone_stops_with_a_sentence(poisoned, monkeypatch):
    monkeypatch.setattr(MedDINOv3Trainer_scratch, "skipped_steps_limit", 3)
    with pytest.raises(UserError, match=r"3 batches in a row .* cases case_\d.*preprocess"):
        poisoned(44, [f"case_{n}" for n in range(5)], np.inf)


def steps(workplace, batches, is_guarded=True, trainer=MedDINOv3Trainer_scratch):
    """Train on given batches from one seed; returns the trainer and its weights."""
    folder = next((workplace.root / "preprocessed").glob("Dataset001_*"))
    plans, dataset = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("nnUNetPlans", "dataset")
    )
    plans["continue_training"] = False
    torch.manual_seed(3)
    trainer = trainer(plans, "2d", 0, dataset, torch.device("cpu"))
    trainer.initialize()
    if not is_guarded:
        trainer.optimizer._optimizer_step_pre_hooks.clear()
        trainer.loss._forward_hooks.clear()
    torch.manual_seed(4)
    trainer.network.train()
    trainer.outputs = [trainer.train_step(batch) for batch in batches]
    return trainer, {k: v.clone() for k, v in trainer.network.state_dict().items()}


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "data": torch.randn(2, 1, 48, 48, generator=generator),
            "target": torch.randint(0, 3, (2, 1, 48, 48), generator=generator).float(),
            "keys": np.array([f"a_{n}", f"b_{n}"]),
        }
        for n in range(3)
    ]


def equal(first, second):
    return all(torch.equal(first[k], second[k]) for k in first)


def test_without_poison_the_guard_changes_no_bit(workplace, batches):
    guarded, weights = steps(workplace, batches)
    bare, others = steps(workplace, batches, is_guarded=False)
    assert equal(weights, others)
    assert guarded.outputs == bare.outputs
    state, other = (list(tensors_in(t.optimizer.state_dict())) for t in (guarded, bare))
    assert all(torch.equal(a, b) for a, b in zip(state, other, strict=True))


def test_a_skipped_step_leaves_weights_and_moments(workplace, batches):
    _, once = steps(workplace, batches[:1])
    batches[1]["data"][1, 0, 5, 5] = float("nan")
    trainer, weights = steps(workplace, batches[:2])
    assert equal(once, weights)
    assert all(int(s["step"]) == 1 for s in trainer.optimizer.state.values())
    assert "cases a_1, b_1; NaN or infinity is in the images of b_1" in log_of_trainer(trainer)


def log_of_trainer(trainer):
    with open(trainer.log_file) as file:  # noqa: PTH123
        return file.read()


def test_a_loss_of_infinity_with_finite_gradients_is_skipped(workplace, batches, monkeypatch):
    """As from a loss that adds a constant; the gradients do not show it."""
    build = nnUNetTrainer._build_loss

    class Shifted(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.calls = inner, 0

        def forward(self, output, target):
            self.calls += 1
            return self.inner(output, target) + (torch.inf if self.calls == 2 else 0)

    monkeypatch.setattr(nnUNetTrainer, "_build_loss", lambda self: Shifted(build(self)))
    trainer, _ = steps(workplace, batches)
    assert ["skipped" in output for output in trainer.outputs] == [False, True, False]
    assert trainer._step_guard.in_a_row == 0  # a good batch starts the count anew


def test_a_loss_that_is_no_module_trains(workplace, batches, monkeypatch):
    build = nnUNetTrainer._build_loss
    monkeypatch.setattr(nnUNetTrainer, "_build_loss", lambda s: lambda *a: build(s)(*a))
    batches[0]["data"][:] = torch.inf
    trainer, weights = steps(workplace, batches, is_guarded=True)
    assert "skipped" in trainer.outputs[0]
    assert all(torch.isfinite(t).all() for t in weights.values())


def test_with_a_gradient_scaler_steps_are_the_scalers(workplace, batches, monkeypatch):
    """Older GPUs train in fp16 with nnU-Net's scaler, which skips such steps itself."""
    initialize = nnUNetTrainer.initialize

    def with_scaler(self):
        self.grad_scaler = torch.amp.GradScaler("cpu")
        initialize(self)

    monkeypatch.setattr(nnUNetTrainer, "initialize", with_scaler)
    batches[1]["data"][:] = torch.inf
    trainer, weights = steps(workplace, batches)
    assert trainer._step_guard is None
    assert trainer.grad_scaler.get_scale() == 65536 / 2
    assert all(torch.isfinite(t).all() for t in weights.values())


def test_the_mean_loss_of_an_epoch_is_of_the_steps_done(workplace, batches):
    batches[1]["data"][:] = torch.inf
    trainer, _ = steps(workplace, batches)
    trainer.on_train_epoch_end(trainer.outputs)
    done = [trainer.outputs[n]["loss"] for n in (0, 2)]
    assert trainer.logger.get_value("train_losses", step=-1) == np.mean(done)


def test_gradients_of_infinity_are_skipped_and_the_count_ends_the_run():
    weight = torch.nn.Parameter(torch.ones(2))
    said = []
    optimizer = torch.optim.AdamW([weight], weight_decay=0.5)
    StepGuard(optimizer, None, 2, said.append)
    weight.grad = torch.tensor([1.0, torch.inf])
    optimizer.step()
    weight.grad = torch.tensor([1.0, torch.nan])
    with pytest.raises(UserError, match="2 batches in a row"):
        optimizer.step()
    assert torch.equal(weight.detach(), torch.ones(2))
    assert len(said) == 2


_TWO_RANKS = """
import os, sys, torch
from torch import distributed
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.step_guard import StepGuard
rank = int(sys.argv[1])
distributed.init_process_group("gloo", f"file://{sys.argv[2]}", rank=rank, world_size=2)
network = torch.nn.Linear(2, 1)
loss = torch.nn.MSELoss()
optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
said = []
guard = StepGuard(optimizer, loss, 2, said.append)
before = network.weight.detach().clone()
skipped = []
for step in range(4):
    optimizer.zero_grad()
    guard.batch = {"keys": [f"case_{rank}_{step}"], "data": torch.ones(1, 2)}
    if rank == 1 and step in (0, 2, 3):
        guard.batch["data"] = guard.batch["data"] * float("nan")
    value = loss(network(guard.batch["data"]), torch.zeros(1, 1))
    value.backward()
    try:
        optimizer.step()
    except UserError as error:
        print(error)
    skipped.append(guard.skipped)
print(skipped, said[0], sep="\\n")
assert all(torch.isfinite(p).all() for p in network.parameters())
distributed.barrier()
distributed.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # threads of gloo's can outlive the group and abort the interpreter's own end
"""


@pytest.mark.slow
def test_all_ranks_skip_together_and_stop_together(tmp_path):
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _TWO_RANKS, str(rank), str(tmp_path / "meet")],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for rank in range(2)
    ]
    answers = [process.communicate(timeout=300)[0].splitlines() for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0]
    assert answers[0] == answers[1]
    stop, skipped, said = answers[0]
    assert "2 batches in a row" in stop
    assert skipped == "[True, False, True, True]"
    assert "cases case_0_0, case_1_0; NaN or infinity is in the images of case_1_0" in said
