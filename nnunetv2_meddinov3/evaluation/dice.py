"""Dice per label of a folder of predictions, measured by nnU-Net's own evaluation.

Only files are read, so the numbers are those of what ``nnUNetv2_predict`` left on the disk.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.evaluation.label_maps import check_pair, read_label_map, reader_for
from nnunetv2_meddinov3.raw_dataset import RawDataset

DiceTable = dict[str, dict[str, float]]
"""Case -> label name -> Dice in 0..1, or NaN."""


def dice_per_label(prediction_folder: Path, label_folder: Path, dataset: RawDataset) -> DiceTable:
    """Return the Dice of every predicted case and label.

    As in nnU-Net, a label that is absent from both the reference and the prediction has no Dice
    (NaN); where exactly one of them has it, the Dice is 0. A region counts as the union of its
    values. Voxels of the ignore label are left out.

    Args:
        prediction_folder: Label maps as nnU-Net writes them, one file per case.
        label_folder: Reference label maps under the same file names; more cases are allowed.
        dataset: The raw dataset, which gives labels, file ending and reader.

    Returns:
        For each case, in order of name, the Dice of each label in the order of dataset.json.

    Raises:
        UserError: If nothing was predicted, or a case has no reference or one of another shape.
    """
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics  # seconds

    paths = sorted(prediction_folder.glob(f"*{dataset.ending}"))
    if not paths:
        raise UserError(
            f"There must be predictions to measure, but {prediction_folder} holds no "
            f"*{dataset.ending} file; run nnUNetv2_predict with this folder as -o."
        )
    reader = reader_for(dataset, paths[0])
    regions = list(dataset.labels.values())
    table: DiceTable = {}
    # One case after the other: nnU-Net's own loop starts processes, each of which imports torch.
    for path in paths:
        pair = _read_pair(reader, path, label_folder / path.name)
        reference, prediction = pair
        found = compute_metrics(reference, prediction, pair, regions, dataset.ignore)["metrics"]
        table[path.name.removesuffix(dataset.ending)] = {
            name: float(found[values]["Dice"]) for name, values in dataset.labels.items()
        }
    return table


class _Pair(dict[str, np.ndarray]):
    """A reference and a prediction by path, handed out as nnU-Net's readers do."""

    def read_seg(self, path: str) -> tuple[np.ndarray, dict]:
        return self[path], {}


def _read_pair(reader: Any, prediction: Path, reference: Path) -> _Pair:
    if not reference.is_file():
        raise UserError(
            f"Every prediction needs its reference, but {reference} does not exist; give the "
            "folder with the labels of the predicted cases."
        )
    maps = {path: read_label_map(reader, path) for path in (reference, prediction)}
    check_pair(maps[prediction], maps[reference], (prediction, reference))
    return _Pair({str(path): found.array[None] for path, found in maps.items()})


def mean_dice(table: DiceTable) -> dict[str, float]:
    """Return the mean over cases for each label, NaN left out; NaN where no case has the label."""
    names = next(iter(table.values()))
    return {name: mean_of_known(row[name] for row in table.values()) for name in names}


def mean_of_known(values: Iterable[float]) -> float:
    """Return the mean of the values that are not NaN; NaN if there are none."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def format_dice(dice: float) -> str:
    """Return a Dice to three places, a dash where there is none."""
    return "-" if math.isnan(dice) else f"{dice:.3f}"


def text_rows(table: DiceTable) -> list[list[str]]:
    """Return the table as text: a row per case, a column per label, means below and at the right.

    Returns:
        The header, the cases in order, the means.
    """
    means = mean_dice(table)
    rows = [["case", *means, "mean"]]
    for name, dice in [*table.items(), ("mean", means)]:
        cells = [*dice.values(), mean_of_known(dice.values())]
        rows.append([name, *map(format_dice, cells)])
    return rows


def format_table(table: DiceTable) -> str:
    """Return ``text_rows`` with aligned columns."""
    rows = text_rows(table)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for case, *cells in rows:
        right = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join([case.ljust(widths[0]), *right]))
    return "\n".join(lines)
