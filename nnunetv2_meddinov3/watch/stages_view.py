"""A pretraining run as its folder shows it."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.files import read_rows
from nnunetv2_meddinov3.locks import living_holder
from nnunetv2_meddinov3.pretrain.config import StageConfig, from_yaml
from nnunetv2_meddinov3.pretrain.monitor.words import HEALTH_PANELS, LOSSES, PROBES, name_of
from nnunetv2_meddinov3.pretrain.run_folder import (
    CONFIG,
    EXPORT,
    HEALTH,
    INTERRUPTED,
    METRICS,
    PROBE,
    REPORT,
    stage_folder,
)
from nnunetv2_meddinov3.pretrain.stage_plan import PlannedStage, planned_stages
from nnunetv2_meddinov3.progress import in_words
from nnunetv2_meddinov3.watch.view import Curve, Part, View, age_of, is_late

_STAGES = (1, 2, 3)
_RECENT = 50  # logged rows that speed and waiting are said of
_MAX_WAIT = 30  # % of the time; more and the loader is the limit
_SLOW = 0.5  # of the run's own speed
_FIRST = (
    *("loss_total", "loss_dino_global", "loss_dino_local", "loss_ibot", "loss_gram"),
    *("cls_rank_teacher", "patch_rank_teacher", "cls_target_entropy_share", "gram_drift"),
    *("knn", "linear", "dense", "images_per_second"),
)

Rows = Sequence[dict[str, Any]]


def is_pretraining(folder: Path) -> bool:
    """Return whether a folder is a run of ``meddinov3 pretrain`` or one of its stages."""
    places = (folder, *(stage_folder(folder, n) for n in _STAGES))
    return any((place / CONFIG).is_file() for place in places)


def view_of_stages(folder: Path) -> View:
    """Return a pretraining run as it is now.

    Args:
        folder: Of the run or of one of its stages.

    Raises:
        UserError: If a file of it cannot be read.
    """
    if (folder / CONFIG).is_file():
        folder = folder.resolve().parent
    begun = [n for n in _STAGES if (stage_folder(folder, n) / CONFIG).is_file()]
    planned = {each.stage: each for each in planned_stages(folder)}
    holder = living_holder(folder)
    parts: list[Part] = []
    pace_of_last: float | None = None  # seconds for a GFLOP
    for n in sorted({*begun, *planned}):
        if n in begun:
            part, seconds = _begun(folder, n, holder)
            if seconds is not None:
                pace_of_last = seconds / planned[n].gflop_per_image if n in planned else None
        else:
            part = _to_come(planned[n], pace_of_last, "waits" if holder else "not begun")
        parts.append(part)
    current = max(i for i, part in enumerate(parts) if part.curves or part.done or i == 0)
    page = stage_folder(folder, sorted({*begun, *planned})[current]) / REPORT
    title = f"pretraining {folder.resolve().name}"
    return View(title, folder, parts, current, page if page.is_file() else None)


def _begun(folder: Path, number: int, holder: str | None) -> tuple[Part, float | None]:
    """Return a stage that was begun, and the seconds that it takes for an image."""
    stage = stage_folder(folder, number)
    config = _config(stage / CONFIG)
    metrics, health, probes = (_rows(stage / name) for name in (METRICS, HEALTH, PROBE))
    steps, batch = config.optim.steps, config.optim.batch_size
    done = max((rows[-1]["step"] for rows in (metrics, health) if rows), default=0)
    is_finished = (stage / EXPORT).is_file()
    recent = seconds_an_image(metrics[-_RECENT:])
    overall = seconds_an_image(metrics)
    age = age_of(stage / METRICS)
    interval = None if recent is None else recent * batch * config.engine.log_every
    wrong = [*(health[-1]["verdicts"] if health else ()), *pace(metrics)]
    if holder and not is_finished and age and interval and is_late(age, interval):
        wrong.append(
            f"nothing was logged for {in_words(age)}, though a line is due every "
            f"{in_words(interval)} and {holder} is alive: it may hang, or wait for a disk."
        )
    part = Part(
        f"stage {number}",
        "finished" if is_finished else _state(folder, holder),
        steps if is_finished else done,
        steps,
        "steps",
        spent=None if overall is None else overall * batch * done,
        left=None if recent is None else recent * batch * (steps - done),
        is_finished=is_finished,
        age=age,
        figures=_figures(metrics, recent),
        curves=_curves(metrics, health, probes),
        wrong=wrong,
        checked=f"the check of step {health[-1]['step']}" if health else "",
    )
    return part, recent


def _to_come(planned: PlannedStage, seconds_a_gflop: float | None, state: str) -> Part:
    """Return a stage that has not begun; its time follows from another's by their operations."""
    left = None
    if seconds_a_gflop is not None:
        images = planned.batch_size * planned.steps
        left = seconds_a_gflop * planned.gflop_per_image * images
    return Part(
        f"stage {planned.stage}", state, 0, planned.steps, "steps", left=left, is_guess=True
    )


def seconds_an_image(metrics: Rows) -> float | None:
    """Return the mean time for an image, with all waiting and saving; None without rows.

    Rows are of about equally many images, so that their speeds have a harmonic mean.
    """
    speeds = [row["images_per_second"] for row in metrics if row.get("images_per_second")]
    return sum(1 / speed for speed in speeds) / len(speeds) if speeds else None


def pace(metrics: Rows) -> list[str]:
    """Say what is wrong with the speed of a run and with its steps.

    Args:
        metrics: Rows of ``metrics.jsonl``.
    """
    out: list[str] = []
    recent = metrics[-_RECENT:]
    if not recent:
        return out
    wait = sum(row.get("data_wait_percent", 0.0) for row in recent) / len(recent)
    if wait > _MAX_WAIT:
        out.append(
            f"{wait:.0f} % of the time goes into waiting for slices: raise data.workers, or put "
            "the store on a faster disk."
        )
    now, usual = seconds_an_image(metrics[-5:]), seconds_an_image(metrics)
    if len(metrics) > 2 * _RECENT and now and usual and usual / now < _SLOW:
        out.append(
            f"the run has slowed down to {1 / now:.1f} images/s from {1 / usual:.1f}: look for "
            "other jobs on the machine."
        )
    skipped = sum(row.get("skipped", 0) for row in recent)
    if skipped:
        out.append(
            f"{skipped} of the last {len(recent)} logged steps were skipped, since losses or "
            "gradients were not finite: lower optim.lr if that goes on."
        )
    return out


def _state(folder: Path, holder: str | None) -> str:
    if holder:
        return f"runs, {holder.partition(' (since')[0]}"
    if (folder / INTERRUPTED).is_file():
        return "stopped by a signal; the same command goes on"
    return "no process works on it"


def _figures(metrics: Rows, recent: float | None) -> dict[str, str]:
    if not metrics:
        return {}
    last = metrics[-1]
    found = {"images/s": None if recent is None else f"{1 / recent:.1f}"}
    for name, key, form in (
        ("waiting for data", "data_wait_percent", "{:.0f} %"),
        ("memory", "memory_gb", "{:.2f} GB"),
        ("learning rate", "lr", "{:.2e}"),
        ("teacher's momentum", "momentum", "{:.4f}"),
    ):
        found[name] = form.format(last[key]) if key in last else None
    return {name: value for name, value in found.items() if value is not None}


def _curves(metrics: Rows, health: Rows, probes: Rows) -> list[Curve]:
    of_key: dict[str, Rows] = {}
    for panels, rows in ((LOSSES, metrics), (HEALTH_PANELS, health), (PROBES, probes)):
        for series in panels.values():
            of_key |= dict.fromkeys(series, rows)
    order = [*_FIRST, *(key for key in of_key if key not in _FIRST)]
    found = []
    for key in order:
        numbers = [row[key] for row in of_key[key] if isinstance(row.get(key), int | float)]
        finite = [value for value in numbers if math.isfinite(value)]
        if finite:
            found.append(Curve(name_of(key), finite))
    return found


def _rows(path: Path) -> Rows:
    try:
        stat = path.stat()
    except OSError:
        return ()
    return _rows_at(path, (stat.st_ino, stat.st_mtime_ns, stat.st_size))


@functools.lru_cache(maxsize=16)
def _rows_at(path: Path, state: tuple[int, ...]) -> Rows:
    """Return the rows of a file, which is read anew when it has changed."""
    return tuple(row for row in read_rows(path) if isinstance(row, dict) and "step" in row)


def _config(path: Path) -> StageConfig:
    return _config_at(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _config_at(path: Path, modified: int) -> StageConfig:
    try:
        return from_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} must be readable, but: {error.strerror}.") from error
