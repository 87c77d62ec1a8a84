"""Rows of numbers of a run: JSONL and CSV always, TensorBoard and Weights & Biases if asked."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.files import replacing

METRICS = "metrics.jsonl"
TABLE = "metrics.csv"
TIMINGS = ("images_per_second", "data_wait_percent", "memory_gb", "seconds")

_log = logging.getLogger(__name__)


def read_rows(path: Path, before: int | None = None) -> list[dict[str, Any]]:
    """Read the rows of a JSONL file; a last line that a kill tore is left out.

    Args:
        path: The file; no rows if it is not there.
        before: Only rows of earlier steps.
    """
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if before is None or row["step"] <= before:
            rows.append(row)
    return rows


class MetricsLog:
    """Appends a row for each logged step, so that nothing is lost when a run is killed.

    Args:
        folder: Of the stage.
        resume_step: Steps that are done: later rows, which will be written again, are dropped.
        tensorboard: Write TensorBoard events too.
        wandb: Project of Weights & Biases, or None.
        name: Of the run there.

    Raises:
        UserError: If a package that is asked for is missing, or the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        resume_step: int = 0,
        *,
        tensorboard: bool = False,
        wandb: str | None = None,
        name: str = "",
    ) -> None:
        self.folder = folder
        self._sinks = _sinks(folder, tensorboard, wandb, name)
        folder.mkdir(parents=True, exist_ok=True)
        self._rows = read_rows(folder / METRICS, before=resume_step)
        self._columns = list(dict.fromkeys(key for row in self._rows for key in row))
        self._warned = False
        self._rewrite()

    def write(self, row: dict[str, Any]) -> None:
        """Append a row; a full disk is said once and does not end the run.

        Args:
            row: ``step`` and numbers by name.
        """
        new = [key for key in row if key not in self._columns]
        self._columns += new
        self._rows.append(row)
        try:
            with (self.folder / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            if new:
                self._rewrite_table()
            else:
                with (self.folder / TABLE).open("a", encoding="utf-8", newline="") as file:
                    file.write(_csv_line([row.get(key, "") for key in self._columns]))
        except (OSError, UserError) as error:
            if not self._warned:
                _log.warning(
                    "metrics cannot be written to %s (%s); the run goes on", self.folder, error
                )
            self._warned = True
        for sink in self._sinks:
            sink(row)

    def _rewrite(self) -> None:
        with replacing(self.folder / METRICS) as part:
            part.write_text("".join(json.dumps(row) + "\n" for row in self._rows), encoding="utf-8")
        self._rewrite_table()

    def _rewrite_table(self) -> None:
        lines = [_csv_line(self._columns)] if self._columns else []
        lines += [_csv_line([row.get(key, "") for key in self._columns]) for row in self._rows]
        with replacing(self.folder / TABLE) as part:
            part.write_text("".join(lines), encoding="utf-8", newline="")


def _csv_line(values: list[Any]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow(values)
    return out.getvalue()


def _sinks(
    folder: Path, tensorboard: bool, wandb: str | None, name: str
) -> list[Callable[[dict[str, Any]], None]]:
    sinks: list[Callable[[dict[str, Any]], None]] = []
    if tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "engine.tensorboard=true needs the package tensorboard: pip install tensorboard."
            ) from error
        writer = SummaryWriter(str(folder / "tensorboard"))

        def to_tensorboard(row: dict[str, Any]) -> None:
            for key, value in row.items():
                if key != "step" and isinstance(value, int | float):
                    writer.add_scalar(key, value, row["step"])

        sinks.append(to_tensorboard)
    if wandb is not None:
        try:
            import wandb as package
        except ImportError as error:
            raise UserError("engine.wandb needs the package wandb: pip install wandb.") from error
        run = package.init(project=wandb, name=name, dir=str(folder), resume="allow")
        sinks.append(lambda row: run.log(row, step=row["step"]))
    return sinks
