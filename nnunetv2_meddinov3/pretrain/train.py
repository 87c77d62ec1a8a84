"""One stage: the loop from its start, or from its last checkpoint, to its end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.pretrain import checkpoints
from nnunetv2_meddinov3.pretrain.bad_steps import keep_batch
from nnunetv2_meddinov3.pretrain.config import StageConfig, to_yaml
from nnunetv2_meddinov3.pretrain.distributed import Parallel
from nnunetv2_meddinov3.pretrain.export import export_teacher
from nnunetv2_meddinov3.pretrain.folders import (
    CHECKPOINTS,
    CONFIG,
    EXPORT,
    RUN_FACTS,
    export_path,
)
from nnunetv2_meddinov3.pretrain.intensity import intensity_of
from nnunetv2_meddinov3.pretrain.loader import SliceLoader, open_store, slices_to_follow
from nnunetv2_meddinov3.pretrain.monitor.observer import Observer
from nnunetv2_meddinov3.pretrain.monitor.tracker import FeatureTracker
from nnunetv2_meddinov3.pretrain.optim import build_optimizer, clip_gradients, set_rates
from nnunetv2_meddinov3.pretrain.probe.callback import ProbeCallback
from nnunetv2_meddinov3.pretrain.provenance import run_facts
from nnunetv2_meddinov3.pretrain.rates import Rates, rates_at
from nnunetv2_meddinov3.pretrain.resuming import Resumed, check_same_run, store_facts
from nnunetv2_meddinov3.pretrain.runtime import Runtime, Stop
from nnunetv2_meddinov3.pretrain.starting import load_start
from nnunetv2_meddinov3.pretrain.views.batch import ViewBatch


class Stage:
    """A stage that can be run, stopped at any step, and run again from its last checkpoint.

    Args:
        config: What to do; checked.
        folder: Where the stage writes.
        runtime: This process.
        previous: Folder of the stage before, where the start or the Gram teacher need it.
        stream: Where the main process says how far it is.

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
    ) -> None:
        self.config, self.folder, self.runtime = config, folder, runtime
        self.checkpoints = checkpoints.CheckpointFolder(folder / CHECKPOINTS)
        store, rows = open_store(config)
        self.store = store_facts(store, rows)
        latest = self.checkpoints.latest()
        state = None if latest is None else checkpoints.read_state(latest)
        if state is not None:
            check_same_run(state, config, self.store, latest, runtime)
        self.start = load_start(config, previous, state)
        self.distillation = self.start.distillation.to(runtime.device)
        self.parallel = Parallel(self.distillation, config.engine, runtime)
        self.optimizer = build_optimizer(self.distillation.student, config.optim, runtime.device)
        self.step, self.refreshes, self.bad_in_a_row = 0, 0, 0
        if state is not None:
            self._resume(Resumed.of(state, runtime))
        elif self.start.optimizer is not None:
            checkpoints.load_optimizer(self.distillation, self.optimizer, self.start.optimizer)
            self.start.optimizer = None  # as large as two students
        self.loader = SliceLoader(
            store, rows, config, runtime.rank, runtime.world_size, runtime.device
        )
        self.observer = Observer(
            config,
            folder,
            runtime,
            self.distillation,
            FeatureTracker(
                slices_to_follow(store, rows, config),
                self.distillation.teacher,
                config.intensity,
                folder,
                self.parallel.autocast,
            ),
            self._prober(),
            stream,
            self.step,
        )

    def _prober(self) -> ProbeCallback | None:
        """Return what measures the teacher on labelled slices, if the config asks for it."""
        if self.config.engine.probe_every is None:
            return None
        return ProbeCallback(
            self.config,
            self.folder,
            self.runtime,
            self._teacher_backbone,
            self.start.architecture,
            self.step,
        )

    def _teacher_backbone(self) -> dict[str, Tensor]:
        """Return the tensors of the teacher's backbone on rank 0; every rank must call this."""
        whole, own = checkpoints.whole_model(self.distillation), "teacher.backbone."
        return {k.removeprefix(own): t for k, t in whole.items() if k.startswith(own)}

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
        """Forward, backward, update; returns whether any rank was told to stop."""
        rates = rates_at(self.config, self.step)
        self._apply(rates)
        losses = self._backward(batches)
        norms = clip_gradients(self.distillation.student, self.config.optim.clip_grad)
        finite = torch.isfinite(torch.stack([losses["total"], *norms.values()])).all()
        # one exchange and one look at the device per step
        signs = torch.stack([~finite, torch.tensor(stop.number is not None).to(finite.device)])
        is_bad, stopped = self.runtime.reduce(signs.int(), "MAX").tolist()
        if is_bad:
            self._skip(batches, losses)
        else:
            self.bad_in_a_row = 0
            self.optimizer.step()
            self.distillation.update_teacher(rates.momentum)
            self._refresh_gram_teacher()
        self.optimizer.zero_grad(set_to_none=True)
        self.observer.stepped(
            self.step,
            rates._asdict(),
            losses,
            norms,
            skipped=bool(is_bad),
            observed=self.distillation.seen,
        )
        return bool(stopped)

    def _apply(self, rates: Rates) -> None:
        set_rates(self.optimizer, rates.lr, rates.weight_decay, rates.last_layer_lr)
        self.distillation.teacher_temp = rates.teacher_temp
        self.distillation.local_weight = rates.local_weight
        self.distillation.gram_weight = rates.gram_weight

    def _backward(self, batches: Sequence[ViewBatch]) -> dict[str, Tensor]:
        """Accumulate the gradients of all micro-batches; returns the mean of each loss."""
        with self.parallel.autocast():
            targets = self.distillation.targets(batches)
        sums: dict[str, Tensor] = {}
        for i, (batch, target) in enumerate(zip(batches, targets, strict=True)):
            with self.parallel.accumulating(is_last=i == len(batches) - 1):
                with self.parallel.autocast():
                    losses = self.distillation.losses(batch, target, self._generator(i))
                (losses["total"] / len(batches)).backward()
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0) + loss.detach() / len(batches)
        return sums

    def _generator(self, micro_batch: int) -> torch.Generator:
        """Draw drop path and RoPE augmentation from the step alone, so a resume is exact."""
        key = (self.config.optim.seed, self.step, self.runtime.rank, micro_batch)
        seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(seed >> np.uint64(1)))

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

    def _skip(self, batches: Sequence[ViewBatch], losses: dict[str, Tensor]) -> None:
        """Leave weights and teacher as they are; after too many such steps, keep the batch and end.

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
        where = keep_batch(self.folder, self.step, self.runtime.rank, batches, values)
        self.runtime.barrier()
        raise UserError(
            f"losses and gradients must be finite numbers, but {self.bad_in_a_row} steps in a row "
            f"up to step {self.step} were not: {where}; lower optim.lr, or look for slices with "
            "absurd values (`meddinov3 store verify`). Weights and checkpoints are as they were "
            "before."
        )

    def state(self) -> dict[str, Any]:
        """Return everything that a resume needs; every rank must call this."""
        rng = self.runtime.gather(torch.get_rng_state())
        return {
            "format": checkpoints.FORMAT,
            "stage": self.config.stage,
            "step": self.step,
            "config": to_yaml(self.config),
            "architecture": self.start.architecture.to_dict(),
            "licence": self.start.licence,
            "base": self.start.base,
            "intensity": intensity_of(self.config),
            "store": self.store,
            "model": checkpoints.whole_model(self.distillation),
            "optimizer": checkpoints.whole_optimizer(self.distillation, self.optimizer),
            "sampler": {
                "seed": self.config.optim.seed,
                "next_step": self.step,
                "batch_size": self.config.optim.batch_size,
            },
            "rates": rates_at(self.config, min(self.step, self.config.optim.steps - 1))._asdict(),
            "gram_refreshes": self.refreshes,
            "bad_in_a_row": self.bad_in_a_row,
            "world_size": self.runtime.world_size,
            "rng": rng,
        }

    def save(self) -> None:
        """Write a checkpoint of the steps done so far and delete those that need not stay.

        Raises:
            UserError: If it cannot be written; the ones before are as they were.
        """
        state = self.state()
        if self.runtime.is_main:
            engine = self.config.engine
            facts = json.dumps(run_facts(self.runtime), indent=1) + "\n"
            texts = {CONFIG: to_yaml(self.config), RUN_FACTS: facts}
            self.checkpoints.save(self.step, state, texts)
            self.checkpoints.prune(engine.keep_last, engine.keep_every)
        self.runtime.barrier()

    def export(self, path: Path) -> None:
        """Write the teacher as it is now for the trainers; every rank must call this.

        Raises:
            UserError: If it cannot be written.
        """
        model = checkpoints.whole_model(self.distillation)
        if self.runtime.is_main:
            export_teacher(model, self.start, self.config, path, step=self.step, store=self.store)
        self.runtime.barrier()

    def _resume(self, resumed: Resumed) -> None:
        checkpoints.load_model(self.distillation, resumed.model)
        checkpoints.load_optimizer(self.distillation, self.optimizer, resumed.optimizer)
        self.step, self.refreshes = resumed.step, resumed.refreshes
        self.bad_in_a_row = resumed.bad_in_a_row
        if resumed.rng is not None:
            torch.set_rng_state(resumed.rng)
