"""``meddinov3 evaluate``: what predictions are worth."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nnunetv2_meddinov3.errors import UserError, first_line

if TYPE_CHECKING:
    from nnunetv2_meddinov3.evaluation.evaluate import Protocol
    from nnunetv2_meddinov3.raw_dataset import RawDataset

_DESCRIPTION = """\
Measures label maps against references: per case and label Dice, the normalised surface Dice in its
two definitions (nsd_voxel, which counts boundary voxels as MONAI's default and the paper, and
nsd_surface, which counts boundary area as DeepMind's surface-distance), HD95 and the error of the
volume. Writes cases.csv, summary.json and report.html. Needs the extra "benchmark" (MONAI).
"""


def main(argv: list[str] | None = None) -> int:
    """Evaluate a folder of predictions and print a table.

    Args:
        argv: What was typed after ``meddinov3 evaluate``; by default that of this process.

    Returns:
        The exit code, 0.

    Raises:
        UserError: If something cannot be read, measured or written.
    """
    arguments = _parser().parse_args(argv)
    if arguments.processes < 1:
        raise UserError(f"-np must be at least 1, got {arguments.processes}.")
    # Imported here because `--help` need not wait for torch.
    from nnunetv2_meddinov3 import __version__
    from nnunetv2_meddinov3.case_names import patient_in, patient_pattern
    from nnunetv2_meddinov3.evaluation.evaluate import evaluate, match_cases, write_cases
    from nnunetv2_meddinov3.evaluation.report import write_report
    from nnunetv2_meddinov3.evaluation.summary import patients_of, summarise, summary_json
    from nnunetv2_meddinov3.files import check_writable, write_text
    from nnunetv2_meddinov3.raw_dataset import read_dataset_json

    folders = arguments.predictions, arguments.labels
    dataset = read_dataset_json(arguments.dataset_json or find_dataset_json(*folders))
    protocol = _protocol(arguments)
    pattern = patient_pattern(arguments.patients) if arguments.patients else None
    pairs, _ = match_cases(*folders, dataset.ending, protocol.missing)
    for case in pairs:  # before any work
        patient_in(case, pattern)
    images = _images(arguments.images, dataset, list(pairs))
    check_writable(arguments.output)
    arguments.output.mkdir(parents=True, exist_ok=True)
    measured = evaluate(*folders, dataset, protocol, workers=arguments.processes, stream=sys.stderr)
    lines = summarise(measured.rows, pattern)
    write_cases(arguments.output / "cases.csv", measured.rows)
    content = {
        "meddinov3": __version__,
        "predictions": str(folders[0].resolve()),
        "labels": str(folders[1].resolve()),
        "cases": len(pairs),
        "patients": len(patients_of(measured.rows, pattern)),
        "tolerance_mm": protocol.tolerance,
        "tolerances_mm": dict(protocol.tolerances),
        "empty_masks": protocol.policy.value,
        "missing_predictions": measured.missing,
        "notes": measured.notes,
        "scores": summary_json(lines),
    }
    write_text(arguments.output / "summary.json", f"{json.dumps(content, indent=1)}\n")
    report = arguments.output / "report.html"
    write_report(report, folders, dataset, protocol, measured, lines, images)
    _print(lines, measured.notes, arguments.output)
    return 0


def find_dataset_json(predictions: Path, labels: Path) -> Path:
    """Return the dataset.json in or beside the labels or the predictions.

    Raises:
        UserError: If there is none.
    """
    places = [labels, labels.resolve().parent, predictions, predictions.resolve().parent]
    for place in places:
        if (place / "dataset.json").is_file():
            return place / "dataset.json"
    raise UserError(
        f"a dataset.json must say which labels there are, but there is none in or beside {labels} "
        f"and {predictions}: name one with --dataset-json."
    )


def _protocol(arguments: argparse.Namespace) -> Protocol:
    from nnunetv2_meddinov3.evaluation.evaluate import Protocol
    from nnunetv2_meddinov3.evaluation.metrics import EmptyMasks

    if not 0 <= arguments.tolerance < float("inf"):
        raise UserError(f"--tolerance must be 0 mm or more, got {arguments.tolerance}.")
    table = {} if arguments.tolerances is None else read_tolerances(arguments.tolerances)
    policy = EmptyMasks(arguments.empty)
    return Protocol(table, arguments.tolerance, policy, arguments.missing)


def read_tolerances(name: str) -> dict[str, float]:
    """Return the tolerances of a shipped table or of a JSON file, label -> mm.

    Raises:
        UserError: If there is none of that name, or it is not as it must be.
    """
    shipped = Path(__file__).parent / "tolerances"
    path = shipped / f"{name}.json" if "." not in name and os.sep not in name else Path(name)
    wanted = '{"liver": 1.5, "2 3": 1} (labels by name or values, in mm)'
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        table = {str(label): float(mm) for label, mm in content.items()}
    except FileNotFoundError as error:
        known = ", ".join(sorted(file.stem for file in shipped.glob("*.json")))
        raise UserError(
            f"--tolerances must be a JSON file or one of {known}, but there is no {name}."
        ) from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} must hold {wanted}, but: {first_line(error)}.") from error
    if wrong := [label for label, mm in table.items() if not 0 <= mm < float("inf")]:
        raise UserError(f"{path} must hold {wanted}, but {wrong[0]} has {table[wrong[0]]}.")
    return table


def _images(folder: Path | None, dataset: RawDataset, cases: list[str]) -> dict[str, Path]:
    """Return case -> image, from the folder given, else from the dataset where they are there."""
    if folder is not None and not folder.is_dir():
        raise UserError(f"--images must be a folder of images, but there is no {folder}.")
    parts = [folder] if folder else [dataset.folder / part for part in ("imagesTs", "imagesTr")]
    found: dict[str, Path] = {}
    for part in parts:
        for case, channels in dataset.images_in(part).items():
            found.setdefault(case, channels[min(channels)])
    return {case: found[case] for case in cases if case in found}


def _print(lines: list, notes: list[str], output: Path) -> None:
    from nnunetv2_meddinov3.evaluation.report import score_rows

    table = score_rows(lines)
    cells = [list(map(str, row)) for row in (table.head, *table.rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for label, *others in cells:
        right = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        print("  ".join([label.ljust(widths[0]), *right]))
    for note in notes:
        print(note)
    print(f"Written: {output / 'cases.csv'}, summary.json, report.html")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="meddinov3 evaluate",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("predictions", type=Path, metavar="PREDICTIONS", help="folder of predicted label maps")
    add("labels", type=Path, metavar="LABELS", help="folder of references, under the same names")
    add(
        "-o",
        dest="output",
        required=True,
        type=Path,
        metavar="OUT",
        help="[REQUIRED] folder for cases.csv, summary.json and report.html",
    )
    add(
        "--dataset-json",
        type=Path,
        metavar="FILE",
        help="names labels and regions. Default: the one in or beside LABELS or PREDICTIONS",
    )
    add("--tolerance", type=float, default=1.0, metavar="MM", help="of both NSDs. Default: 1")
    add(
        "--tolerances",
        metavar="TABLE",
        help="tolerances per label: kits23, or a JSON file, label or values -> mm",
    )
    add(
        "--empty",
        choices=("strict", "kits", "paper"),
        default="strict",
        help="what a label scores that the reference lacks. strict: nothing if the prediction "
        "lacks it too, else 0; kits: 1, else 0; paper: nothing, even if the prediction invents it. "
        "Default: strict",
    )
    add(
        "--missing",
        choices=("error", "skip", "empty"),
        default="error",
        help="what a case without a prediction is. empty: it scores 0. Default: error",
    )
    add(
        "--patients",
        metavar="REGEX",
        help="whose first group is the patient in a case's name. Default: every case is a patient",
    )
    add("--images", type=Path, metavar="DIR", help="images to draw. Default: those of the dataset")
    add(
        "-np",
        dest="processes",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes. Default: as many as there are cores",
    )
    return parser
