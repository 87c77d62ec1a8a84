"""What a model folder of nnU-Net says of its trainings: plans, curves, validation and logs.

Checkpoints are opened without their tensors and without running code of theirs.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nnunetv2_meddinov3.errors import UserError, first_line
from nnunetv2_meddinov3.evaluation.dice import DiceTable
from nnunetv2_meddinov3.raw_dataset import RawDataset, find_raw_dataset, read_dataset_json

FINAL = "checkpoint_final.pth"
PAGE = "report.html"
# By how far the training was: the first one that exists has all epochs.
_CHECKPOINTS = (FINAL, "checkpoint_latest.pth", "checkpoint_best.pth")
_LOGGED = re.compile(r"[\d-]{10} [\d:.]+: (.*\S)")
# Sentences of our trainers that say what was trained, and of a training that went wrong.
_STARTS = re.compile(r"The (?P<part>.+?) starts from (?P<source>.+)\.")
_LICENCE = re.compile(r"Licence of these weights: (.+)\.")
_REMARKS = re.compile(
    r"These weights were pretrained|A batch with a loss or gradient of NaN|The plans differ from"
)


@dataclass(frozen=True)
class Fold:
    """One training.

    Attributes:
        name: Of its folder, ``fold_0`` or ``fold_all``.
        folder: Where it is.
        epochs: A row an epoch: ``epoch`` from 1, ``train_loss``, ``val_loss``, ``dice`` (nnU-Net's
            pseudo Dice: of the validation patches of an epoch, pooled), ``dice_average`` (its
            moving average), ``rate`` (of learning), ``seconds``, and ``dice_NAME`` for each label.
        planned: Number of epochs that it was to have, None where the checkpoint does not say.
        iterations: Training iterations an epoch, None where the checkpoint does not say.
        parameters: Of the network, 0 where unknown.
        checkpoint: File that the rows are from; empty without one.
        started_from: Part of the network -> the weights that it started from.
        licence: Of those weights; empty where the log says none.
        remarks: What its logs say that a reader of the numbers should know.
        dice: Of the validation cases; empty before the validation.
        files: Case -> prediction and reference, as far as they exist.
    """

    name: str
    folder: Path
    epochs: list[dict[str, Any]] = field(default_factory=list)
    planned: int | None = None
    iterations: int | None = None
    parameters: int = 0
    checkpoint: str = ""
    started_from: dict[str, str] = field(default_factory=dict)
    licence: str = ""
    remarks: list[str] = field(default_factory=list)
    dice: DiceTable = field(default_factory=dict)
    files: dict[str, tuple[Path, Path]] = field(default_factory=dict)

    @property
    def option(self) -> str:
        """What ``-f`` takes for it."""
        return self.name.removeprefix("fold_")


@dataclass(frozen=True)
class Model:
    """A model folder: ``TRAINER__PLANS__CONFIGURATION``.

    Attributes:
        folder: The folder.
        trainer: Name of the trainer, as far as the folder or a checkpoint says it.
        configuration: Name of the configuration.
        plans: Content of plans.json.
        dataset: Labels and channels, and the raw images where they are here.
        folds: Those that have begun.
    """

    folder: Path
    trainer: str
    configuration: str
    plans: dict[str, Any]
    dataset: RawDataset
    folds: list[Fold]

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration with what it inherits."""
        found: dict[str, Any] = {}
        configurations = self.plans["configurations"]
        name: str | None = self.configuration
        for _ in configurations:  # each may inherit from another
            content = configurations.get(name, {})
            found = {**content, **found}
            name = content.get("inherits_from")
        return found


def read_model(folder: Path, raw: Path | None = None) -> Model:
    """Read a model folder, or that of one of its folds.

    Args:
        folder: A folder that a trainer of nnU-Net wrote, of any of its trainers.
        raw: The raw dataset; by default the one of that name in ``nnUNet_raw``.

    Raises:
        UserError: If it is no such folder, or a file in it cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"a model folder must exist, but there is no folder {folder}.")
    if (folder / "metrics.jsonl").is_file() or any(folder.glob("stage*/metrics.jsonl")):
        raise UserError(
            f"a model folder of nnU-Net holds plans.json and fold_*, but {folder} is a run of "
            "`meddinov3 pretrain`, which writes report.html itself into each stage's folder."
        )
    if folder.name.startswith("fold_") and not (folder / "plans.json").exists():
        folder = folder.resolve().parent
    trained = sorted(p for p in folder.glob("fold_*") if p.is_dir())
    if not trained or not all((folder / n).is_file() for n in ("plans.json", "dataset.json")):
        raise UserError(
            f"a model folder (TRAINER__PLANS__CONFIGURATION in nnUNet_results) must hold "
            f"plans.json, dataset.json and folders fold_*, but {folder} does not"
            f"{models_in(folder)}: give the folder of one trained model."
        )
    plans = _read_json(folder / "plans.json")
    try:
        name = str(plans["dataset_name"])
        dict(plans["configurations"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder / 'plans.json'} must hold nnU-Net's plans, but has no "
            f"{first_line(error)}: restore it from the training."
        ) from error
    dataset = read_dataset_json(folder / "dataset.json")
    raw = raw or raw_dataset_folder(name)
    images = None if raw is None else find_raw_dataset(raw)
    if images is not None:  # the labels of the model, the files of the raw dataset
        dataset = replace(dataset, folder=images.folder, entries=images.entries)
    places = _Places(dataset, name, images is not None)
    trainer, _, rest = folder.resolve().name.partition("__")
    configuration = rest.rpartition("__")[2]
    folds = []
    for path in trained:
        fold, facts = _read_fold(path, places)
        trainer = str(facts.get("trainer_name", trainer))
        configuration = str(_arguments(facts).get("configuration", configuration))
        folds.append(fold)
    return Model(folder, trainer, configuration, plans, dataset, folds)


def models_in(folder: Path) -> str:
    """Say which models a folder of a dataset holds."""
    names = sorted(path.parent.name for path in folder.glob("*/plans.json"))
    return f" (it holds {', '.join(names)})" if names else ""


def raw_dataset_folder(name: str) -> Path | None:
    """Return the raw dataset of a name in ``nnUNet_raw``, None where it is not there."""
    base = os.environ.get("nnUNet_raw")
    folder = Path(base, name) if base else None
    return folder if folder is not None and (folder / "dataset.json").is_file() else None


@dataclass(frozen=True)
class _Places:
    """Where images and references may be."""

    dataset: RawDataset
    name: str
    has_raw: bool

    def reference(self, case: str, stated: str) -> Path | None:
        """The label map that a case was compared with, None where none of its places has it."""
        base = os.environ.get("nnUNet_preprocessed")
        places = [Path(stated)] if stated else []
        if base:
            places.append(Path(base, self.name, "gt_segmentations", f"{case}{self.dataset.ending}"))
        if self.has_raw:
            places.append(self.dataset.label(case))
        return next((place for place in places if place.is_file()), None)


def _read_fold(folder: Path, places: _Places) -> tuple[Fold, dict[str, Any]]:
    """Read one fold; return it, and what its checkpoint says besides."""
    name, facts, unread = _newest_checkpoint(folder)
    names = list(places.dataset.labels)
    groups = (facts.get("optimizer_state") or {}).get("param_groups") or [{}]
    started, licence, remarks = read_logs(logged_lines(folder))
    remarks += unread
    dice, files = _read_validation(folder, places)
    fold = Fold(
        folder.name,
        folder,
        epoch_rows(facts.get("logging") or {}, names),
        groups[0].get("num_epochs"),
        groups[0].get("num_iterations"),
        sum(tensor.numel() for tensor in (facts.get("network_weights") or {}).values()),
        name,
        started,
        licence,
        remarks,
        dice,
        files,
    )
    return fold, facts


def _newest_checkpoint(folder: Path) -> tuple[str, dict[str, Any], list[str]]:
    """Return a fold's last readable checkpoint, its content, and what is wrong with others.

    One may be in the middle of being written, by a training that goes on.
    """
    wrong: list[str] = []
    for name in _CHECKPOINTS:
        if (folder / name).is_file():
            try:
                return name, read_checkpoint_facts(folder / name), wrong
            except UserError as error:
                wrong.append(str(error).removesuffix("."))
    return "", {}, wrong


def _arguments(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    found = facts.get("init_args")
    return found if isinstance(found, Mapping) else {}


def read_checkpoint_facts(path: Path) -> dict[str, Any]:
    """Return what a checkpoint of nnU-Net holds; its tensors stay in the file.

    Raises:
        UserError: If it is damaged, unsafe or no such checkpoint.
    """
    from nnunetv2_meddinov3.models.tensor_files import load_with_numbers  # torch: seconds

    content = load_with_numbers(path)
    if not isinstance(content, dict) or not isinstance(content.get("logging", {}), dict):
        raise UserError(
            f"{path} must be a checkpoint of nnU-Net, but it is another file of torch's: give the "
            "folder that a training of nnU-Net wrote."
        )
    return content


def epoch_rows(logging: Mapping[str, Any], labels: list[str]) -> list[dict[str, Any]]:
    """Return nnU-Net's log, a list for each quantity, as a row for each whole epoch.

    Args:
        logging: Of a checkpoint.
        labels: Names, in the order of the network's outputs.
    """
    known = {key: list(values) for key, values in logging.items() if isinstance(values, list)}
    length = min((len(values) for values in known.values()), default=0)
    rows: list[dict[str, Any]] = []
    for i in range(length):
        at = {key: values[i] for key, values in known.items()}
        row: dict[str, Any] = {"epoch": i + 1}
        for key, name in (
            ("train_losses", "train_loss"),
            ("val_losses", "val_loss"),
            ("mean_fg_dice", "dice"),
            ("ema_fg_dice", "dice_average"),
            ("lrs", "rate"),
        ):
            if key in at:
                row[name] = float(at[key])
        if {"epoch_start_timestamps", "epoch_end_timestamps"} <= at.keys():
            row["seconds"] = float(at["epoch_end_timestamps"] - at["epoch_start_timestamps"])
        each = at.get("dice_per_class_or_region", ())
        row |= {f"dice_{n}": float(value) for n, value in zip(labels, each, strict=False)}
        rows.append(row)
    return rows


def read_logs(lines: Iterable[str]) -> tuple[dict[str, str], str, list[str]]:
    """Return what the logs of a fold say of weights, licence and trouble, the last word of each."""
    started: dict[str, str] = {}
    licence = ""
    remarks: dict[str, int] = {}
    for line in lines:
        if match := _STARTS.fullmatch(line):
            started[match["part"]], licence = match["source"], ""
        elif match := _LICENCE.fullmatch(line):
            licence = match[1]
        elif _REMARKS.match(line):
            # batches that are left out come with another number and other cases each time
            said = line.partition(", ")[0] if line.startswith("A batch") else line
            remarks[said] = remarks.get(said, 0) + 1
    return started, licence, [f"{s} ({n} times)" if n > 1 else s for s, n in remarks.items()]


def logged_lines(folder: Path) -> Iterator[str]:
    """Yield what the logs of a fold say, line by line without its time, the oldest log first."""
    for path in sorted(folder.glob("training_log_*.txt")):  # by their time
        with contextlib.suppress(OSError), path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                if match := _LOGGED.fullmatch(line.strip()):
                    yield match[1]


def _read_validation(
    folder: Path, places: _Places
) -> tuple[DiceTable, dict[str, tuple[Path, Path]]]:
    """Return the Dice that nnU-Net measured of the validation cases, and their files."""
    path = folder / "validation" / "summary.json"
    if not path.is_file():
        return {}, {}
    labels = {tuple(sorted(values)): name for name, values in places.dataset.labels.items()}
    table: DiceTable = {}
    files: dict[str, tuple[Path, Path]] = {}
    try:
        for entry in _read_json(path)["metric_per_case"]:
            # written on any system
            file_name = re.split(r"[/\\]", entry["prediction_file"])[-1]
            case = file_name.removesuffix(places.dataset.ending)
            found = {_values(key): measured["Dice"] for key, measured in entry["metrics"].items()}
            table[case] = {
                name: _number(found[values]) for values, name in labels.items() if values in found
            }
            reference = places.reference(case, entry.get("reference_file") or "")
            prediction = path.parent / file_name
            if reference is not None and prediction.is_file():
                files[case] = (prediction, reference)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{path} must be nnU-Net's summary of a validation, but is not "
            f"({type(error).__name__}: {first_line(error)}): run nnUNetv2_train with --val again."
        ) from error
    return table, files


def _values(key: str) -> tuple[int, ...]:
    """The values of a label or region as summary.json names it: ``1`` or ``(1, 2)``."""
    return tuple(sorted(map(int, re.findall(r"\d+", key))))


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} must be readable JSON, but: {first_line(error)}.") from error
