"""The folder of a stage and its checkpoints: written whole or not at all, pruned, read back."""

from __future__ import annotations

import os
import pickle
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from nnunetv2_meddinov3.errors import UserError, first_line
from nnunetv2_meddinov3.files import replacing
from nnunetv2_meddinov3.pretrain.config import (
    StageConfig,
    differences,
    from_yaml,
    with_architecture,
)
from nnunetv2_meddinov3.pretrain.run_folder import BAD_STEPS, CHECKPOINTS
from nnunetv2_meddinov3.pretrain.views.batch import ViewBatch

FORMAT = 1
STATE = "state.pt"
_STEP = re.compile(r"step_(\d{7,})")
_VIEWS = ("global_crops", "local_crops", "masks", "gram_crops")
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
_WHOLE_IN = StateDictOptions(full_state_dict=True)


class CheckpointFolder:
    """``checkpoints/step_0000100/state.pt`` and its older neighbours, written by one process.

    Args:
        folder: Made when something is saved.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def steps(self) -> list[int]:
        """Return the steps that have a whole checkpoint, ascending."""
        if not self.folder.is_dir():
            return []
        found = (_STEP.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(m[1]) for m in found if m and self.path(int(m[1])).is_file())

    def path(self, step: int) -> Path:
        """Return the file of a step."""
        return self.folder / f"step_{step:07d}" / STATE

    def latest(self) -> Path | None:
        """Return the file of the last step, None if there is none."""
        return self.path(steps[-1]) if (steps := self.steps()) else None

    def save(self, step: int, state: dict[str, Any], texts: dict[str, str]) -> Path:
        """Write a checkpoint beside its place and put it there whole.

        Args:
            step: Steps that are done.
            state: What ``torch.load(weights_only=True)`` can read.
            texts: Name to content of what stands beside it, such as the config.

        Raises:
            UserError: If it cannot be written; the checkpoints before it are as they were.
        """
        target = self.path(step).parent
        try:
            # torch's writer raises RuntimeError
            with replacing(target, failures=(RuntimeError,)) as part:
                part.mkdir(parents=True)
                for name, text in texts.items():
                    (part / name).write_text(text, encoding="utf-8")
                with (part / STATE).open("wb") as file:
                    torch.save(state, file)
                    file.flush()
                    os.fsync(file.fileno())
        except UserError as error:
            kept = f"the last one is of step {steps[-1]}" if (steps := self.steps()) else "none yet"
            raise UserError(
                f"a checkpoint of step {step} must be written to {self.folder}, but that failed "
                f"({_reason(error)}; {kept}): make room and start the same command again."
            ) from error
        return self.path(step)

    def prune(self, keep_last: int, keep_every: int | None) -> None:
        """Delete all but the last checkpoints and the multiples of ``keep_every``.

        What a killed process left half written goes too: nobody else writes to the folder.
        """
        for step in self.steps()[:-keep_last]:
            if not keep_every or step % keep_every:
                shutil.rmtree(self.path(step).parent, ignore_errors=True)
        for part in self.folder.glob("*.part"):
            shutil.rmtree(part, ignore_errors=True)


def _reason(error: UserError) -> str:
    """Return what the system says of a failed write, below what torch's writer makes of it."""
    cause = error.__cause__ or error
    return first_line(cause.__context__ if isinstance(cause.__context__, OSError) else cause)


def state_of(source: Path) -> Path | None:
    """Return the training state that a path means: a stage, a checkpoint's folder, its file.

    Raises:
        UserError: If it is a stage that has not saved anything yet.
    """
    if source.is_dir():
        if (source / CHECKPOINTS).is_dir():
            latest = CheckpointFolder(source / CHECKPOINTS).latest()
            if latest is None:
                raise UserError(f"{source} must hold a checkpoint, but its stage saved none yet.")
            return latest
        return source / STATE if (source / STATE).is_file() else None
    return source if source.name == STATE and source.is_file() else None


def read_state(path: Path) -> dict[str, Any]:
    """Read a training state without running its code.

    Raises:
        UserError: If it is missing, damaged, or of another format.
    """
    try:
        with path.open("rb") as file:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"the training state {path} must exist: check the path.") from error
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as error:
        raise UserError(
            f"{path} must be a whole training state, but it is damaged ({first_line(error)}): "
            f"delete the folder {path.parent.name} to go on from the checkpoint before it."
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path} must be a training state of format {FORMAT}, but it is not one.")
    return state


def check_same_run(
    state: dict[str, Any],
    config: StageConfig,
    store: dict[str, Any],
    precision: str,
    folder: Path,
) -> None:
    """Refuse to go on with another config, precision or other slices than the checkpoint's.

    Args:
        state: The training state.
        config: Of the stage now.
        store: What ``provenance.store_provenance`` returned for the slices now.
        precision: In which this process computes, which ``auto`` leaves to the device.
        folder: Of the stage, for messages.

    Raises:
        UserError: If anything that changes results differs.
    """
    before = from_yaml(state["config"])
    if before.data.modalities is None:  # the store decided, which is compared below
        data = before.data.model_copy(update={"modalities": config.data.modalities})
        before = before.model_copy(update={"data": data})
    # what was used; earlier versions also saved what the weights had overruled
    used = with_architecture(before, state["architecture"])
    if (changed := differences(used, config)) and differences(before, config):
        raise UserError(
            f"{folder} must be continued with the config it was started with, but "
            f"{'; '.join(changed[:3])}: give the same values, or another --out."
        )
    computed = state.get("precision", precision)  # which earlier versions did not note
    if computed != precision:
        raise UserError(
            f"{folder} must be continued in {computed}, in which it was started, but this device "
            f"computes in {precision}: set engine.precision={computed}, or give another --out."
        )
    if state["store"]["records_sha256"] != store["records_sha256"]:
        raise UserError(
            f"{folder} must be continued on the slices it was started on, but the store now holds "
            f"others ({state['store']['slices']} before, {store['slices']} now): give the same "
            "store, or another --out."
        )


def whole_model(model: nn.Module) -> dict[str, Any]:
    """Return all parameters and buffers in full, on the CPU of rank 0; every rank calls this."""
    return get_model_state_dict(model, options=_WHOLE)


def whole_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the optimiser's state by parameter name; every rank must call this."""
    return get_optimizer_state_dict(model, optimizer, options=_WHOLE)


def load_model(model: nn.Module, state: dict[str, Any]) -> None:
    """Copy a whole state into a model, sharded or not; strict."""
    set_model_state_dict(model, state, options=_WHOLE_IN)


def load_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Copy what ``whole_optimizer`` returned into an optimiser, sharded or not.

    The groups' own options stay: a state saved on a GPU says ``fused``, which a CPU need not have.
    """
    options = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    set_optimizer_state_dict(model, optimizer, state, options=_WHOLE_IN)
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update(own)


def keep_bad_step(
    folder: Path, step: int, rank: int, batches: Sequence[ViewBatch], losses: dict[str, float]
) -> str:
    """Save the views that a rank had in a step whose numbers are not finite, for a look at them.

    Args:
        folder: Of the stage.
        step: From 0.
        rank: Of this process.
        batches: Its micro-batches.
        losses: Their means.

    Returns:
        Where they are, in words; also if they could not be kept.
    """
    path = folder / BAD_STEPS / f"step_{step:07d}_rank{rank}.pt"
    views = [{f: getattr(b, f) for f in _VIEWS if getattr(b, f) is not None} for b in batches]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, failures=(RuntimeError,)) as part:
            torch.save({"step": step, "losses": losses, "micro_batches": views}, part)
    except (OSError, UserError) as error:
        return f"the last batch could not be kept ({error})"
    return f"the last batch is in {path.parent}"
