"""The jobs of a recipe: what is run for each training, where, and what is done already."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2_meddinov3.benchmark.recipe import (
    ALL,
    PLANS_OF,
    PRETRAINED,
    Budget,
    Dataset,
    Method,
    Pretraining,
    Recipe,
)
from nnunetv2_meddinov3.files import write_text

STATE = "job.json"
OURS = (sys.executable, "-m", "nnunetv2_meddinov3")
"""How ``meddinov3`` begins for a process of its own."""


@dataclass(frozen=True)
class Command:
    """A command and the variables that it gets besides those of this process."""

    arguments: tuple[str, ...]
    variables: dict[str, str]

    def __str__(self) -> str:
        variables = "".join(f"{name}={value} " for name, value in self.variables.items())
        parts = self.arguments
        if parts[: len(OURS)] == OURS:
            parts = ("meddinov3", *parts[len(OURS) :])
        shown = ("python" if part == sys.executable else part for part in parts)
        return variables + " ".join(map(_quoted, shown))


def _quoted(part: str) -> str:
    """Return a word for a shell; variables stay as they are."""
    return part if re.fullmatch(r"[\w@%+=:,./$-]+", part) else shlex.quote(part)


@dataclass(frozen=True)
class Preparation:
    """Planning and preprocessing of a dataset for one configuration."""

    dataset: Dataset
    method: Method

    @property
    def name(self) -> str:
        """Unique within a recipe."""
        return f"{self.dataset.name}__{self.method.plans}__{self.method.configuration}"

    def command(self) -> Command:
        """Return nnU-Net's command."""
        size = {"MEDDINOV3_SIZE": self.method.size} if self.method.size else {}
        if self.method.backbone:
            size["MEDDINOV3_BACKBONE"] = self.method.backbone
        arguments = ["nnUNetv2_plan_and_preprocess", "-d", self.dataset.number]
        arguments += ["-pl", self.method.planner, "-c", self.method.configuration]
        if self.method.plans != PLANS_OF.get(self.method.planner):
            arguments += ["-overwrite_plans_name", self.method.plans]
        return Command(tuple(arguments), size)


@dataclass(frozen=True)
class Weights:
    """Weights that are made of the training images of a dataset; its imagesTs are kept out."""

    dataset: Dataset
    pretraining: Pretraining

    @property
    def name(self) -> str:
        """Unique within a recipe."""
        return f"{self.dataset.name}__{PRETRAINED}"

    def folder(self, out: Path) -> Path:
        """Return where the store and the run go."""
        return out / "prepared" / self.name

    def file(self, out: Path) -> Path:
        """Return the weights."""
        return self.folder(out) / "run" / "stage1" / "teacher.safetensors"

    def commands(self, out: Path, raw: Path) -> list[Command]:
        """Return what makes them; each goes on where it was stopped.

        Args:
            out: Folder of the results.
            raw: The raw dataset.
        """
        store, run = (str(self.folder(out) / name) for name in ("store", "run"))
        curate = [*OURS, "curate", str(raw), "--exclude", str(raw), "--store", store]
        if self.dataset.patients:
            curate += ["--patients", self.dataset.patients]
        pretrain = [*OURS, "pretrain", self.pretraining.config, "--stage", "1", "--store", store]
        pretrain += ["--out", run, *self.pretraining.changes]
        pretrain += self.dataset.pretraining
        return [Command(tuple(curate), {}), Command(tuple(pretrain), {})]


@dataclass(frozen=True)
class Job:
    """One training with its prediction and evaluation.

    Attributes:
        dataset: What is trained on.
        method: What is trained.
        budget: How long.
        fold: Of nnU-Net.
        seed: Of the run.
        cases: Number of training cases; None for all.
        checkpoint: Which checkpoint predicts.
        pretrained: What makes the weights called ``pretrained``; None where the recipe has none.
    """

    dataset: Dataset
    method: Method
    budget: Budget
    fold: int
    seed: int
    cases: int | None
    checkpoint: str
    pretrained: Weights | None = None

    @property
    def name(self) -> str:
        """Unique within a recipe; names its folder."""
        parts = [self.dataset.name, self.method.name, self.budget.name, self.cases_text]
        words = [re.sub(r"\W+", "-", part).strip("-") for part in parts]
        return "__".join([*words, f"fold{self.fold}", f"seed{self.seed}"])

    @property
    def cases_text(self) -> str:
        """``"20"``, or ``"all"``."""
        return ALL if self.cases is None else str(self.cases)

    def folder(self, out: Path) -> Path:
        """Return where its results go."""
        return out / "jobs" / self.name

    def model_folder(self, out: Path) -> Path:
        """Return nnU-Net's folder of the trained model."""
        name = f"{self.method.trainer}__{self.method.plans}__{self.method.configuration}"
        return self.folder(out) / "results" / self.dataset.name / name

    def variables(self, out: Path, epochs: int | None, iterations: int | None) -> dict[str, str]:
        """Return what tells the trainer of its length, size and weights."""
        weights = self.method.weights or ""
        if weights == PRETRAINED and self.pretrained is not None:
            weights = str(self.pretrained.file(out))
        chosen = {
            "MEDDINOV3_EPOCHS": epochs,
            "MEDDINOV3_ITERATIONS": iterations,
            "MEDDINOV3_BACKBONE": self.method.backbone,
            "MEDDINOV3_WEIGHTS": weights.replace("{dataset}", self.dataset.name),
        }
        return {name: str(value) for name, value in chosen.items() if value}

    def fold_text(self, folds: dict[str, int]) -> str:
        """Return the fold of ``splits_final.json`` that has the cases of this job."""
        return str(folds[f"{self.fold}/{self.cases_text}"])


def preparations(recipe: Recipe) -> list[Preparation]:
    """Return what must be planned and preprocessed, each once."""
    found: dict[str, Preparation] = {}
    for dataset in recipe.datasets:
        for method in (m for m in recipe.methods if m.is_trained_on(dataset)):
            preparation = Preparation(dataset, method)
            found.setdefault(preparation.name, preparation)
    return list(found.values())


def weights_to_make(recipe: Recipe) -> list[Weights]:
    """Return the weights that ``pretraining`` makes, for each dataset."""
    made = recipe.pretraining
    return [] if made is None else [Weights(dataset, made) for dataset in recipe.datasets]


def jobs(recipe: Recipe) -> list[Job]:
    """Return all jobs; those of the first budget come first, as others need their times.

    Seeds are the outermost of the loops within a budget, so that a run that is cut short has
    compared all methods.
    """
    return list(_jobs(recipe))


def _jobs(recipe: Recipe) -> Iterator[Job]:
    made = {weights.dataset.name: weights for weights in weights_to_make(recipe)}
    for budget in recipe.budgets:
        for seed in recipe.seeds:
            for dataset in recipe.datasets:
                for fold in recipe.folds:
                    for method in recipe.methods:
                        for cases in _cases(recipe, dataset, method, budget):
                            yield Job(
                                dataset,
                                method,
                                budget,
                                fold,
                                seed,
                                cases,
                                recipe.checkpoint,
                                made.get(dataset.name),
                            )


def _cases(
    recipe: Recipe, dataset: Dataset, method: Method, budget: Budget
) -> Iterator[int | None]:
    """Return the numbers of cases that a method is trained with, None for all of them."""
    if not method.is_trained_on(dataset):
        return
    yield None
    few = recipe.few_cases
    if (
        few is not None
        and method.name in few.methods
        and budget.name in few.budgets
        and (few.datasets is None or dataset.name in few.datasets)
    ):
        yield from few.numbers


def settings(job: Job, recipe: Recipe) -> dict[str, Any]:
    """Return what decides a job's result, as far as the recipe says it."""
    method = job.method.model_dump(exclude={"name", "note", "gpu_hours", "datasets"})
    dataset = job.dataset.model_dump(exclude={"name", "title", "disk_gb", "pretraining"})
    budget = job.budget.model_dump(exclude={"name"})
    common = recipe.model_dump(include={"batch_size", "mirroring", "checkpoint"})
    if job.method.weights == PRETRAINED and recipe.pretraining is not None:
        common["pretraining"] = recipe.pretraining.model_dump()
        common["pretraining"]["changes"] += job.dataset.pretraining
    return {**method, **dataset, **budget, **common}


def read_state(folder: Path) -> dict[str, Any]:
    """Return what is known of a job: ``{}`` before its first run."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def write_state(folder: Path, **state: Any) -> None:
    """Write what is known of a job.

    Raises:
        UserError: If it cannot be written.
    """
    write_text(folder / STATE, f"{json.dumps(state, indent=1)}\n")


def seconds_per_epoch(log: str) -> float | None:
    """Return the median time of an epoch in a training log of nnU-Net's, the first left out.

    Args:
        log: Text of ``training_log_*.txt``.
    """
    times = [float(t) for t in re.findall(r"Epoch time: ([\d.]+) s", log)]
    times = sorted(times[1:] or times)
    return times[len(times) // 2] if times else None
