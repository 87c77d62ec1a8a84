"""Trainings of nnU-Net as the logs of their folds show them, which have a line an epoch."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.evaluation.dice import mean_of_known
from nnunetv2_meddinov3.progress import in_words
from nnunetv2_meddinov3.raw_dataset import read_dataset_json
from nnunetv2_meddinov3.report.model_folder import PAGE, logged_lines, read_logs
from nnunetv2_meddinov3.watch.view import Curve, Part, View, age_of, is_late

_RECENT = 20  # epochs that time and labels are said of
_FALLEN = 0.1  # of the pseudo Dice, below its best
_FIRST_EPOCH_S = 180.0  # what an epoch is taken to need before one is done
_SLOW = 2.0  # times the usual length of an epoch
_LAST_WORDS = re.compile(r"Mean Validation Dice: +(\S+)")
_NUMBER = re.compile(r"-?(?:nan|inf|\d[\d.]*(?:e[+-]?\d+)?)")
_STARTS_WITH = {
    "Current learning rate: ": "rate",
    "train_loss ": "train_loss",
    "val_loss ": "val_loss",
    "Epoch time: ": "seconds",
}


def is_training(folder: Path) -> bool:
    """Return whether a folder is a model of nnU-Net's or one of its folds."""
    return any((place / "debug.json").is_file() or _has_log(place) for place in _folds_in(folder))


def view_of_folds(folder: Path) -> View:
    """Return the trainings of a model folder as they are now.

    Args:
        folder: ``TRAINER__PLANS__CONFIGURATION``, or one of its folds.

    Raises:
        UserError: If a file of it cannot be read.
    """
    folds = [place for place in _folds_in(folder) if _has_log(place)]
    model = folds[0].resolve().parent if folds else folder
    if not folds:
        raise UserError(
            f"a training must have written its log, but {folder} has no training_log_*.txt yet: "
            "wait for its first lines."
        )
    names = _labels(model)
    parts = [_part(fold, names) for fold in folds]
    newest = min(range(len(folds)), key=lambda i: age_of(_logs(folds[i])[-1]) or 0.0)
    page = model / PAGE
    return View(
        f"{model.parent.name}, {model.name}",
        folder,
        parts,
        newest,
        page if page.is_file() else None,
    )


def _folds_in(folder: Path) -> list[Path]:
    if folder.resolve().name.startswith("fold_"):
        return [folder]
    return sorted(path for path in folder.glob("fold_*") if path.is_dir())


def _logs(fold: Path) -> list[Path]:
    return sorted(fold.glob("training_log_*.txt"))  # by their time


def _has_log(fold: Path) -> bool:
    return bool(_logs(fold))


def _labels(model: Path) -> list[str]:
    path = model / "dataset.json"
    return list(read_dataset_json(path).labels) if path.is_file() else []


def _part(fold: Path, labels: Sequence[str]) -> Part:
    logs = _logs(fold)
    key = tuple((path, path.stat().st_mtime_ns, path.stat().st_size) for path in logs)
    rows, said, remarks = _read(fold, key)
    done, total = len(rows), _planned(fold)
    seconds = [row["seconds"] for row in rows if "seconds" in row]
    usual = median(seconds[-_RECENT:]) if seconds else None
    age = age_of(logs[-1])
    is_silent = is_late(age, usual or _FIRST_EPOCH_S)
    is_trained = "Training done." in said
    is_finished = is_trained and any(_LAST_WORDS.match(line) for line in said)
    left = None if usual is None or total is None else usual * max(0, total - done)
    if is_finished:
        state = "finished"
    elif is_silent:
        state = "trained, its validation is silent" if is_trained else "silent"
    else:
        state = "validates" if is_trained else "runs"
    wrong = [*remarks, *troubles(rows, labels)]
    if not is_trained and is_silent:
        wrong.append(
            f"nothing was logged for {in_words(age or 0.0)}"
            f"{'' if usual is None else f', though an epoch takes {in_words(usual)}'}: the "
            "training has ended or hangs; nnUNetv2_train with --c goes on from its last checkpoint."
        )
    return Part(
        fold.resolve().name.replace("_", " "),
        state,
        done,
        total,
        "epochs",
        spent=sum(seconds) if seconds else None,
        left=0.0 if is_trained else left,
        is_finished=is_finished,
        age=age,
        figures=_figures(rows, usual, said),
        curves=_curves(rows, labels),
        wrong=wrong,
        checked=f"epoch {done}" if rows else "",
    )


@functools.lru_cache(maxsize=32)
def _read(
    fold: Path, key: tuple[tuple[Path, int, int], ...]
) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    """Return a row for each whole epoch of a fold's logs, the lines after the last, and remarks."""
    lines = list(logged_lines(fold))
    remarks = [f"{said}." if said[-1] != "." else said for said in read_logs(lines)[2]]
    return *epochs_of(lines), remarks


def epochs_of(lines: Iterable[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the epochs that logs of nnU-Net's tell of, and what comes after the last.

    Args:
        lines: Without their times, of all logs of a fold, the oldest first. What was trained again
            after a resume counts as it was done last.

    Returns:
        Rows with ``rate``, ``train_loss``, ``val_loss``, ``dice`` (of each output) and ``seconds``,
        as far as they were logged; and the lines after the last whole epoch.
    """
    rows: dict[int, dict[str, Any]] = {}
    now: dict[str, Any] = {}
    number: int | None = None
    after: list[str] = []
    for line in lines:
        after.append(line)
        head, _, rest = line.partition(" ")
        if head == "Epoch" and rest.strip().isdigit():
            number, now = int(rest), {}
            rows = {n: row for n, row in rows.items() if n < number}
            continue
        if line.startswith("Pseudo dice "):
            numbers = re.sub(r"np\.float\d+", "", line.removeprefix("Pseudo dice "))
            now["dice"] = [float(found) for found in _NUMBER.findall(numbers)]
        for start, name in _STARTS_WITH.items():
            if line.startswith(start) and (found := _NUMBER.match(line[len(start) :])):
                now[name] = float(found[0])
        if "seconds" in now and number is not None:
            rows[number], number, after = now, None, []
    return [rows[n] for n in sorted(rows)], after


def troubles(rows: Sequence[dict[str, Any]], labels: Sequence[str]) -> list[str]:
    """Say in words what is wrong with a training.

    Args:
        rows: Its epochs; see ``epochs_of``.
        labels: Names, in the order of the network's outputs.
    """
    out = []
    last = rows[-1] if rows else {}
    lost = [n for n in ("train_loss", "val_loss") if not math.isfinite(last.get(n, 0.0))]
    if lost:
        which = "training" if lost[0] == "train_loss" else "validation"
        out.append(
            f"the {which} loss is not a number: the training has diverged; go back to a checkpoint "
            "and lower the learning rate."
        )
    recent = [row["dice"] for row in rows[-_RECENT:] if row.get("dice")]
    if len(recent) == _RECENT:
        never = [
            labels[i] if i < len(labels) else f"number {i + 1}"
            for i, values in enumerate(zip(*recent, strict=False))
            if max(values) == 0
        ]
        if never:
            out.append(
                f"no voxel of {', '.join(never)} was found in the last {_RECENT} epochs: rare "
                "labels may take hundreds; if it stays so, check that they are in the training "
                "cases."
            )
    means = [mean_of_known(row.get("dice", ())) for row in rows]
    smooth = [sum(means[i - 5 : i]) / 5 for i in range(5, len(means) + 1)]
    smooth = [value for value in smooth if math.isfinite(value)]
    if smooth and max(smooth) - smooth[-1] > _FALLEN:
        out.append(
            f"the pseudo Dice has fallen to {smooth[-1]:.3f} from {max(smooth):.3f} (means of five "
            "epochs): the learning rate may be too high."
        )
    seconds = [row["seconds"] for row in rows if "seconds" in row]
    if len(seconds) > 2 * _RECENT and median(seconds[-5:]) > _SLOW * median(seconds):
        out.append(
            f"epochs take {median(seconds[-5:]):.0f} s, they took {median(seconds):.0f} s: look "
            "for other jobs on the machine."
        )
    return out


def _figures(
    rows: Sequence[dict[str, Any]], usual: float | None, said: Sequence[str]
) -> dict[str, str]:
    found: dict[str, str] = {}
    if usual is not None:
        found["an epoch"] = in_words(usual)
    if rows and "rate" in rows[-1]:
        found["learning rate"] = f"{rows[-1]['rate']:.2e}"
    validated = [match[1] for line in said if (match := _LAST_WORDS.match(line))]
    if validated:
        found["mean validation Dice"] = f"{float(validated[-1]):.4f}"
    return found


def _curves(rows: Sequence[dict[str, Any]], labels: Sequence[str]) -> list[Curve]:
    series = {
        "training loss": [row.get("train_loss", math.nan) for row in rows],
        "validation loss": [row.get("val_loss", math.nan) for row in rows],
        "pseudo Dice, mean": [mean_of_known(row.get("dice", ())) for row in rows],
    }
    outputs = max((len(row.get("dice", ())) for row in rows), default=0)
    for i in range(outputs if outputs > 1 else 0):
        name = labels[i] if i < len(labels) else f"label {i + 1}"
        series[f"pseudo Dice, {name}"] = [
            row["dice"][i] for row in rows if len(row.get("dice", ())) > i
        ]
    finite = {
        name: [value for value in values if math.isfinite(value)] for name, values in series.items()
    }
    return [Curve(name, values) for name, values in finite.items() if values]


def _planned(fold: Path) -> int | None:
    """Return the number of epochs that nnU-Net notes at the start of a training."""
    try:
        found = json.loads((fold / "debug.json").read_text(encoding="utf-8"))["num_epochs"]
        return int(found)
    except (OSError, ValueError, KeyError, TypeError):
        return None
