"""What a difference between methods is worth: intervals over patients, paired tests, ranks.

A patient counts once, however many cases are theirs: cases of one person are not independent.
Intervals are bootstrap percentiles (Efron), tests are Wilcoxon's signed-rank test on the patients
that both methods have, and p-values are corrected by Holm's step-down procedure.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import stats

LEVEL = 0.95
RESAMPLES = 10_000
MIN_PATIENTS = 6  # Wilcoxon's two-sided p is at least 2 / 2**n, which is 0.0625 for five
_SEED = 0

Table = Float[np.ndarray, "patient label"]
"""Scores of one method, NaN where a patient has none for a label."""


@dataclass(frozen=True)
class Interval:
    """A mean and where it may lie.

    Attributes:
        mean: Over labels of the means over patients.
        low: Lower end of the 95 % interval; NaN where there are too few patients for one.
        high: Upper end.
        patients: How many have a score.
    """

    mean: float
    low: float
    high: float
    patients: int


def mean_over_labels(table: Table) -> float:
    """Return the mean over labels of the means over patients; NaN where nothing is scored."""
    return float(_means(table[None])[0])


def _means(tables: Float[np.ndarray, "sample patient label"]) -> Float[np.ndarray, " sample"]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a mean over nothing
        return np.nanmean(np.nanmean(tables, axis=1), axis=1)


def interval(table: Table, resamples: int = RESAMPLES) -> Interval:
    """Return the mean with its bootstrap interval over patients.

    Args:
        table: Scores; a row without any is no patient.
        resamples: Of the bootstrap.
    """
    table = table[~np.isnan(table).all(axis=1)]
    mean = mean_over_labels(table) if len(table) else math.nan
    low = high = math.nan
    if len(table) > 1:
        low, high = _percentiles(table, _means, resamples)
    return Interval(mean, low, high, len(table))


def _percentiles(
    table: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], resamples: int
) -> tuple[float, float]:
    """Return the bootstrap interval of a statistic of rows, by scipy."""

    def of_indices(indices: np.ndarray, axis: int) -> np.ndarray:
        found = statistic(table[indices.reshape(-1, indices.shape[axis])])
        return found.reshape(indices.shape[:-1])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # all rows are equal
        found = stats.bootstrap(
            (np.arange(len(table)),),
            of_indices,
            n_resamples=resamples,
            batch=max(1, 4_000_000 // table.size),
            confidence_level=LEVEL,
            method="percentile",
            rng=np.random.default_rng(_SEED),
        ).confidence_interval
    return float(found.low), float(found.high)


@dataclass(frozen=True)
class Comparison:
    """Two methods on the patients that both have.

    Attributes:
        first: Name of a method.
        second: Name of the other.
        difference: Mean of first minus second, with its interval.
        p: Of Wilcoxon's signed-rank test, two-sided; NaN for fewer than ``MIN_PATIENTS``.
        p_holm: Corrected for all comparisons made together.
    """

    first: str
    second: str
    difference: Interval
    p: float
    p_holm: float


def compare(
    tables: Mapping[str, Table], pairs: Sequence[tuple[str, str]] | None = None
) -> list[Comparison]:
    """Compare methods in pairs; a patient's score is the mean over their labels.

    Args:
        tables: Method -> scores, all with the same patients and labels in the same order.
        pairs: Which to compare; all by default.

    Raises:
        ValueError: If the tables differ in shape.
    """
    if len({table.shape for table in tables.values()}) > 1:
        raise ValueError("methods must be scored on the same patients and labels")
    pairs = list(itertools.combinations(tables, 2)) if pairs is None else list(pairs)
    found = []
    for first, second in pairs:
        differences = tables[first] - tables[second]
        differences = differences[~np.isnan(differences).all(axis=1)]
        found.append((interval(differences), _wilcoxon(np.nanmean(differences, axis=1))))
    corrected = holm([p for _, p in found])
    return [
        Comparison(*pair, difference, p, p_holm)
        for pair, (difference, p), p_holm in zip(pairs, found, corrected, strict=True)
    ]


def _wilcoxon(differences: Float[np.ndarray, " patient"]) -> float:
    if len(differences) < MIN_PATIENTS:
        return math.nan
    if not np.any(differences):
        return 1.0
    return float(stats.wilcoxon(differences, zero_method="pratt").pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected by Holm (1979); NaN stays and counts as no test."""
    order = sorted((p, at) for at, p in enumerate(p_values) if not math.isnan(p))
    corrected = list(p_values)
    largest = 0.0
    for rank, (p, at) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        corrected[at] = largest
    return corrected


@dataclass(frozen=True)
class Ranks:
    """How sure the order of methods is.

    Attributes:
        methods: Names, best mean first.
        shares: Row i, column j: the share of bootstrap samples of patients in which method i has
            rank j + 1; ties share the better rank.
    """

    methods: list[str]
    shares: Float[np.ndarray, "method rank"]


def rank_stability(
    tables: Mapping[str, Table], *, lower_is_better: bool = False, resamples: int = RESAMPLES
) -> Ranks:
    """Rank methods by their mean on bootstrap samples of the patients.

    Args:
        tables: Method -> scores, all with the same patients and labels in the same order.
        lower_is_better: For distances.
        resamples: Of the bootstrap.
    """
    sign = 1.0 if lower_is_better else -1.0
    methods = sorted(tables, key=lambda name: sign * mean_over_labels(tables[name]))
    scores = np.stack([tables[name] for name in methods])  # (method, patient, label)
    patients = scores.shape[1]
    drawn = np.random.default_rng(_SEED).integers(patients, size=(resamples, patients))
    means = np.stack([_batched_means(table, drawn) for table in scores])
    ranks = stats.rankdata(sign * means, method="min", axis=0).astype(int)
    counts = [np.bincount(row, minlength=len(methods) + 1)[1:] for row in ranks]
    return Ranks(methods, np.stack(counts) / resamples)


def _batched_means(table: Table, drawn: np.ndarray) -> np.ndarray:
    pieces = np.array_split(drawn, max(1, drawn.size * table.shape[1] // 4_000_000))
    return np.concatenate([_means(table[piece]) for piece in pieces])
