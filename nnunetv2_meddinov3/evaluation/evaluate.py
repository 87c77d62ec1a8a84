"""Every case and label of a folder of predictions, measured in processes of this machine."""

from __future__ import annotations

import csv
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.evaluation.label_maps import (
    LabelMap,
    check_pair,
    read_label_map,
    reader_for,
)
from nnunetv2_meddinov3.evaluation.metrics import Agreement, EmptyMasks, agreement, monai_distances
from nnunetv2_meddinov3.files import replacing
from nnunetv2_meddinov3.processes import one_thread_each, prepare_worker
from nnunetv2_meddinov3.progress import Progress
from nnunetv2_meddinov3.raw_dataset import RawDataset

MISSING = ("error", "skip", "empty")
_SPACING_TOLERANCE = 0.01  # relative: more is another image, less a rounded header


@dataclass(frozen=True)
class Row:
    """One label of one case: a line of ``cases.csv``.

    Attributes:
        case: Name of the case.
        label: Name of the label or region.
        label_value: Its values, as ``"1"`` or ``"1 2 3"``.
        tolerance: Of both NSDs, in mm.
        scores: What was measured.
    """

    case: str
    label: str
    label_value: str
    tolerance: float
    scores: Agreement

    def cells(self) -> dict[str, str]:
        """Return column -> text, numbers to 9 digits and an empty cell for NaN."""
        scores = {name: _text(value) for name, value in asdict(self.scores).items()}
        return {
            "case": self.case,
            "label": self.label,
            "label_value": self.label_value,
            **{name: value for name, value in scores.items() if name != "empty"},
            "tolerance": _text(self.tolerance),
            "empty": self.scores.empty,
        }


def _text(value: object) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.9g}"
    return str(value)


@dataclass(frozen=True)
class Protocol:
    """How predictions are measured.

    Attributes:
        tolerances: Name of a label, or its values as in ``"1 2 3"`` -> tolerance of both NSDs in
            mm; others have ``tolerance``.
        tolerance: Of the labels that are not in the table.
        policy: What empty masks score.
        missing: What a case without a prediction is: an ``"error"``, left out (``"skip"``) or
            a prediction of nothing (``"empty"``).
    """

    tolerances: Mapping[str, float] = field(default_factory=dict)
    tolerance: float = 1.0
    policy: EmptyMasks = EmptyMasks.STRICT
    missing: str = "error"


@dataclass
class Measured:
    """The result of ``evaluate``.

    Attributes:
        rows: By case, then by the values of the labels.
        notes: Sentences about what a reader of the numbers should know.
        missing: Cases without a prediction.
    """

    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def evaluate(
    predictions: Path,
    labels: Path,
    dataset: RawDataset,
    protocol: Protocol,
    *,
    workers: int = 1,
    stream: TextIO | None = None,
) -> Measured:
    """Measure every case of ``labels`` and every label of a dataset.

    Args:
        predictions: Label maps, one file per case.
        labels: Reference label maps under the same file names.
        dataset: Which labels there are; the voxels of its ignore label count nowhere.
        protocol: How to measure.
        workers: Processes.
        stream: Where progress goes.

    Raises:
        UserError: If a folder holds no label map, a prediction is missing (unless allowed) or has
            no reference, a file cannot be read, or shapes differ.
    """
    monai_distances()  # before any work
    pairs, missing = match_cases(predictions, labels, dataset.ending, protocol.missing)
    _check_tolerances(protocol, dataset)
    job = _Job(dataset, protocol, reader_for(dataset, next(iter(pairs.values()))[1]))
    found: dict[str, _Case] = {}
    with Progress(len(pairs), "cases", title="evaluate", stream=stream) as progress:
        for case, measured in _measure_all(job, pairs, workers):
            found[case] = measured
            progress.advance()
    rows = [row for case in pairs for row in found[case].rows]
    notes = _notes(found)
    if missing and protocol.missing == "empty":
        notes.append(f"Cases without a prediction, counted as empty: {', '.join(missing)}.")
    elif missing:
        notes.append(f"Cases without a prediction, left out: {', '.join(missing)}.")
    return Measured(rows, notes, missing)


def _check_tolerances(protocol: Protocol, dataset: RawDataset) -> None:
    names = {*dataset.labels, *map(_values_text, dataset.labels.values())}
    if unknown := sorted(protocol.tolerances.keys() - names):
        known = ", ".join(f"{name} ({_values_text(v)})" for name, v in dataset.labels.items())
        raise UserError(
            "a table of tolerances must name labels of the dataset, by name or values, but "
            f"{unknown[0]!r} is none of {known}: take another table, or --tolerance."
        )


def _values_text(values: Sequence[int]) -> str:
    return " ".join(map(str, sorted(values)))


def match_cases(
    predictions: Path, labels: Path, ending: str, missing: str
) -> tuple[dict[str, tuple[Path | None, Path]], list[str]]:
    """Return case -> files of prediction (None: missing) and reference, and the missing cases.

    Raises:
        UserError: If a folder holds no label map, or cases do not match.
    """
    sides = []
    for folder, what in ((predictions, "predictions"), (labels, "reference label maps")):
        if not folder.is_dir():
            raise UserError(f"{folder} must be a folder with {what}, but there is none.")
        files = {p.name.removesuffix(ending): p for p in sorted(folder.glob(f"*{ending}"))}
        if not files:
            raise UserError(
                f"{folder} must hold {what}, but there is no *{ending} file: give the folder that "
                "holds the files themselves."
            )
        sides.append(files)
    predicted, expected = sides
    if surplus := sorted(predicted.keys() - expected.keys()):
        raise UserError(
            f"every prediction needs its reference, but {labels} lacks {surplus[0]}{ending}"
            f"{_and_more(surplus)}: give the labels of the predicted cases."
        )
    absent = sorted(expected.keys() - predicted.keys())
    if absent and missing == "error":
        raise UserError(
            f"every case must have a prediction, but {predictions} lacks {absent[0]}{ending}"
            f"{_and_more(absent)}: predict again, or say --missing empty (they score 0) or "
            "--missing skip (they are left out)."
        )
    cases = [case for case in expected if case in predicted or missing == "empty"]
    return {case: (predicted.get(case), expected[case]) for case in cases}, absent


def _and_more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


@dataclass(frozen=True)
class _Job:
    """What every process needs."""

    dataset: RawDataset
    protocol: Protocol
    reader: Any


@dataclass(frozen=True)
class _Case:
    """One case: its rows, and what was odd about it."""

    rows: list[Row]
    stray_values: list[int]
    is_spaced_otherwise: bool


def _measure_all(
    job: _Job, pairs: Mapping[str, tuple[Path | None, Path]], workers: int
) -> Iterator[tuple[str, _Case]]:
    if workers <= 1 or len(pairs) == 1:
        for case, files in pairs.items():
            yield case, measure_case(job, case, *files)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(pairs)), spawn, prepare_worker) as pool:
        with one_thread_each():  # processes start with the first tasks
            futures = {pool.submit(measure_case, job, c, *files): c for c, files in pairs.items()}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "a process that measured a case was ended, out of memory perhaps: use fewer "
                "processes (-np 1)."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def measure_case(job: _Job, case: str, prediction_file: Path | None, reference_file: Path) -> _Case:
    """Measure all labels of a case.

    Raises:
        UserError: If a file cannot be read or the shapes differ.
    """
    reference = read_label_map(job.reader, reference_file)
    if prediction_file is None:
        prediction = LabelMap(np.zeros_like(reference.array), reference.spacing)
    else:
        prediction = read_label_map(job.reader, prediction_file)
        check_pair(prediction, reference, (prediction_file, reference_file))
    dataset, protocol = job.dataset, job.protocol
    known = {0, *(value for values in dataset.labels.values() for value in values)}
    if dataset.ignore is not None:
        known.add(dataset.ignore)
        prediction.array[reference.array == dataset.ignore] = 0
    values = set(np.unique(prediction.array).tolist()) | set(np.unique(reference.array).tolist())
    rows = []
    for name, wanted in sorted(dataset.labels.items(), key=lambda item: sorted(item[1])):
        named = _values_text(wanted)
        by_value = protocol.tolerances.get(named, protocol.tolerance)
        tolerance = protocol.tolerances.get(name, by_value)
        masks, extent = _masks(prediction.array, reference.array, wanted)
        scores = agreement(*masks, reference.spacing, tolerance, protocol.policy, extent)
        rows.append(Row(case, name, named, tolerance, scores))
    is_other = not np.allclose(prediction.spacing, reference.spacing, rtol=_SPACING_TOLERANCE)
    return _Case(rows, sorted(values - known), is_other)


def _masks(
    prediction: np.ndarray, reference: np.ndarray, values: Sequence[int]
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[int, ...]]:
    """Return both masks of a label, cut to where one of them is, and the shape before."""
    masks = [np.isin(array, values) for array in (prediction, reference)]
    both = masks[0] | masks[1]
    box = []
    for axis in range(both.ndim):
        others = tuple(a for a in range(both.ndim) if a != axis)
        at = np.flatnonzero(both.any(axis=others))
        box.append(slice(int(at[0]), int(at[-1]) + 1) if len(at) else slice(0, 1))
    return (masks[0][tuple(box)], masks[1][tuple(box)]), both.shape


def _notes(cases: Mapping[str, _Case]) -> list[str]:
    notes = []
    stray = {case: found.stray_values for case, found in cases.items() if found.stray_values}
    if stray:
        values = sorted({value for found in stray.values() for value in found})
        notes.append(
            f"Values that dataset.json does not name, counted as background: "
            f"{', '.join(map(str, values))} (in {len(stray)} of {len(cases)} cases)."
        )
    if other := [case for case, found in cases.items() if found.is_spaced_otherwise]:
        notes.append(
            "Predictions that state another voxel spacing than their reference, whose spacing was "
            f"used: {', '.join(other)}."
        )
    return notes


def write_cases(path: Path, rows: Sequence[Row]) -> None:
    """Write ``cases.csv``.

    Raises:
        UserError: If it cannot be written.
    """
    with replacing(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, rows[0].cells(), lineterminator="\n")
        table.writeheader()
        table.writerows(row.cells() for row in rows)
