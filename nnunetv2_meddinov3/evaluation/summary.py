"""The numbers of one evaluation, per label and over labels: ``summary.json``."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nnunetv2_meddinov3.case_names import patient_in
from nnunetv2_meddinov3.evaluation.evaluate import Row
from nnunetv2_meddinov3.evaluation.metrics import METRICS
from nnunetv2_meddinov3.evaluation.statistics import Interval, Table, interval

OVER_LABELS = "mean over labels"


@dataclass(frozen=True)
class Line:
    """One label, or the mean over labels: metric -> mean and interval over patients."""

    label: str
    label_value: str
    metrics: dict[str, Interval]


def patients_of(rows: Sequence[Row], pattern: re.Pattern[str] | None = None) -> list[str]:
    """Return the patients of rows, in order of first appearance.

    Raises:
        UserError: If the pattern finds none in a case's name.
    """
    return list(dict.fromkeys(patient_in(row.case, pattern) for row in rows))


def score_table(
    rows: Sequence[Row], metric: str, pattern: re.Pattern[str] | None = None
) -> tuple[Table, list[str], list[str]]:
    """Return a metric as (patient, label), with the names of both; a patient's cases are averaged.

    The error of a volume counts without its sign.

    Raises:
        UserError: If the pattern finds no patient in a case's name.
    """
    patients = patients_of(rows, pattern)
    labels = list(dict.fromkeys(row.label for row in rows))
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        value = getattr(row.scores, metric)
        value = abs(value) if metric == "volume_error" else value
        if not math.isnan(value):
            found.setdefault((patient_in(row.case, pattern), row.label), []).append(value)
    table = np.full((len(patients), len(labels)), np.nan)
    for at, patient in enumerate(patients):
        for column, label in enumerate(labels):
            if values := found.get((patient, label)):
                table[at, column] = sum(values) / len(values)
    return table, patients, labels


def summarise(rows: Sequence[Row], pattern: re.Pattern[str] | None = None) -> list[Line]:
    """Return a line per label, by its values, and one over labels.

    Raises:
        UserError: If the pattern finds no patient in a case's name.
    """
    tables = {metric: score_table(rows, metric, pattern) for metric in METRICS}
    labels = tables[METRICS[0]][2]
    values = {row.label: row.label_value for row in rows}
    lines = [
        Line(
            label,
            values[label],
            {name: interval(table[:, [column]]) for name, (table, *_) in tables.items()},
        )
        for column, label in enumerate(labels)
    ]
    over = {name: interval(table) for name, (table, *_) in tables.items()}
    return [*lines, Line(OVER_LABELS, "", over)]


def summary_json(lines: Sequence[Line]) -> dict[str, Any]:
    """Return lines as JSON holds them: NaN is null."""
    return {
        line.label: {
            **({"values": [int(v) for v in line.label_value.split()]} if line.label_value else {}),
            **{metric: _known(asdict(found)) for metric, found in line.metrics.items()},
        }
        for line in lines
    }


def _known(numbers: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in numbers.items()}
