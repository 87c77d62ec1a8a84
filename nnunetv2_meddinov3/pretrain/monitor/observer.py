"""What a stage says of itself while it runs: rows, progress, health, maps, probes, report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.pretrain.checkpoints import HEALTH
from nnunetv2_meddinov3.pretrain.config import StageConfig
from nnunetv2_meddinov3.pretrain.distillation import Distillation
from nnunetv2_meddinov3.pretrain.distributed import Runtime
from nnunetv2_meddinov3.pretrain.monitor.health import figures, verdicts
from nnunetv2_meddinov3.pretrain.monitor.logger import MetricsLog, read_rows
from nnunetv2_meddinov3.pretrain.monitor.report import write_report
from nnunetv2_meddinov3.pretrain.monitor.step_progress import StepProgress
from nnunetv2_meddinov3.pretrain.monitor.tracker import Following

_MOMENTS = 5  # for which maps are kept where no interval is given

Probe = Callable[[int, str], str | None]  # (step, "start" or "teacher") -> what is wrong


class Observer:
    """Watches a stage. Nothing here changes what is learnt.

    Every rank makes one and calls the same methods; the main one writes.

    Args:
        config: Of the stage.
        folder: Of the stage.
        runtime: This process.
        distillation: What is watched.
        following: Whose maps are kept.
        probe: Measures starting weights or teacher; None where no probes are asked for.
        stream: Where progress is written.
        step: Steps done before.
    """

    def __init__(
        self,
        config: StageConfig,
        folder: Path,
        runtime: Runtime,
        distillation: Distillation,
        following: Following,
        probe: Probe | None,
        stream: TextIO | None,
        step: int,
    ) -> None:
        self.config, self.folder, self.runtime = config, folder, runtime
        self.distillation, self.following, self.probe = distillation, following, probe
        engine = config.engine
        self._history: list[dict[str, Any]] = []
        self._weights: Tensor | None = None
        self._metrics: MetricsLog | None = None
        if runtime.is_main:
            self._metrics = MetricsLog(
                folder,
                step,
                tensorboard=engine.tensorboard,
                wandb=engine.wandb,
                name=f"{folder.resolve().parent.name}-stage{config.stage}",
            )
            self._history = read_rows(folder / HEALTH, before=step)
            _write_rows(folder / HEALTH, self._history)
        self._progress = StepProgress(
            config.optim.steps,
            step,
            engine.log_every,
            stream if runtime.is_main else None,
            f"stage {config.stage}",
        )
        self._waited, self._since, self._steps = 0.0, time.monotonic(), 0
        self._arrival = self._since

    def start(self) -> None:
        """Look at the starting weights, before the first step."""
        self._keep_maps(0)
        if self.probe is not None:
            self.probe(0, "start")

    def before_step(self) -> None:
        """Note that the loop begins to wait for data."""
        self._arrival = time.monotonic()

    def data_arrived(self) -> None:
        """Note that it has them."""
        self._waited += time.monotonic() - self._arrival

    def stepped(
        self,
        step: int,
        rates: dict[str, float],
        losses: dict[str, Tensor],
        norms: dict[str, Tensor],
        *,
        skipped: bool,
        observed: dict[str, Tensor],
    ) -> None:
        """Take the numbers of a step.

        Args:
            step: Number of the step, from 0.
            rates: Of the schedules.
            losses: Means over this rank's micro-batches, on the device.
            norms: Of the gradients before clipping.
            skipped: Whether the step was left out for numbers that are not finite.
            observed: Tensors of both networks for the figures of health.
        """
        self._steps += 1
        done, engine = step + 1, self.config.engine
        last = done == self.config.optim.steps
        logs = done % engine.log_every == 0 or last
        checks = done % engine.health_every == 0 or done == 1 or last
        if not logs and not checks:
            self._progress.update(done, None, None)
            return
        mean = self.runtime.reduce(torch.stack(list(losses.values())).float().clone())
        values = (mean / self.runtime.world_size).tolist()
        row = dict(zip(losses, values, strict=True))
        if logs:
            self._log(done, row, rates, norms, skipped)
        if checks:
            self._check(done, row["total"], observed)

    def after_step(self, done: int) -> None:
        """Keep maps, probe and report where their interval says so."""
        engine, steps = self.config.engine, self.config.optim.steps
        every = engine.report_every or max(1, steps // _MOMENTS)
        if done % every == 0 or done == steps:
            self._keep_maps(done)
        if self.probe is not None and (done % engine.probe_every == 0 or done == steps):
            worse = self.probe(done, "teacher")
            if worse:
                self.say(f"step {done}: {worse}")
        if (engine.report_every and done % engine.report_every == 0) or done == steps:
            self.report()

    def _log(
        self,
        done: int,
        row: dict[str, float],
        rates: dict[str, float],
        norms: dict[str, Tensor],
        skipped: bool,
    ) -> None:
        seconds = max(time.monotonic() - self._since, 1e-9)
        speed = self._steps * self.config.optim.batch_size / seconds
        if self._metrics is not None:
            gradients = {f"grad_{name}": norm.item() for name, norm in norms.items()}
            self._metrics.write(
                {
                    "step": done,
                    **{f"loss_{name}": value for name, value in row.items()},
                    **rates,
                    **gradients,
                    "skipped": int(skipped),
                    "images_per_second": speed,
                    "data_wait_percent": 100 * self._waited / seconds,
                    "memory_gb": _memory_gb(self.runtime.device),
                }
            )
        self._progress.update(done, row["total"], speed)
        self._waited, self._since, self._steps = 0.0, time.monotonic(), 0

    def _check(self, done: int, loss: float, observed: dict[str, Tensor]) -> None:
        """Work out the figures of health and say what is wrong."""
        update = self._change_of_weights()
        tokens = self.following.tokens(self.runtime.device)
        if not self.runtime.is_main:
            return
        row = {"step": done, "loss": loss, "update": update}
        row |= {**figures(observed), "gram_drift": self.following.drift(tokens)}
        self._history.append(row)
        row["verdicts"] = verdicts(self._history)
        _append_row(self.folder / HEALTH, row)
        for sentence in row["verdicts"]:
            self.say(f"step {done}: {sentence}")

    @torch.no_grad()
    def _change_of_weights(self) -> float | None:
        """Return the relative change of the backbone's first block since the last check.

        Every rank keeps its own share; the main one's tells.
        """
        block = self.distillation.student.backbone.vit.blocks[0]
        shares = [p.to_local() if hasattr(p, "to_local") else p for p in block.parameters()]
        now = torch.cat([s.detach().flatten().float() for s in shares]).clone()
        before, self._weights = self._weights, now
        if before is None:
            return None
        return float((now - before).norm() / before.norm().clamp(min=1e-12))

    def _keep_maps(self, step: int) -> None:
        tokens = self.following.tokens(self.runtime.device)
        if self.runtime.is_main:
            try:
                self.following.save(step, tokens)
            except UserError as error:
                self.say(f"the maps of step {step} are left out: {error}")

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
        """Finish what is shown."""
        self._progress.close()


def _memory_gb(device: torch.device) -> float:
    """Return the most memory in use so far: of the GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _append_row(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
