"""What the jobs of a recipe left: a line per case and label, a line per run."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnunetv2_meddinov3.benchmark.jobs import Job, jobs, read_state
from nnunetv2_meddinov3.benchmark.recipe import ALL, Recipe
from nnunetv2_meddinov3.case_names import patient_in, patient_pattern
from nnunetv2_meddinov3.errors import UserError, first_line
from nnunetv2_meddinov3.files import replacing

CASES, RUNS = "cases.csv", "runs.csv"
SCORES = ("dice", "nsd_voxel", "nsd_surface", "hd95")
_KEYS = ("dataset", "method", "budget", "cases", "fold", "seed")
_CASE_COLUMNS = (*_KEYS, "case", "label", "label_value", *SCORES, "volume_error")
_RUN_COLUMNS = (*_KEYS, "epochs", "iterations", "seconds_per_epoch")


@dataclass(frozen=True)
class Results:
    """Lines of both tables, as read.

    Attributes:
        cases: A line per run, case and label.
        runs: A line per finished run.
    """

    cases: list[dict[str, str]]
    runs: list[dict[str, str]]


def gather(recipe: Recipe, out: Path) -> Results:
    """Read what the finished jobs of a recipe left.

    Raises:
        UserError: If none is finished, or a file cannot be read.
    """
    cases, runs = [], []
    for job in jobs(recipe):
        folder = job.folder(out)
        state = read_state(folder)
        if not state.get("done"):
            continue
        keys = _keys(job)
        for row in _read(folder / "evaluation" / CASES):
            cases.append(keys | {name: row[name] for name in _CASE_COLUMNS if name in row})
        about = {name: str(state.get(name) or "") for name in _RUN_COLUMNS if name not in keys}
        runs.append(keys | about)
    if not runs:
        raise UserError(
            f"{out} must hold finished jobs of {recipe.name}, but holds none: run "
            "`meddinov3 benchmark run` first."
        )
    return _checked(Results(cases, runs))


def _keys(job: Job) -> dict[str, str]:
    values = (job.dataset.name, job.method.name, job.budget.name, job.cases_text)
    return dict(zip(_KEYS, (*values, str(job.fold), str(job.seed)), strict=True))


def write_results(folder: Path, results: Results) -> None:
    """Write both tables, which ``read_results`` reads.

    Raises:
        UserError: If they cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / CASES, _CASE_COLUMNS, results.cases)
    _write(folder / RUNS, _RUN_COLUMNS, results.runs)


def read_results(folder: Path) -> Results:
    """Read both tables.

    Raises:
        UserError: If one cannot be read.
    """
    return _checked(Results(_read(folder / CASES), _read(folder / RUNS)))


def _checked(results: Results) -> Results:
    """Return results if all runs of a dataset's fold measured the same cases.

    Raises:
        UserError: If one has others: its mean would be that of other patients.
    """
    from nnunetv2_meddinov3.datasets.convert import named

    found: dict[tuple[str, str], dict[tuple[str, ...], set[str]]] = {}
    for row in results.cases:
        runs = found.setdefault((row["dataset"], row["fold"]), {})
        runs.setdefault(tuple(row[key] for key in _KEYS), set()).add(row["case"])
    for (dataset, fold), runs in found.items():
        every = set().union(*runs.values())
        for run, cases in runs.items():
            if missing := sorted(every - cases):
                raise UserError(
                    f"all runs on fold {fold} of {dataset} must measure the same {len(every)} "
                    f"cases, but {' '.join(run[1:4])} of seed {run[5]} lacks {named(missing)}: "
                    "remove its folder in jobs/ and run again."
                )
    return results


def _write(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, str]]) -> None:
    with replacing(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def _read(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} must be a readable table: {first_line(error)}.") from error


@dataclass(frozen=True)
class Scores:
    """One metric of one setting (dataset, budget, number of cases).

    Attributes:
        tables: Method -> (patient, label), means over seeds and over a patient's cases.
        seeds: Method -> mean over patients and labels of each seed.
        labels: Of the columns.
        patients: Of the rows.
    """

    tables: dict[str, np.ndarray]
    seeds: dict[str, list[float]]
    labels: list[str]
    patients: list[str]


def scores(
    recipe: Recipe, results: Results, dataset: str, budget: str, cases: str, metric: str
) -> Scores:
    """Return a metric of all methods of a setting, all with the same patients and labels.

    Patients that only some methods have are kept, with NaN in the others.

    Raises:
        UserError: If ``patients`` of the recipe finds none in a case's name.
    """
    (given,) = (d for d in recipe.datasets if d.name == dataset)
    pattern = patient_pattern(given.patients) if given.patients else None
    setting = {"dataset": dataset, "budget": budget, "cases": cases}
    rows = [row for row in results.cases if all(row[k] == v for k, v in setting.items())]
    labels = list(dict.fromkeys(row["label"] for row in rows))
    patients = sorted({patient_in(row["case"], pattern) for row in rows})
    methods = [m.name for m in recipe.methods if any(row["method"] == m.name for row in rows)]
    tables, seeds = {}, {}
    for method in methods:
        own = [row for row in rows if row["method"] == method]
        per_seed = []
        for run in sorted({(row["seed"]) for row in own}):
            found = np.full((len(patients), len(labels)), np.nan)
            values: dict[tuple[int, int], list[float]] = {}
            for row in own:
                if row["seed"] == run and row[metric]:
                    place = patients.index(patient_in(row["case"], pattern))
                    key = place, labels.index(row["label"])
                    values.setdefault(key, []).append(float(row[metric]))
            for key, numbers in values.items():
                found[key] = sum(numbers) / len(numbers)
            per_seed.append(found)
        tables[method] = nanmean(np.stack(per_seed))
        seeds[method] = [float(nanmean(nanmean(t)[None].T)[0]) for t in per_seed]
    return Scores(tables, seeds, labels, patients)


def nanmean(stack: np.ndarray) -> np.ndarray:
    """Return the mean over the first axis, NaN left out; NaN where there is nothing else."""
    known = ~np.isnan(stack)
    with np.errstate(invalid="ignore"):
        return np.where(known, stack, 0).sum(axis=0) / known.sum(axis=0)


def settings(recipe: Recipe, results: Results) -> list[tuple[str, str, str]]:
    """Return (dataset, budget, cases) of all results, all cases first."""
    found = {(row["dataset"], row["budget"], row["cases"]) for row in results.runs}
    datasets, budgets = ([x.name for x in y] for y in (recipe.datasets, recipe.budgets))
    return sorted(
        found,
        key=lambda s: (datasets.index(s[0]), budgets.index(s[1]), s[2] != ALL, s[2].zfill(6)),
    )
