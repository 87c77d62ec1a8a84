"""Dice per label of a folder of predictions, as numbers, as text and as a page.

Only files are read, so the numbers are those of what ``nnUNetv2_predict`` left on the disk.
"""

import base64
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template

import numpy as np
import SimpleITK as sitk

from nnunetv2_meddinov3.errors import UserError

DiceTable = dict[str, dict[str, float]]
"""Case -> label name -> Dice in 0..1, or NaN."""


def dice_per_label(prediction_folder: Path, label_folder: Path, dataset_json: Mapping) -> DiceTable:
    """Dice of every predicted case and label, by the label's value.

    A label that is absent from both the reference and the prediction has no Dice (NaN); where
    exactly one of them has it, the Dice is 0. A region (a list of values) counts as their union.
    Voxels of the ignore label are left out.

    Args:
        prediction_folder: Label maps as nnU-Net writes them, one file per case.
        label_folder: Reference label maps under the same file names; more cases are allowed.
        dataset_json: The content of nnU-Net's dataset.json (``labels`` and ``file_ending``).

    Returns:
        For each case, in order of name, the Dice of each label in the order of dataset.json.

    Raises:
        UserError: If nothing was predicted, or a case has no reference or one of another shape.
    """
    ending = dataset_json["file_ending"]
    paths = sorted(Path(prediction_folder).glob(f"*{ending}"))
    if not paths:
        raise UserError(
            f"There must be predictions to measure, but {prediction_folder} holds no *{ending} "
            "file; run nnUNetv2_predict with this folder as -o."
        )
    labels = foreground_labels(dataset_json)
    ignore = dataset_json["labels"].get("ignore")
    table: DiceTable = {}
    for path in paths:
        prediction, reference = _read_pair(path, Path(label_folder) / path.name)
        valid = np.ones(reference.shape, bool) if ignore is None else reference != ignore
        table[path.name.removesuffix(ending)] = {
            name: _dice(np.isin(prediction, values) & valid, np.isin(reference, values) & valid)
            for name, values in labels.items()
        }
    return table


def _read_pair(prediction_path: Path, reference_path: Path) -> tuple[np.ndarray, np.ndarray]:
    if not reference_path.is_file():
        raise UserError(
            f"Every prediction needs its reference, but {reference_path} does not exist; give the "
            "folder with the labels of the predicted cases."
        )
    prediction, reference = voxels(read_image(prediction_path)), voxels(read_image(reference_path))
    if prediction.shape != reference.shape:
        raise UserError(
            f"A prediction must have the shape of its reference, but {prediction_path} has "
            f"{prediction.shape} and {reference_path} has {reference.shape} voxels along (z, y, "
            "x); predict the images that belong to these labels."
        )
    return prediction, reference


def _dice(prediction: np.ndarray, reference: np.ndarray) -> float:
    total = int(prediction.sum()) + int(reference.sum())
    return 2 * int((prediction & reference).sum()) / total if total else math.nan


def foreground_labels(dataset_json: Mapping) -> dict[str, tuple[int, ...]]:
    """Label name -> the values that belong to it, without background and ignore."""
    labels = {}
    for name, value in dataset_json["labels"].items():
        values = tuple(int(v) for v in value) if isinstance(value, (list, tuple)) else (int(value),)
        if name != "ignore" and values != (0,):
            labels[name] = values
    return labels


def read_image(path: Path) -> sitk.Image:
    """Read an image or a label map.

    Raises:
        UserError: If SimpleITK cannot read the file.
    """
    try:
        return sitk.ReadImage(str(path))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"{path} must be an image that SimpleITK reads, but: {reason}") from error


def voxels(image: sitk.Image) -> np.ndarray:
    """Voxels as (z, y, x); a 2D image is one slice, colours are averaged."""
    array = sitk.GetArrayFromImage(image)
    if image.GetNumberOfComponentsPerPixel() > 1:
        array = array.mean(axis=-1)
    return array if array.ndim == 3 else array[None]


def mean_dice(table: DiceTable) -> dict[str, float]:
    """Mean over cases for each label, NaN left out; NaN for a label that no case has."""
    names = next(iter(table.values()))
    return {name: mean_of_known(row[name] for row in table.values()) for name in names}


def mean_of_known(values: Iterable[float]) -> float:
    """Mean of the values that are not NaN; NaN if there are none."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def format_dice(dice: float) -> str:
    """A Dice to three places, a dash where there is none."""
    return "-" if math.isnan(dice) else f"{dice:.3f}"


def format_table(table: DiceTable) -> str:
    """The table as plain text: a row per case, a column per label, means below and at the right."""
    rows = _rows(table)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for case, *cells in rows:
        right = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join([case.ljust(widths[0]), *right]))
    return "\n".join(lines)


def _rows(table: DiceTable) -> list[list[str]]:
    """Header, cases and means, all as text."""
    means = mean_dice(table)
    rows = [["case", *means, "mean"]]
    for name, dice in [*table.items(), ("mean", means)]:
        cells = [*dice.values(), mean_of_known(dice.values())]
        rows.append([name, *map(format_dice, cells)])
    return rows


_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>$title</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; color: #222 }
table { border-collapse: collapse }
th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
.dice tr:last-child { font-weight: bold }
pre { background: #f4f4f4; padding: .8rem; overflow-x: auto }
img { max-width: 100% }
.note { border-left: 4px solid #c60; padding-left: 1rem }
</style>
</head>
<body>
<h1>$title</h1>
<p class="note">$note</p>
<h2>Dice on held-out cases</h2>
<table class="dice">
$dice
</table>
<p>A dash: the label is in neither the reference nor the prediction.</p>
<h2>Pictures</h2>
<p>Left the contours of the reference, right those of the prediction.</p>
<img alt="Contours of reference and prediction" src="data:image/png;base64,$picture">
<h2>Commands</h2>
<pre>$commands</pre>
<h2>Versions</h2>
<table>
$versions
</table>
</body>
</html>
""")


def write_report(
    path: Path,
    title: str,
    note: str,
    table: DiceTable,
    overlay: Path,
    commands: Sequence[str],
    versions: Mapping[str, str],
) -> None:
    """Write one HTML file that needs no other: the table, the picture, the commands, the versions.

    Args:
        path: The page to write.
        title: Heading of the page.
        note: What the numbers mean and do not mean, in a sentence or two.
        table: Dice of `dice_per_label`.
        overlay: PNG of `overlay.save_overlay`, which is embedded.
        commands: The lines a reader types to get the same.
        versions: Name of a piece of software -> its version.
    """
    page = _PAGE.substitute(
        title=html.escape(title),
        note=html.escape(note),
        dice=_html_rows(_rows(table)),
        picture=base64.b64encode(Path(overlay).read_bytes()).decode("ascii"),
        commands=html.escape("\n".join(commands)),
        versions=_html_rows([["software", "version"], *(list(row) for row in versions.items())]),
    )
    partial = path.with_name(path.name + ".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)


def _html_rows(rows: Sequence[Sequence[str]]) -> str:
    lines = []
    for number, row in enumerate(rows):
        tag = "td" if number else "th"
        cells = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
        lines.append(f"<tr>{cells}</tr>")
    return "\n".join(lines)
