"""The page of a trained model: how it learned, what it is worth, how it looks, how to use it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from nnunetv2_meddinov3.curves import Panels, curves
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.evaluation.dice import (
    DiceTable,
    format_dice,
    mean_dice,
    mean_of_known,
    text_rows,
)
from nnunetv2_meddinov3.evaluation.error_map import error_maps
from nnunetv2_meddinov3.evaluation.figures import case_plot
from nnunetv2_meddinov3.html import Block, Code, Items, Picture, Section, Table, Text, write_page
from nnunetv2_meddinov3.report.model_folder import FINAL, Fold, Model

DRAWN = 3  # cases, the worst and as many of the best
_MANY_LABELS = 8  # more curves than these cannot be told apart

_PANELS: Panels = {
    "loss": {"train_loss": "training", "val_loss": "validation patches"},
    "pseudo Dice": {"dice": "of an epoch", "dice_average": "moving average"},
    "learning rate": {"rate": "learning rate"},
    "seconds per epoch": {"seconds": "seconds"},
}


def write_model_page(path: Path, model: Model) -> Path:
    """Write one HTML file that needs no other.

    Args:
        path: The page.
        model: What is shown.

    Returns:
        The page.

    Raises:
        UserError: If it cannot be written.
    """
    remarks = [f"{fold.name}: {said}." for fold in model.folds for said in fold.remarks]
    blocks: list[Block] = [Items([summary(fold) for fold in model.folds])]
    if remarks:
        blocks.append(Items(remarks, "note"))
    sections = [
        *_validation(model),
        *(
            Section(f"Curves, {fold.name}", [_curves(fold, list(model.dataset.labels))])
            for fold in model.folds
        ),
        Section("What was trained", [Table((), _facts(model), text=True)]),
        Section("Commands", [Code(commands(model))]),
    ]
    title = f"{model.plans['dataset_name']}, {model.trainer}, {model.configuration}"
    return write_page(path, title, blocks, sections)


def summary(fold: Fold) -> str:
    """Return a sentence on how far a fold is and what it is worth."""
    done = len(fold.epochs)
    length = f"{done} of {fold.planned}" if fold.planned else str(done)
    said = f"{fold.name}: {length} epochs done"
    if not fold.checkpoint:
        said = f"{fold.name}: no checkpoint yet"
    if not fold.dice:
        return f"{said}, not validated yet."
    mean = format_dice(mean_of_known(mean_dice(fold.dice).values()))
    where = " (which it was trained on)" if fold.option == "all" else ""
    count = len(fold.dice)
    cases = f"{count} validation case{'s' if count > 1 else ''}"
    return f"{said}, mean Dice {mean} of {cases}{where}."


def _validation(model: Model) -> list[Section]:
    validated = [fold for fold in model.folds if fold.dice]
    if not validated:
        said = "No fold has a validation yet: nnUNetv2_train with --val makes one."
        return [Section("Validation", [Text(said)])]
    # all folds have other cases, but for fold_all, which is measured where it was trained
    counted = [fold for fold in validated if fold.option != "all"] or validated
    table = {case: row for fold in counted for case, row in fold.dice.items()}
    names = list(next(iter(table.values())))
    rows = [_dice_row(fold.name, fold.dice, names) for fold in validated]
    several = len(counted) > 1
    if several:
        rows.append(_dice_row(f"all {len(counted)} folds", table, names))
    head, *cases = text_rows(table)
    means = mean_dice(table)
    alt = "Dice of each case and mean of each label: " + ", ".join(
        f"{name} {format_dice(mean)}" for name, mean in means.items()
    )
    how = (
        "Dice as nnU-Net's validation measured it, mean over cases; the last column is the mean "
        "over labels. A dash: no case has the label, in the reference or the prediction."
    )
    return [
        Section(
            "Validation",
            [
                Picture(case_plot(table), alt),
                Table(["", "cases", *names, "mean"], rows, last_is_total=several),
                Text(how),
                Table(head, cases, last_is_total=True, summary=f"every case ({len(table)})"),
            ],
        ),
        Section("Worst and best cases", _cases(model, counted)),
    ]


def _dice_row(name: str, table: DiceTable, labels: Sequence[str]) -> list[object]:
    means = mean_dice(table)
    found = [means.get(label, math.nan) for label in labels]
    return [name, len(table), *map(format_dice, [*found, mean_of_known(found)])]


def _cases(model: Model, folds: Sequence[Fold]) -> list[Block]:
    means = {c: mean_of_known(row.values()) for fold in folds for c, row in fold.dice.items()}
    order = sorted((c for c, mean in means.items() if not math.isnan(mean)), key=means.__getitem__)
    worst = order[:DRAWN]
    best = order[max(len(worst), len(order) - DRAWN) :][::-1]
    files = {case: pair for fold in folds for case, pair in fold.files.items()}
    drawn = [case for case in (*worst, *best) if case in files]
    if not order:
        return [Text("No case has a Dice.")]
    if not drawn:
        return [
            Text(
                "The validation's label maps or their references are not on this machine; with "
                "both, and nnUNet_raw or --raw for the images, `meddinov3 report` draws them."
            )
        ]
    images = {case: files[min(files)] for case, files in model.dataset.images().items() if files}
    images = {case: path for case, path in images.items() if case in drawn and path.is_file()}
    blocks: list[Block] = [
        Text(
            "By the mean Dice of a case, the worst first, then the best: the slice with the most "
            "wrong pixels of each."
        )
    ]
    if absent := [case for case in drawn if case not in images]:
        blocks.append(
            Text(
                f"The images of {', '.join(absent)} were not found: set nnUNet_raw, or give their "
                "raw dataset with --raw.",
                "note",
            )
        )
    for kind, cases in (("worst", worst), ("best", best)):
        if shown := [case for case in cases if case in files]:
            said = {case: f"mean Dice {means[case]:.3f}" for case in shown}
            alt = f"The {kind} cases with contours and wrong pixels: " + ", ".join(
                f"{case}, {text}" for case, text in said.items()
            )
            try:
                blocks.append(Picture(error_maps(said, files, images, model.dataset), alt))
            except UserError as error:  # the page says what it can
                blocks.append(Text(str(error), "wrong"))
    return blocks


def _curves(fold: Fold, labels: Sequence[str]) -> Block:
    if not fold.epochs:
        return Text("No epoch is in a checkpoint yet.")
    last = fold.epochs[-1]
    known = [name for name in labels if f"dice_{name}" in last]
    title = "pseudo Dice of each label"
    if len(known) > _MANY_LABELS:
        known = sorted(known, key=lambda name: last[f"dice_{name}"])[:_MANY_LABELS]
        title = f"pseudo Dice, the {_MANY_LABELS} lowest labels"
    panels = dict(_PANELS)
    if len(labels) > 1:
        panels[title] = {f"dice_{name}": name for name in known}
    return curves(fold.epochs, panels, "epoch")


def _facts(model: Model) -> list[tuple[str, str]]:
    settings = model.settings
    network = settings.get("architecture", {})
    arguments = network.get("arch_kwargs", {})
    patch = settings.get("patch_size", [])
    rows = [
        ("trainer", model.trainer),
        ("plans, configuration", f"{model.plans.get('plans_name', '?')}, {model.configuration}"),
        ("channels", ", ".join(model.dataset.channel_names.values())),
        ("patch", f"{_times(patch)} pixels at {_times(settings.get('spacing', []))} mm"),
        ("batch size", str(settings.get("batch_size", "?"))),
        ("normalisation", ", ".join(settings.get("normalization_schemes", []))),
        ("network", str(network.get("network_class_name", "?")).rpartition(".")[2]),
    ]
    if isinstance(vit := arguments.get("backbone"), dict) and "depth" in vit:
        rows.append(
            (
                "ViT",
                f"{vit['depth']} blocks, width {vit.get('embed_dim')}, {vit.get('num_heads')} "
                f"heads, patches of {vit.get('patch_size')} pixels, "
                f"{vit.get('num_registers')} registers",
            )
        )
    rows += _per_fold(model.folds, "parameters", _parameters)
    rows += _per_fold(model.folds, "started from", _start)
    rows += _per_fold(model.folds, "licence of the weights", lambda fold: fold.licence)
    rows += _per_fold(model.folds, "length", _length)
    return [(name, value) for name, value in rows if value]


def _per_fold(folds: Sequence[Fold], title: str, value: Any) -> list[tuple[str, str]]:
    """One row where all folds agree, else one for each."""
    found = {fold.name: value(fold) for fold in folds}
    if len(set(found.values())) == 1:
        return [(title, found[folds[0].name])]
    return [(f"{title}, {name}", text) for name, text in found.items()]


def _parameters(fold: Fold) -> str:
    return f"{fold.parameters / 1e6:.1f} million" if fold.parameters else ""


def _start(fold: Fold) -> str:
    said = "; ".join(f"{part}: {source}" for part, source in fold.started_from.items())
    return said or "the logs do not say"


def _length(fold: Fold) -> str:
    seconds = [row["seconds"] for row in fold.epochs if "seconds" in row]
    if not seconds:
        return ""
    iterations = f" of {fold.iterations} iterations" if fold.iterations else ""
    hours = sum(seconds) / 3600
    return (
        f"{len(fold.epochs)} epochs{iterations}, {median(seconds):.3g} s each (median), "
        f"{hours:.2g} h in all"
    )


def _times(sides: Sequence[float]) -> str:
    return " x ".join(f"{side:.4g}" for side in sides)


def commands(model: Model) -> str:
    """Return the lines that predict with a model, export it, and import it elsewhere."""
    usable = [fold for fold in model.folds if fold.checkpoint]
    if not usable:
        return "# no fold has a checkpoint yet"
    finished = [fold for fold in usable if fold.checkpoint == FINAL]
    folds = " ".join(fold.option for fold in finished or usable)
    checkpoint = "" if finished else f" -chk {usable[0].checkpoint}"
    parts = model.folder.resolve().name.split("__")
    if len(parts) != 3:
        where = shlex.quote(str(model.folder.resolve()))
        return f"nnUNetv2_predict_from_modelfolder -i IN -o OUT -m {where} -f {folds}{checkpoint}"
    trainer, plans, configuration = parts
    name = f"-d {shlex.quote(str(model.plans['dataset_name']))} -c {configuration} -f {folds}"
    name += f" -tr {trainer} -p {plans}"
    lines = [f"nnUNetv2_predict -i IN -o OUT {name}{checkpoint}"]
    if finished:
        lines += [
            f"nnUNetv2_export_model_to_zip {name} -o model.zip",
            "nnUNetv2_install_pretrained_model_from_zip model.zip    # on another machine",
        ]
    return "\n".join(lines)
