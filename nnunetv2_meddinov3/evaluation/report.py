"""The page of an evaluation: scores with intervals, a plot, the worst cases and how they look."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from nnunetv2_meddinov3.evaluation.dice import mean_of_known
from nnunetv2_meddinov3.evaluation.error_map import error_maps
from nnunetv2_meddinov3.evaluation.evaluate import Measured, Protocol, Row
from nnunetv2_meddinov3.evaluation.figures import TITLES, label_plot
from nnunetv2_meddinov3.evaluation.metrics import METRICS
from nnunetv2_meddinov3.evaluation.statistics import Interval
from nnunetv2_meddinov3.evaluation.summary import OVER_LABELS, Line
from nnunetv2_meddinov3.html import Block, Items, Picture, Section, Table, Text, write_page
from nnunetv2_meddinov3.raw_dataset import RawDataset

WORST = 6  # cases that are drawn
POLICIES = {
    "strict": "a label that neither has is not scored; one that is invented scores 0",
    "kits": "a label that neither has scores 1; one that is invented scores 0",
    "paper": "a label that the reference lacks is not scored, invented or not",
}


def write_report(
    path: Path,
    folders: tuple[Path, Path],
    dataset: RawDataset,
    protocol: Protocol,
    measured: Measured,
    lines: Sequence[Line],
    images: Mapping[str, Path],
) -> None:
    """Write one HTML file that needs no other.

    Args:
        path: The page.
        folders: Of predictions and labels.
        dataset: Gives labels and modality.
        protocol: How was measured.
        measured: The rows.
        lines: Their summary.
        images: Case -> image that is drawn below the contours.

    Raises:
        UserError: If the page cannot be written or a picture cannot be read.
    """
    cases = list(dict.fromkeys(row.case for row in measured.rows))
    patients = max(i.patients for i in lines[-1].metrics.values())
    blocks: list[Block] = [
        Text(f"{folders[0]} against {folders[1]}: {len(cases)} cases, {patients} patients."),
        Items(measured.notes, "note"),
    ]
    plot = label_plot(
        {"": {line.label: line.metrics["dice"] for line in lines}},
        [line.label for line in lines],
        "dice",
    )
    sections = [
        Section("Scores", [score_rows(lines), Text(how_measured(protocol))]),
        Section("Dice per label", [Picture(plot, "Mean Dice of each label with its interval")]),
        Section("Worst cases", _worst(folders, dataset, measured.rows, images)),
    ]
    write_page(path, f"Evaluation: {dataset.name}", blocks, sections)


def score_rows(lines: Sequence[Line]) -> Table:
    """Return the table of labels and metrics, the mean over labels below."""
    head = ["label", "values", *(TITLES[name] for name in METRICS), "patients"]
    rows = [
        [
            line.label,
            line.label_value,
            *(in_words(line.metrics[name]) for name in METRICS),
            line.metrics["dice"].patients,
        ]
        for line in lines
    ]
    return Table(head, rows, last_is_total=True)


def in_words(found: Interval) -> str:
    """Return ``0.812 [0.790, 0.831]``, a dash where nothing was scored."""
    if math.isnan(found.mean):
        return "-"
    ends = "" if math.isnan(found.low) else f" [{found.low:.3f}, {found.high:.3f}]"
    return f"{found.mean:.3f}{ends}"


def how_measured(protocol: Protocol) -> str:
    """Return a paragraph on tolerance, empty masks and intervals."""
    table = ", ".join(f"{name}: {mm:g} mm" for name, mm in protocol.tolerances.items())
    others = f"{protocol.tolerance:g} mm"
    tolerance = f"{others}, but {table}" if table else others
    return (
        f"Tolerance of both NSDs: {tolerance}. Empty masks ({protocol.policy.value}): "
        f"{POLICIES[protocol.policy.value]}; a label that the prediction misses scores 0, and as "
        "HD95 the diagonal of the image. HD95 is in mm (in pixels for pictures without a "
        "spacing). In brackets: 95 % bootstrap intervals over patients."
    )


def _worst(
    folders: tuple[Path, Path],
    dataset: RawDataset,
    rows: Sequence[Row],
    images: Mapping[str, Path],
) -> list[Table | Picture | Text]:
    by_case: dict[str, list[Row]] = {}
    for row in rows:
        by_case.setdefault(row.case, []).append(row)
    means = {c: mean_of_known(r.scores.dice for r in found) for c, found in by_case.items()}
    worst = sorted((c for c in means if not math.isnan(means[c])), key=means.__getitem__)[:WORST]
    if not worst:
        return [Text("No case has a score.")]
    labels = [row.label for row in by_case[worst[0]]]
    cells = [
        [case, *(_number(row.scores.dice) for row in by_case[case]), f"{means[case]:.3f}"]
        for case in worst
    ]
    said = {case: f"mean Dice {means[case]:.3f}" for case in worst}
    png = error_maps(said, _files(folders, worst, dataset.ending), images, dataset)
    return [
        Table(["case", *labels, OVER_LABELS], cells),
        Text("The slice of each with the most wrong pixels."),
        Picture(
            png, "Contours of reference and prediction and the wrong pixels of the worst cases"
        ),
    ]


def _files(
    folders: tuple[Path, Path], cases: Sequence[str], ending: str
) -> dict[str, tuple[Path | None, Path]]:
    predictions, labels = folders
    predicted = {c: predictions / f"{c}{ending}" for c in cases}
    return {
        case: (path if path.is_file() else None, labels / path.name)
        for case, path in predicted.items()
    }


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"
