"""Where the numbers of a run go: JSONL always, TensorBoard and Weights & Biases if asked."""

from __future__ import annotations

import contextlib
import logging
import secrets
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.files import append_row, read_rows, unwritable, write_rows, write_text
from nnunetv2_meddinov3.pretrain.run_folder import METRICS

WANDB_ID = "wandb_id"  # of the stage's run at Weights & Biases, in the stage's folder

_log = logging.getLogger(__name__)


class StepRows:
    """The rows of a JSONL file, one or more a step, appended at once so that a kill loses none.

    Args:
        path: The file; its folder is made.
        resume_step: Steps done before: rows of later steps, which will come again, are dropped.

    Attributes:
        rows: All rows so far, each with ``step``.

    Raises:
        UserError: If it cannot be written.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        self.path = path
        self.rows = [row for row in read_rows(path) if row["step"] <= resume_step]
        self._warned = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(path.parent, error) from error
        write_rows(path, self.rows)

    def append(self, row: dict[str, Any]) -> None:
        """Append a row; a full disk is reported once and does not end the run."""
        self.rows.append(row)
        try:
            append_row(self.path, row)
        except OSError as error:
            if not self._warned:
                _log.warning("%s cannot be written (%s); the run goes on", self.path, error)
            self._warned = True


class MetricsLogger:
    """Writes a row for each logged step to every place that the config asks for.

    It must be closed, by ``close`` or ``with``: a run at Weights & Biases counts as running until
    then.

    Args:
        folder: Of the stage.
        resume_step: Steps done before; see ``StepRows``.
        tensorboard: Whether to write TensorBoard events too.
        wandb: Project of Weights & Biases, or None. A resumed stage continues its run there, whose
            id is kept in its folder; a stage that starts over starts a new one.
        name: Of the run there.

    Raises:
        UserError: If a package is missing, or the folder cannot be written.
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
        self._sinks: list[_Sink] = []
        # both before anything is written
        summary_writer = _summary_writer() if tensorboard else None
        package = None if wandb is None else _wandb()
        self._file = StepRows(folder / METRICS, resume_step)
        try:
            if summary_writer is not None:
                self._sinks.append(_TensorBoard(summary_writer, folder))
            if package is not None:
                self._sinks.append(_WeightsAndBiases(package, folder, resume_step, wandb, name))
        except BaseException:
            self.close(failed=True)
            raise

    def write(self, row: dict[str, Any]) -> None:
        """Write a row: ``step`` and numbers by name."""
        self._file.append(row)
        for sink in self._sinks:
            sink.write(row)

    def close(self, failed: bool = False) -> None:
        """Finish TensorBoard and Weights & Biases; a second call does nothing.

        Args:
            failed: Whether an error ended the run, which Weights & Biases shows.
        """
        sinks, self._sinks = self._sinks, []
        with contextlib.ExitStack() as closing:  # closes the others where one fails to
            for sink in sinks:
                closing.callback(sink.close, failed)

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(failed=kind is not None)


class _Sink(Protocol):
    def write(self, row: dict[str, Any]) -> None: ...

    def close(self, failed: bool) -> None: ...


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            "engine.tensorboard=true needs the package tensorboard: pip install tensorboard."
        ) from error
    return SummaryWriter


def _wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError("engine.wandb needs the package wandb: pip install wandb.") from error
    return wandb


class _TensorBoard:
    def __init__(self, summary_writer: Any, folder: Path) -> None:
        self._writer = summary_writer(str(folder / "tensorboard"))

    def write(self, row: dict[str, Any]) -> None:
        for key, value in row.items():
            if key != "step" and isinstance(value, int | float):
                self._writer.add_scalar(key, value, row["step"])

    def close(self, failed: bool) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(
        self, package: Any, folder: Path, resume_step: int, project: str | None, name: str
    ) -> None:
        self._run = package.init(
            project=project,
            name=name,
            dir=str(folder),
            id=_wandb_id(folder, resume_step),
            resume="allow",
        )

    def write(self, row: dict[str, Any]) -> None:
        self._run.log(row, step=row["step"])

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _wandb_id(folder: Path, resume_step: int) -> str:
    """Return the id of a stage's run, which its folder keeps; a new one for a new start."""
    path = folder / WANDB_ID
    if resume_step == 0 or not path.is_file():
        write_text(path, f"{secrets.token_hex(8)}\n")
    return path.read_text(encoding="utf-8").strip()
