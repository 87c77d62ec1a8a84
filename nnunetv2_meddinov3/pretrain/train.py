"""One stage: build, resume, loop, save, export."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.pretrain import checkpoints
from nnunetv2_meddinov3.pretrain.config import StageConfig, to_yaml, with_architecture
from nnunetv2_meddinov3.pretrain.distributed import Parallel, Runtime
from nnunetv2_meddinov3.pretrain.export import export_backbone, whole_backbone
from nnunetv2_meddinov3.pretrain.intensity import intensity_of, with_kinds
from nnunetv2_meddinov3.pretrain.loader import SliceLoader, open_store, slices_to_follow
from nnunetv2_meddinov3.pretrain.monitor.observer import Observer
from nnunetv2_meddinov3.pretrain.monitor.tracker import FeatureTracker
from nnunetv2_meddinov3.pretrain.networks import load_start
from nnunetv2_meddinov3.pretrain.optim import build_optimizer
from nnunetv2_meddinov3.pretrain.probe.callback import ProbeCallback
from nnunetv2_meddinov3.pretrain.provenance import run_provenance, store_provenance
from nnunetv2_meddinov3.pretrain.run_folder import (
    CHECKPOINTS,
    CONFIG,
    EXPORT,
    PROVENANCE,
    export_path,
)
from nnunetv2_meddinov3.pretrain.schedules import schedules_of
from nnunetv2_meddinov3.pretrain.step import train_step
from nnunetv2_meddinov3.pretrain.views.batch import ViewBatch
from nnunetv2_meddinov3.signals import Stop
from nnunetv2_meddinov3.store.reader import SliceStore


class Stage:
    """A stage that can be run, stopped at any step, and run again from its last checkpoint.

    Args:
        config: What to do; checked.
        folder: Where the stage writes.
        runtime: This process.
        previous: Folder of the stage before, where the start or the Gram teacher need it.
        stream: Where the main process says how far it is.
        data: What ``open_store`` returned for this config; opened by default.

    Attributes:
        step: Steps that are done.

    Raises:
        UserError: If the store, the starting weights or the checkpoint do not fit the config.
    """

    def __init__(
        self,
        config: StageConfig,
        folder: Path,
        runtime: Runtime,
        *,
        previous: Path | None,
        stream: TextIO | None,
        data: tuple[SliceStore, np.ndarray] | None = None,
    ) -> None:
        self.config, self.folder, self.runtime = config, folder, runtime
        # data, and the checkpoint to go on from
        store, rows = open_store(config) if data is None else data
        self.config = config = with_kinds(config, store, rows)
        self.store = store_provenance(store, rows)
        self.checkpoints = checkpoints.CheckpointFolder(folder / CHECKPOINTS)
        latest = self.checkpoints.latest()
        state = None if latest is None else checkpoints.read_state(latest)
        if state is not None:
            checkpoints.check_same_run(state, config, self.store, runtime.precision, folder)

        # networks, optimiser, schedules
        self.start = load_start(config, previous, state)
        self.config = config = with_architecture(config, self.start.architecture.to_dict())
        self.distillation = self.start.distillation.to(runtime.device)
        self.parallel = Parallel(self.distillation, config.engine, runtime)
        self.optimizer = build_optimizer(self.distillation.student, config.optim, runtime.device)
        self.schedules = schedules_of(config)
        self.step, self.refreshes, self.bad_in_a_row = 0, 0, 0
        if state is not None:
            self._resume(state)
        elif self.start.optimizer is not None:
            checkpoints.load_optimizer(self.distillation, self.optimizer, self.start.optimizer)
            self.start.optimizer = None  # as large as two students

        # loader and observer
        self.loader = SliceLoader(
            store, rows, config, runtime.rank, runtime.world_size, runtime.device
        )
        tracker = FeatureTracker(
            slices_to_follow(store, rows, config),
            self.distillation.teacher,
            folder,
            self.parallel.autocast,
        )
        self.observer = Observer(
            config, folder, runtime, self.distillation, tracker, self._probe(), stream, self.step
        )

    def _resume(self, state: dict[str, Any]) -> None:
        checkpoints.load_model(self.distillation, state["model"])
        checkpoints.load_optimizer(self.distillation, self.optimizer, state["optimizer"])
        self.step, self.refreshes = state["step"], state["gram_refreshes"]
        self.bad_in_a_row = state["bad_in_a_row"]

    def _probe(self) -> ProbeCallback | None:
        """Return what measures the teacher on labelled slices, if the config asks for it."""
        if self.config.engine.probe_every is None:
            return None
        return ProbeCallback(
            self.config,
            self.folder,
            self.runtime,
            lambda: whole_backbone(self.distillation.teacher, self.runtime),
            self.start.architecture,
            self.step,
        )

    def run(self, stop: Stop) -> bool:
        """Train until the stage is finished or a signal came.

        Returns:
            Whether it is finished; if not, a checkpoint of the last step was saved.

        Raises:
            UserError: If losses or gradients are not finite again and again, or something cannot
                be read or written.
        """
        steps, engine = self.config.optim.steps, self.config.engine
        batches = self.loader.iterate(self.step)
        try:
            if self.step == 0:
                self.observer.start()
            while self.step < steps:
                self.observer.before_step()
                micro_batches = next(batches)
                self.observer.data_arrived()
                stopped = self.one_step(micro_batches, stop)
                self.step += 1
                at_end = self.step == steps
                if self.step in engine.export_at:  # before saving: a resume must not miss it
                    self.export(export_path(self.folder, self.step))
                if stopped or at_end or self.step % engine.save_every == 0:
                    self.save()
                self.observer.after_step(self.step)
                if stopped and not at_end:
                    self.observer.report()
                    return False
        finally:
            batches.close()
            self.observer.close()
        self.export(self.folder / EXPORT)
        return True

    def one_step(self, batches: Sequence[ViewBatch], stop: Stop) -> bool:
        """Make the next step and return whether any rank was told to stop."""
        rates = {
            field.name: float(getattr(self.schedules, field.name)[self.step])
            for field in dataclasses.fields(self.schedules)
        }
        result = train_step(
            self.distillation,
            self.parallel,
            self.optimizer,
            batches,
            [self._generator(i) for i in range(len(batches))],
            stop,
            clip_grad=self.config.optim.clip_grad,
            shared_seed=self._seed(),
            **rates,
        )
        if result.skipped:
            self._note_bad_step(batches, result.losses)
        else:
            self.bad_in_a_row = 0
            self._refresh_gram_teacher()
        self.observer.stepped(
            self.step,
            rates,
            result.losses,
            result.norms,
            skipped=result.skipped,
            observed=result.observed,
        )
        return result.stopped

    def _generator(self, micro_batch: int) -> torch.Generator:
        """Return what drop path and RoPE augmentation draw from: the step alone decides it."""
        return torch.Generator().manual_seed(self._seed(self.runtime.rank, micro_batch))

    def _seed(self, *more: int) -> int:
        """Return a seed of this step, and of more numbers."""
        key = (self.config.optim.seed, self.step, *more)
        seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
        return int(seed >> np.uint64(1))

    def _refresh_gram_teacher(self) -> None:
        gram, done = self.config.losses.gram, self.step + 1
        if (
            gram.weight is not None
            and gram.refresh_every
            and done >= gram.refresh_from
            and done % gram.refresh_every == 0
            and (gram.max_refreshes is None or self.refreshes < gram.max_refreshes)
        ):
            self.distillation.refresh_gram_teacher()
            self.refreshes += 1

    def _note_bad_step(self, batches: Sequence[ViewBatch], losses: dict[str, Tensor]) -> None:
        """Count a step that was left out; after too many in a row, keep the batch and end.

        Raises:
            UserError: If too many steps in a row were not finite.
        """
        self.bad_in_a_row += 1
        values = {name: value.item() for name, value in losses.items()}
        self.observer.say(
            f"step {self.step}: losses or gradients are not finite on some rank ({values}); skipped"
        )
        if self.bad_in_a_row < self.config.engine.max_bad_steps:
            return
        where = checkpoints.keep_bad_step(
            self.folder, self.step, self.runtime.rank, batches, values
        )
        self.runtime.barrier()
        raise UserError(
            f"losses and gradients must be finite numbers, but {self.bad_in_a_row} steps in a row "
            f"up to step {self.step} were not: {where}; lower optim.lr, or look for slices with "
            "absurd values (`meddinov3 store verify`). Weights and checkpoints are as they were "
            "before."
        )

    def state(self) -> dict[str, Any]:
        """Return everything that a resume needs; every rank must call this."""
        gram = self.distillation.gram_teacher  # its weights may have come from a file of its own
        return {
            "format": checkpoints.FORMAT,
            "stage": self.config.stage,
            "step": self.step,
            "config": to_yaml(self.config),
            "architecture": self.start.architecture.to_dict(),
            "gram_architecture": gram and gram.backbone.architecture.to_dict(),
            "licence": self.start.licence,
            "base": self.start.base,
            "intensity": intensity_of(self.config),
            "store": self.store,
            "model": checkpoints.whole_model(self.distillation),
            "optimizer": checkpoints.whole_optimizer(self.distillation, self.optimizer),
            "gram_refreshes": self.refreshes,
            "bad_in_a_row": self.bad_in_a_row,
            "world_size": self.runtime.world_size,
            "precision": self.runtime.precision,
        }

    def provenance(self) -> str:
        """Return what ``run.json`` holds."""
        return run_provenance(self.runtime, self.start.architecture, self.start.base)

    def save(self) -> None:
        """Write a checkpoint of the steps done so far and delete those that need not stay.

        Raises:
            UserError: If it cannot be written; the ones before are as they were.
        """
        state = self.state()
        if self.runtime.is_main:
            engine = self.config.engine
            texts = {CONFIG: to_yaml(self.config), PROVENANCE: self.provenance()}
            self.checkpoints.save(self.step, state, texts)
            self.checkpoints.prune(engine.keep_last, engine.keep_every)
        self.runtime.barrier()

    def export(self, path: Path) -> None:
        """Write the teacher as it is now for the trainers; every rank must call this.

        Raises:
            UserError: If it cannot be written.
        """
        tensors = whole_backbone(self.distillation.teacher, self.runtime)
        if self.runtime.is_main:
            export_backbone(
                tensors, self.start, self.config, path, step=self.step, store=self.store
            )
        self.runtime.barrier()
