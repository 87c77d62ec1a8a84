"""Observes a stage while it runs: rows, progress, health, feature maps, probes, report."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.pretrain.config import StageConfig
from nnunetv2_meddinov3.pretrain.distillation import Distillation
from nnunetv2_meddinov3.pretrain.distributed import Runtime
from nnunetv2_meddinov3.pretrain.monitor.health import measure, verdicts
from nnunetv2_meddinov3.pretrain.monitor.logger import MetricsLogger, StepRows
from nnunetv2_meddinov3.pretrain.monitor.report import write_report
from nnunetv2_meddinov3.pretrain.monitor.tracker import FeatureTracker
from nnunetv2_meddinov3.pretrain.run_folder import HEALTH
from nnunetv2_meddinov3.processes import peak_gb
from nnunetv2_meddinov3.progress import Progress

_MOMENTS = 5  # for which maps are kept where no interval is given

Probe = Callable[[int, str], str | None]  # (step, "start" or "teacher") -> what is wrong


class Observer:
    """Observes a stage without changing what is learnt.

    Every rank makes one and calls the same methods; the main one writes. It must be closed.

    Args:
        config: Of the stage.
        folder: Of the stage.
        runtime: This process.
        distillation: What is observed.
        tracker: Shows fixed slices to the teacher.
        probe: Measures starting weights or teacher; None where no probes are asked for.
        stream: Where progress is written.
        step: Steps done before.

    Raises:
        UserError: If a package is missing, or the folder cannot be written.
    """

    def __init__(
        self,
        config: StageConfig,
        folder: Path,
        runtime: Runtime,
        distillation: Distillation,
        tracker: FeatureTracker,
        probe: Probe | None,
        stream: TextIO | None,
        step: int,
    ) -> None:
        self.config, self.folder, self.runtime = config, folder, runtime
        self.distillation, self.tracker, self.probe = distillation, tracker, probe
        engine = config.engine
        self._weights: Tensor | None = None
        self._progress = Progress(
            config.optim.steps,
            "steps",
            title=f"stage {config.stage}",
            every=engine.log_every,
            done=step,
            stream=stream if runtime.is_main else None,
        )
        self._waited, self._since, self._steps = 0.0, time.monotonic(), 0
        self._arrival = self._since
        self._metrics: MetricsLogger | None = None
        if runtime.is_main:
            self._metrics = MetricsLogger(
                folder,
                step,
                tensorboard=engine.tensorboard,
                wandb=engine.wandb,
                name=f"{folder.resolve().parent.name}-stage{config.stage}",
            )
            self._health = StepRows(folder / HEALTH, step)

    def start(self) -> None:
        """Look at the starting weights, before the first step."""
        self._keep_maps(0)
        if self.probe is not None:
            self.probe(0, "start")

    def before_step(self) -> None:
        """Note that the loop begins to wait for data."""
        self._arrival = time.monotonic()

    def data_arrived(self) -> None:
        """Note that the data have arrived."""
        self._waited += time.monotonic() - self._arrival

    def stepped(
        self,
        step: int,
        rates: Mapping[str, float],
        losses: dict[str, Tensor],
        norms: dict[str, Tensor],
        *,
        skipped: bool,
        observed: dict[str, Tensor],
    ) -> None:
        """Take the numbers of a step; every rank must call this.

        Args:
            step: Number of the step, from 0.
            rates: Name -> value of every schedule at this step.
            losses: Means over this rank's micro-batches, on the device.
            norms: Of the gradients before clipping.
            skipped: Whether the step was left out because numbers were not finite.
            observed: Features and targets of this rank's last micro-batch; see ``health.measure``.
        """
        self._steps += 1
        done, engine = step + 1, self.config.engine
        last = done == self.config.optim.steps
        logs = done % engine.log_every == 0 or last
        checks = done % engine.health_every == 0 or done == 1 or last
        if not logs and not checks:
            self._progress.advance()
            return
        sums = self.runtime.reduce(torch.stack(list(losses.values())).float().clone())
        values = (sums / self.runtime.world_size).tolist()
        means = dict(zip(losses, values, strict=True))
        self._progress.advance(self._log(done, means, rates, norms, skipped) if logs else "")
        if checks:
            self._check(done, means["total"], observed)

    def after_step(self, done: int) -> None:
        """Keep maps, probe and write the report when they are due."""
        engine, steps = self.config.engine, self.config.optim.steps
        every = engine.report_every or max(1, steps // _MOMENTS)
        if done % every == 0 or done == steps:
            self._keep_maps(done)
        probes = engine.probe_every and done % engine.probe_every == 0
        if self.probe is not None and (probes or done == steps):
            worse = self.probe(done, "teacher")
            if worse:
                self.say(f"step {done}: {worse}")
        if (engine.report_every and done % engine.report_every == 0) or done == steps:
            self.report()

    def report(self) -> None:
        """Write the report; a run does not end because it cannot."""
        if self.runtime.is_main:
            try:
                write_report(self.folder)
            except (OSError, UserError) as error:
                self.say(f"the report could not be written: {error}")

    def say(self, line: str) -> None:
        """Write a line of its own, by the main process."""
        if self.runtime.is_main:
            self._progress.say(line)

    def close(self) -> None:
        """Finish what is shown and logged; a second call does nothing.

        Called while an error ends the stage, as in ``finally``, it marks the run at Weights &
        Biases as failed.
        """
        failed = sys.exc_info()[0] is not None
        try:
            self._progress.close()
        finally:
            if self._metrics is not None:
                self._metrics.close(failed)

    def _log(
        self,
        done: int,
        losses: dict[str, float],
        rates: Mapping[str, float],
        norms: dict[str, Tensor],
        skipped: bool,
    ) -> str:
        """Write a row of metrics; returns what progress says of it."""
        seconds = max(time.monotonic() - self._since, 1e-9)
        speed = self._steps * self.config.optim.batch_size / seconds
        if self._metrics is not None:
            self._metrics.write(
                {
                    "step": done,
                    **{f"loss_{name}": value for name, value in losses.items()},
                    **rates,
                    **{f"grad_{name}": norm.item() for name, norm in norms.items()},
                    "skipped": int(skipped),
                    "images_per_second": speed,
                    "data_wait_percent": 100 * self._waited / seconds,
                    "memory_gb": _memory_gb(self.runtime.device),
                }
            )
        self._waited, self._since, self._steps = 0.0, time.monotonic(), 0
        return f"loss {losses['total']:.4f}, {speed:.1f} images/s"

    def _check(self, done: int, loss: float, observed: dict[str, Tensor]) -> None:
        """Measure the health of the run and say what is wrong."""
        update = self._change_of_weights()
        tokens = self.tracker.tokens(self.runtime.device)
        if not self.runtime.is_main:
            return
        row: dict[str, Any] = {"step": done, "loss": loss, "update": update, **measure(observed)}
        row["gram_drift"] = self.tracker.drift(tokens)
        row["verdicts"] = verdicts([*self._health.rows, row])
        self._health.append(row)
        for sentence in row["verdicts"]:
            self.say(f"step {done}: {sentence}")

    @torch.no_grad()
    def _change_of_weights(self) -> float | None:
        """Return the relative change of the backbone's first block since the last check.

        Every rank keeps its own share; the main one's is reported.
        """
        block = self.distillation.student.backbone.vit.blocks[0]
        shares = [p.to_local() if hasattr(p, "to_local") else p for p in block.parameters()]
        now = torch.cat([s.detach().flatten().float() for s in shares]).clone()
        before, self._weights = self._weights, now
        if before is None:
            return None
        return float((now - before).norm() / before.norm().clamp(min=1e-12))

    def _keep_maps(self, step: int) -> None:
        tokens = self.tracker.tokens(self.runtime.device)
        if self.runtime.is_main:
            try:
                self.tracker.save(step, tokens)
            except UserError as error:
                self.say(f"the maps of step {step} are left out: {error}")


def _memory_gb(device: torch.device) -> float:
    """Return the peak memory so far: of the GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return peak_gb() or 0.0
