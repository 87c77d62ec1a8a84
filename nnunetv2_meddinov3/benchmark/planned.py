"""``meddinov3 benchmark plan``: the commands of a recipe, and what they take."""

from __future__ import annotations

import os
import statistics
from collections import Counter
from pathlib import Path

from nnunetv2_meddinov3.benchmark.jobs import (
    Job,
    jobs,
    preparations,
    read_state,
    weights_to_make,
)
from nnunetv2_meddinov3.benchmark.recipe import ALL, Dataset, Recipe


def plan_lines(recipe: Recipe, out: Path, device: str) -> list[str]:
    """Return the lines of a plan: what is prepared, what is trained, hours and disk space."""
    every = jobs(recipe)
    states = Counter(_state(job, out) for job in every)
    lines = [recipe.title or recipe.name, "", "Prepare:"]
    lines += [f"  {preparation.command()}" for preparation in preparations(recipe)]
    for made in weights_to_make(recipe):
        lines += [f"  {command}" for command in made.commands(out, _raw(made.dataset))]
    lines += ["", f"Train, predict and measure ({len(every)} jobs):"]
    lines += [f"  {number:4d}  {_line(job, out, device)}" for number, job in enumerate(every)]
    lines += ["", "Done: {done}, failed: {failed}, to do: {open}.".format(**_counts(states))]
    lines += _hours(recipe, every, out)
    disk = [f"{d.name} {d.disk_gb:g} GB" for d in recipe.datasets if d.disk_gb]
    if disk:
        lines.append(f"Preprocessed data, estimated: {', '.join(disk)}.")
    return lines


def _raw(dataset: Dataset) -> Path:
    return Path(os.environ.get("nnUNet_raw") or "$nnUNet_raw", dataset.name)


def _counts(states: Counter[str]) -> dict[str, int]:
    return {name: states[name] for name in ("done", "failed", "open")}


def _state(job: Job, out: Path) -> str:
    state = read_state(job.folder(out))
    return "done" if state.get("done") else "failed" if "failed" in state else "open"


def _line(job: Job, out: Path, device: str) -> str:
    """Return a training's command; the fold of a job with few cases is made by ``run``."""
    budget = job.budget
    variables = job.variables(out, budget.epochs, budget.iterations)
    told = "".join(f"{name}={value} " for name, value in variables.items())
    minutes = f"  # for {budget.minutes:g} minutes" if budget.minutes else ""
    few = "" if job.cases_text == ALL else f"  # {job.cases} cases"
    fold = str(job.fold) if not few else f"{job.fold}/{job.cases}"
    changes = "".join(f"  # {name} {value:g}" for name, value in job.method.changes.items())
    return (
        f"{told}nnUNetv2_train {job.dataset.number} {job.method.configuration} {fold} "
        f"-tr {job.method.trainer} -p {job.method.plans} -device {device}  "
        f"# seed {job.seed}{minutes}{few}{changes}"
    )


def _hours(recipe: Recipe, every: list[Job], out: Path) -> list[str]:
    """Return what is left to train, from finished jobs of the same kind, else as estimated."""
    measured: dict[tuple[str, str, str], list[float]] = {}
    for job in every:
        state = read_state(job.folder(out))
        if state.get("done") and state.get("training_seconds"):
            measured.setdefault(_kind(job), []).append(state["training_seconds"] / 3600)
    total, unknown = 0.0, Counter[str]()
    for job in every:
        if _state(job, out) == "done":
            continue
        if _kind(job) in measured:
            total += statistics.median(measured[_kind(job)])
        elif job.budget.minutes:
            total += job.budget.minutes / 60
        elif job.method.gpu_hours is not None:
            total += job.method.gpu_hours
        else:
            unknown[job.method.name] += 1
    lines = [f"Training still takes about {total:.1f} hours on one device"]
    lines[0] += " (measured in finished jobs)." if measured else ", as the recipe estimates."
    if unknown:
        lines.append(
            "Without an estimate until one is done: "
            + ", ".join(f"{name} ({n} jobs)" for name, n in unknown.items())
            + "."
        )
    return lines


def _kind(job: Job) -> tuple[str, str, str]:
    return job.dataset.name, job.method.name, job.budget.name
