"""The page of a comparison: our numbers, their intervals and tests, and the published ones."""

from __future__ import annotations

import io
import math
import re
import statistics
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure  # not pyplot: no display, no global state

from nnunetv2_meddinov3.benchmark.recipe import ALL, Method, Recipe
from nnunetv2_meddinov3.benchmark.results import (
    SCORES,
    Results,
    Scores,
    nanmean,
    scores,
    settings,
)
from nnunetv2_meddinov3.evaluation.figures import TITLES, label_plot
from nnunetv2_meddinov3.evaluation.metrics import LOWER_IS_BETTER
from nnunetv2_meddinov3.evaluation.report import in_words
from nnunetv2_meddinov3.evaluation.statistics import (
    MIN_PATIENTS,
    compare,
    interval,
    rank_stability,
)
from nnunetv2_meddinov3.evaluation.summary import OVER_LABELS
from nnunetv2_meddinov3.files import replacing
from nnunetv2_meddinov3.html import Block, Items, Picture, Section, Table, Text, write_page

_WORST = 5  # patients that are shown
_HOW = (
    "Means over labels of the means over patients; a patient's score is the mean over seeds. In "
    "brackets 95 % bootstrap intervals over patients: they say how the mean depends on who was "
    "tested, not how it depends on the training. The spread over seeds (standard deviation of the "
    "runs' means) says the latter."
)


def write_comparison(path: Path, recipe: Recipe, results: Results) -> None:
    """Write one HTML file that needs no other, and its figures beside it, in ``figures``.

    Raises:
        UserError: If one cannot be written.
    """
    titles = {d.name: d.title or d.name for d in recipe.datasets}
    sections, figures = [], {}
    for dataset, budget, cases in settings(recipe, results):
        share = "all training cases" if cases == ALL else f"{cases} training cases"
        title = f"{titles[dataset]}, {budget}, {share}"
        found = {m: scores(recipe, results, dataset, budget, cases, m) for m in SCORES}
        figure = figures[title] = _plot(found["dice"])
        setting = dataset, budget, cases
        sections.append(Section(title, _setting(recipe, results, setting, found, figure)))
    if recipe.few_cases:
        pictures = []
        for dataset, title in titles.items():
            if png := few_cases_plot(recipe, results, dataset, title):
                figures[f"{title}, few cases"] = png
                pictures.append(Picture(png, "Dice by number of training cases"))
        sections.append(Section("Few cases", pictures))
    sections.append(Section("Protocol", _protocol(recipe, results)))
    blocks: list[Block] = [Text(_HOW, "note")]
    for title, png in figures.items():
        name = re.sub(r"\W+", "_", title).strip("_").lower()
        with replacing(path.parent / "figures" / f"{name}.png") as part:
            part.write_bytes(png)
    write_page(path, recipe.title or recipe.name, blocks, sections)


def _setting(
    recipe: Recipe,
    results: Results,
    setting: tuple[str, str, str],
    found: dict[str, Scores],
    figure: bytes,
) -> list[Block]:
    dice = found["dice"]
    blocks: list[Block] = [_table(recipe, results, setting, found)]
    if len(dice.tables) > 1:
        blocks += [_tests(recipe, dice, "dice"), *_ranks(dice)]
    blocks.append(Picture(figure, "Mean Dice of each label and method, with intervals"))
    blocks += _worst(dice)
    return blocks


def _worst(found: Scores) -> list[Block]:
    """Show the patients that all methods together do worst on."""
    means = {method: nanmean(table.T) for method, table in found.tables.items()}
    overall = nanmean(np.stack(list(means.values())))
    worst = [n for n in np.argsort(overall) if not np.isnan(overall[n])][:_WORST]
    rows = [[found.patients[n], *(_score(mean[n]) for mean in means.values())] for n in worst]
    said = "The worst patients, mean Dice over labels and seeds. The report of each job, "
    said += "jobs/*/evaluation/report.html, shows its own with an error map."
    return [Text(said), Table(["patient", *means], rows)]


def _score(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _table(
    recipe: Recipe, results: Results, setting: tuple[str, str, str], found: dict[str, Scores]
) -> Table:
    published = recipe.published.get(setting[0], {}) if setting[2] == ALL else {}
    head = ["method", *(TITLES[m] for m in SCORES), "Dice, spread over seeds", "seeds"]
    head += ["epochs", "minutes of training"]
    head += ["published DSC", "published NSD"] if published else []
    rows = []
    for method in found["dice"].tables:
        means = found["dice"].seeds[method]
        spread = f"{statistics.stdev(means):.3f}" if len(means) > 1 else "-"
        cells = [in_words(interval(found[m].tables[method])) for m in SCORES]
        rows.append([method, *cells, spread, len(means), *_time(results, setting, method)])
        if published:
            there = published.get(method, {})
            rows[-1] += [there.get("dsc", "-"), there.get("nsd", "-")]
    absent = [name for name in published if name not in found["dice"].tables]
    for name in absent:
        empty = ["-"] * (len(head) - 3)
        there = published[name]
        rows.append([f"{name} (published)", *empty, there.get("dsc", "-"), there.get("nsd", "-")])
    return Table(head, rows)


def _time(results: Results, setting: tuple[str, str, str], method: str) -> list[str]:
    """Return the epochs and the minutes of training, medians over runs."""
    runs = [
        row
        for row in results.runs
        if (row["dataset"], row["budget"], row["cases"]) == setting and row["method"] == method
    ]
    epochs = [int(row["epochs"]) for row in runs if row["epochs"]]
    minutes = [
        float(row["seconds_per_epoch"]) * int(row["epochs"]) / 60
        for row in runs
        if row["seconds_per_epoch"] and row["epochs"]
    ]
    return [
        f"{statistics.median(epochs):g}" if epochs else "-",
        f"{statistics.median(minutes):.1f}" if minutes else "-",
    ]


def _tests(recipe: Recipe, found: Scores, metric: str) -> Table:
    methods = list(found.tables)
    reference = recipe.reference if recipe.reference in methods else None
    pairs = [(m, reference) for m in methods if m != reference] if reference else None
    rows = [
        [c.first, c.second, in_words(c.difference), _p(c.p), _p(c.p_holm)]
        for c in compare(found.tables, pairs)
    ]
    head = ["method", "against", f"difference of {TITLES[metric]}", "p (Wilcoxon)", "p (Holm)"]
    return Table(head, rows)


def _p(value: float) -> str:
    if math.isnan(value):
        return f"- (below {MIN_PATIENTS} patients)"
    return f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"


def _ranks(found: Scores) -> list[Block]:
    ranks = rank_stability(found.tables, lower_is_better="dice" in LOWER_IS_BETTER)
    head = ["method", *(f"rank {n + 1}" for n in range(len(ranks.methods)))]
    rows = [
        [method, *(f"{100 * share:.0f} %" for share in shares)]
        for method, shares in zip(ranks.methods, ranks.shares, strict=True)
    ]
    return [
        Text("How often a method has a rank (Dice) when patients are drawn anew:"),
        Table(head, rows),
    ]


def _plot(found: Scores) -> bytes:
    methods = {
        method: {
            **{label: interval(table[:, [n]]) for n, label in enumerate(found.labels)},
            OVER_LABELS: interval(table),
        }
        for method, table in found.tables.items()
    }
    return label_plot(methods, [*found.labels, OVER_LABELS], "dice")


def few_cases_plot(recipe: Recipe, results: Results, dataset: str, title: str) -> bytes | None:
    """Draw the Dice of methods against the number of training cases; None if there is one number.

    Returns:
        A PNG.
    """
    assert recipe.few_cases is not None
    budget = recipe.few_cases.budgets[0]
    numbers = [s for s in settings(recipe, results) if s[:2] == (dataset, budget)]
    shown = sorted((s[2] for s in numbers), key=lambda n: (n == ALL, n.zfill(6)))
    if len(shown) < 2:
        return None
    figure = Figure(figsize=(6.5, 4), layout="constrained", facecolor="white")
    axis = figure.subplots()
    for number, method in enumerate(recipe.few_cases.methods):
        points = []
        for at, cases in enumerate(shown):
            found = scores(recipe, results, dataset, budget, cases, "dice")
            if method in found.tables:
                points.append((at, interval(found.tables[method])))
        places = [at + 0.06 * number for at, _ in points]
        sides = [[i.mean - i.low for _, i in points], [i.high - i.mean for _, i in points]]
        means = [i.mean for _, i in points]
        axis.errorbar(places, means, yerr=sides, marker="o", ms=4, capsize=2, label=method)
    axis.set_xticks(range(len(shown)), shown)
    axis.set_xlabel("training cases")
    axis.set_ylabel("Dice, mean over patients with 95 % interval")
    axis.set_title(f"{title}, {budget}", fontsize=10)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(frameon=False)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()


def _note(method: Method) -> str:
    """Return what a reader should know of a method."""
    changes = ", ".join(f"{name} {value:g}" for name, value in method.changes.items())
    return "; ".join(part for part in (method.note.rstrip("."), changes) if part)


def _protocol(recipe: Recipe, results: Results) -> list[Block]:
    said = {
        "final": "The last checkpoint of each training predicts.",
        "best": "The checkpoint that did best on the validation cases of its fold predicts: scores "
        "on those cases are too good.",
    }
    where = [
        f"{d.title or d.name}: measured on "
        + ("the test cases" if d.evaluate_on == "test" else "the validation cases of the fold")
        + f", NSD at {d.tolerance:g} mm"
        + (f" ({d.tolerances})" if d.tolerances else "")
        + f", empty masks: {d.empty}."
        for d in recipe.datasets
    ]
    folds = {(row["dataset"], row["fold"]) for row in results.runs}
    once = f"Folds: {', '.join(sorted({fold for _, fold in folds}))}."
    notes = [f"{m.name}: {note}" for m in recipe.methods if (note := _note(m))]
    blocks: list[Block] = [Items([said[recipe.checkpoint], *where, once, *notes])]
    if recipe.published:
        blocks += [
            Text("Where the published numbers were made in another way:"),
            Items(recipe.differences, "note"),
        ]
    return blocks
