"""The stages of a run, in order: their configs, their folders, what each takes from the last."""

from __future__ import annotations

import contextlib
import itertools
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import torch

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.locks import locked
from nnunetv2_meddinov3.pretrain.config import StageConfig, to_yaml
from nnunetv2_meddinov3.pretrain.distributed import Runtime, started
from nnunetv2_meddinov3.pretrain.loader import open_store, said_of_slices
from nnunetv2_meddinov3.pretrain.provenance import write_provenance
from nnunetv2_meddinov3.pretrain.run_folder import (
    EXPORT,
    INTERRUPTED,
    REPORT,
    stage_folder,
)
from nnunetv2_meddinov3.pretrain.stage_plan import note_stages
from nnunetv2_meddinov3.pretrain.stages import is_finished
from nnunetv2_meddinov3.pretrain.stated import check_stated
from nnunetv2_meddinov3.pretrain.train import Stage
from nnunetv2_meddinov3.signals import Stop

_LAST_STAGE = 3
_FINE_TUNING = "nnUNetv2_train DATASET 2d_896 0 -tr MedDINOv3Trainer -p nnUNetMedDINOv3Plans"


def run(
    stages: tuple[StageConfig, ...], out: Path, stream: TextIO, following: str | None = None
) -> int:
    """Run every stage that is not finished yet.

    Args:
        stages: Configs in the order of their stages, checked by ``stages.check``.
        out: Folder of the run; stage N writes to ``out/stageN``.
        stream: Where the main process says how far it is.
        following: Command of the stage after them, if it is known.

    Returns:
        The exit code.

    Raises:
        UserError: If a stage cannot start or go on.
    """
    opened = {config.stage: open_store(config) for config in stages}  # before the first starts
    needs_work = not all(is_finished(out, config.stage) for config in stages)
    with started(stages[0].engine) as runtime, Stop() as stop, contextlib.ExitStack() as held:
        if needs_work:
            held.enter_context(_alone(out, runtime, stream))
        if runtime.is_main:
            (out / INTERRUPTED).unlink(missing_ok=True)
        for config in stages:
            folder = stage_folder(out, config.stage)
            if is_finished(out, config.stage):
                _say(runtime, stream, f"stage {config.stage} is finished: {folder / EXPORT}")
                continue
            if runtime.is_main:
                for line in said_of_slices(config, *opened[config.stage]):
                    _say(runtime, stream, line)
            previous = None if config.stage == 1 else stage_folder(out, config.stage - 1)
            data = opened[config.stage]
            stage = Stage(config, folder, runtime, previous=previous, stream=stream, data=data)
            _check_later(stages[stages.index(config) + 1 :], stage)
            if runtime.is_main:
                write_provenance(folder, to_yaml(stage.config), stage.provenance())
                note_stages(out, stages, stage.start.architecture)
            if not stage.run(stop):
                if runtime.is_main:
                    (out / INTERRUPTED).touch()
                _say(
                    runtime, stream, f"stopped by a signal; the same command goes on from {folder}"
                )
                return 128 + (stop.number or signal.SIGTERM)
            is_last = config is stages[-1]
            _say(runtime, stream, _at_the_end(folder, config.stage, is_last, following))
    return 0


def _at_the_end(folder: Path, stage: int, is_last: bool, following: str | None) -> str:
    """Return where the results of a stage are and what can be done next."""
    teacher = (folder / EXPORT).absolute()
    lines = [
        f"stage {stage} is finished",
        f"  teacher      {teacher}",
        f"  report       {(folder / REPORT).absolute()}",
    ]
    if not is_last:
        return "\n".join([*lines, "  next         the stage after it starts now"])
    if stage < _LAST_STAGE:
        lines.append(
            f"  next stage   {following or f'the config of stage {stage + 1}, same --out'}"
        )
    lines.append(f"  fine-tuning  MEDDINOV3_WEIGHTS={shlex.quote(str(teacher))} {_FINE_TUNING}")
    return "\n".join(lines)


def _check_later(stages: tuple[StageConfig, ...], stage: Stage) -> None:
    """Refuse now, not days later, a stage that this one's networks will not fit.

    Raises:
        UserError: If a stage that goes on from this one states another ViT.
    """
    try:
        for later in itertools.takewhile(lambda c: c.init.source == "previous", stages):
            check_stated(stage.start.architecture, later, str(stage.folder), is_stage=True)
    except UserError:
        stage.observer.close()
        raise


@contextlib.contextmanager
def _alone(out: Path, runtime: Runtime, stream: TextIO) -> Iterator[None]:
    """Lock the folder of a run by its main process; the others wait for its answer.

    Raises:
        UserError: On every rank, if another run works on the folder or it cannot be written.
    """
    with contextlib.ExitStack() as held:
        refused: UserError | None = None
        if runtime.is_main:
            try:
                held.enter_context(locked(out, lambda line: _say(runtime, stream, line)))
            except UserError as error:
                refused = error
        answer = torch.tensor(refused is not None, dtype=torch.int32, device=runtime.device)
        if runtime.reduce(answer, "MAX").item():
            raise refused or UserError(f"{out} could not be locked by the first process.")
        yield


def _say(runtime: Runtime, stream: TextIO, line: str) -> None:
    if runtime.is_main:
        stream.write(f"{line}\n")
        stream.flush()
