"""The checkpoints of a stage: written whole or not at all, pruned, and read back by name."""

from __future__ import annotations

import os
import pickle
import re
import shutil
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

from nnunetv2_meddinov3.errors import UserError

FORMAT = 1
STATE = "state.pt"
_STEP = re.compile(r"step_(\d{7,})")
_PART = re.compile(r"\.step_\d+\.part")


class CheckpointFolder:
    """``checkpoints/step_0000100/state.pt`` and its older neighbours.

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
        part = self.folder / f".{target.name}.part"
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            for name, text in texts.items():
                (part / name).write_text(text, encoding="utf-8")
            with (part / STATE).open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            shutil.rmtree(target, ignore_errors=True)
            part.replace(target)
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError
            shutil.rmtree(part, ignore_errors=True)
            kept = f"the last one is of step {steps[-1]}" if (steps := self.steps()) else "none yet"
            raise UserError(
                f"a checkpoint of step {step} must be written to {self.folder}, but that failed "
                f"({_reason(error)}; {kept}): make room and start the same command again."
            ) from error
        return self.path(step)

    def prune(self, keep_last: int, keep_every: int | None) -> None:
        """Delete checkpoints but the last and the multiples of ``keep_every``, and leftovers."""
        for step in self.steps()[:-keep_last]:
            if not keep_every or step % keep_every:
                shutil.rmtree(self.path(step).parent, ignore_errors=True)
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if _PART.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)


def _reason(error: Exception) -> str:
    cause = error.__context__ if isinstance(error.__context__, OSError) else error
    return str(getattr(cause, "strerror", None) or cause).splitlines()[0][:200]


def read_state(path: Path) -> dict[str, Any]:
    """Read a training state without running its code.

    Raises:
        UserError: If it is missing, damaged, or of another format.
    """
    try:
        with path.open("rb") as file:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"there must be a training state {path}: check the path.") from error
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as error:
        raise UserError(
            f"{path} must be a whole training state, but it is damaged ({_reason(error)}): delete "
            f"the folder {path.parent.name} to go on from the checkpoint before it."
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path} must be a training state of format {FORMAT}, but it is not one.")
    return state


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


_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
_WHOLE_IN = StateDictOptions(full_state_dict=True)
