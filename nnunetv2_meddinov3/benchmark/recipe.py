"""A recipe: datasets x methods x folds x seeds x budgets, as a YAML file."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nnunetv2_meddinov3.errors import UserError, first_line
from nnunetv2_meddinov3.invalid import first_sentence

SHIPPED = Path(__file__).parent / "recipes"
ALL = "all"
PRETRAINED = "pretrained"
PLANS_OF = {"MedDINOv3Planner": "nnUNetMedDINOv3Plans", "ExperimentPlanner": "nnUNetPlans"}
"""Planner -> name of its plans where no other is given."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Dataset(_Section):
    """A raw dataset of nnU-Net.

    Attributes:
        name: Its folder in nnUNet_raw.
        title: For the report.
        evaluate_on: ``"test"`` (imagesTs and labelsTs) or ``"validation"`` (that of the fold).
        patients: Regular expression for the patient in a case's name.
        splits: Whether ``splits_final.json`` beside dataset.json replaces nnU-Net's random folds.
        tolerance: Of both NSDs, in mm.
        tolerances: Table of tolerances per label, as ``meddinov3 evaluate --tolerances``.
        empty: Policy of ``meddinov3 evaluate --empty``.
        pretraining: ``key=value`` and options of ``pretrain`` for this dataset, after those of the
            recipe's ``pretraining``.
        disk_gb: Preprocessed data at the largest configuration, an estimate.
    """

    name: str = Field(pattern=r"^Dataset\d{3,4}_.+$")
    title: str = ""
    evaluate_on: Literal["test", "validation"] = "validation"
    patients: str | None = None
    splits: bool = False
    tolerance: float = Field(1.0, ge=0)
    tolerances: str | None = None
    empty: Literal["strict", "kits", "paper"] = "strict"
    pretraining: list[str] = Field(default_factory=list)
    disk_gb: float | None = None

    @property
    def number(self) -> str:
        """The dataset's number, as nnU-Net's commands take it."""
        return str(int(self.name[len("Dataset") :].partition("_")[0]))


class Method(_Section):
    """What is trained.

    Attributes:
        name: For tables; unique.
        trainer: Name of a trainer class.
        configuration: ``2d`` or ``2d_N``.
        planner: nnU-Net's ``-pl``.
        plans: Name of the plans that it writes.
        weights: ``MEDDINOV3_WEIGHTS``; a relative path is taken from the recipe's folder. With
            ``{dataset}`` in it, each dataset has its own. ``pretrained`` are those that the
            recipe's ``pretraining`` makes.
        backbone: ``MEDDINOV3_BACKBONE``.
        datasets: Names of those that it is trained on; None for all.
        changes: Numbers and switches of the trainer's class to change in training, such as
            ``vit_lr: 1.0e-3``, for ablations.
        gpu_hours: Of one training, an estimate.
        note: For the report.
    """

    name: str
    trainer: str
    configuration: str = Field("2d_896", pattern=r"^2d(_\d+)?$")
    planner: str = "MedDINOv3Planner"
    plans: str = "nnUNetMedDINOv3Plans"
    weights: str | None = None
    backbone: str | None = None
    datasets: list[str] | None = None
    changes: dict[str, bool | int | float] = Field(default_factory=dict)
    gpu_hours: float | None = None
    note: str = ""

    def is_trained_on(self, dataset: Dataset) -> bool:
        """Whether a dataset is one of its own."""
        return self.datasets is None or dataset.name in self.datasets

    @property
    def size(self) -> str | None:
        """N of ``2d_N``."""
        return self.configuration.partition("_")[2] or None


class Budget(_Section):
    """How long is trained: epochs and iterations, or minutes, or as the trainers say (neither).

    Attributes:
        name: For tables; unique.
        epochs: ``MEDDINOV3_EPOCHS``.
        iterations: ``MEDDINOV3_ITERATIONS``, per epoch.
        minutes: Of training on this machine: as many epochs as the time per epoch, measured in the
            jobs of the recipe's first budget, gives; that one must have epochs and iterations.
    """

    name: str
    epochs: int | None = Field(None, ge=1)
    iterations: int | None = Field(None, ge=1)
    minutes: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _one_of_them(self) -> Budget:
        if self.minutes is not None and (self.epochs is not None or self.iterations is not None):
            raise UserError("a budget must have minutes, or epochs and iterations, not both.")
        return self


_AS_PUBLISHED = Budget.model_validate({"name": "as published"})


class FewCases(_Section):
    """Trainings on a part of the cases.

    Attributes:
        numbers: Of training cases.
        methods: Names.
        budgets: Names.
        datasets: Names; None for all.
    """

    numbers: list[int] = Field(min_length=1)
    methods: list[str]
    budgets: list[str]
    datasets: list[str] | None = None


class Pretraining(_Section):
    """Weights made of each dataset's own training images: ``meddinov3 curate`` and ``pretrain``.

    Attributes:
        config: What ``pretrain`` takes, with one stage.
        changes: ``key=value`` and options of ``pretrain``.
    """

    config: str
    changes: list[str] = Field(default_factory=list)


class Recipe(_Section):
    """A comparison.

    Attributes:
        name: Of the recipe.
        title: For the report.
        datasets: What is trained on.
        methods: What is trained.
        budgets: How long.
        folds: nnU-Net's.
        seeds: Seeds of the runs.
        few_cases: Trainings on fewer cases.
        pretraining: How weights are made that methods call ``pretrained``.
        batch_size: Slices in a batch, in place of the planned number; the plans then need a name of
            their own (``plans`` of the methods).
        mirroring: Whether prediction averages mirrored images, as nnU-Net's default does.
        checkpoint: Which checkpoint predicts. ``best`` is chosen on the validation cases of the
            fold; the table says so.
        reference: Method that the others are compared with.
        published: Dataset -> method -> metric -> a published number in per cent.
        differences: Where the protocol of the published numbers is another one.
    """

    name: str
    title: str = ""
    datasets: list[Dataset] = Field(min_length=1)
    methods: list[Method] = Field(min_length=1)
    budgets: list[Budget] = Field(default_factory=lambda: [_AS_PUBLISHED], min_length=1)
    folds: list[int] = Field(default_factory=lambda: [0], min_length=1)
    seeds: list[int] = Field(default_factory=lambda: [0], min_length=1)
    few_cases: FewCases | None = None
    pretraining: Pretraining | None = None
    batch_size: int | None = Field(None, ge=1)
    mirroring: bool = True
    checkpoint: Literal["final", "best"] = "final"
    reference: str | None = None
    published: dict[str, dict[str, dict[str, float]]] = Field(default_factory=dict)
    differences: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _names_fit(self) -> Recipe:
        for what, names in (
            ("datasets", [d.name for d in self.datasets]),
            ("methods", [m.name for m in self.methods]),
            ("budgets", [b.name for b in self.budgets]),
        ):
            twice = [name for name in names if names.count(name) > 1]
            if twice:
                raise UserError(
                    f"a recipe must have {what} of different names, but {twice[0]!r} stands twice."
                )
        methods = [m.name for m in self.methods]
        asked = [self.reference] if self.reference else []
        asked += self.few_cases.methods if self.few_cases else []
        asked += [name for rows in self.published.values() for name in rows if name in methods]
        _known(asked, methods, "methods")
        _known(self.few_cases.budgets if self.few_cases else [], [b.name for b in self.budgets])
        listed = [name for method in self.methods for name in method.datasets or ()]
        listed += (self.few_cases.datasets or []) if self.few_cases else []
        _known(listed, [d.name for d in self.datasets], "datasets")
        if self.pretraining is None and any(m.weights == PRETRAINED for m in self.methods):
            raise UserError(
                f"a recipe must have pretraining, which makes the weights called {PRETRAINED}."
            )
        if self.batch_size and (own := {m.plans for m in self.methods} & set(PLANS_OF.values())):
            raise UserError(
                "a recipe must have plans of its own for its batch_size, but "
                f"{own.pop()!r} is shared."
            )
        if any(b.minutes for b in self.budgets) and not self.budgets[0].epochs:
            raise UserError(
                "a recipe must have a first budget with epochs, whose jobs give the time per epoch."
            )
        return self


def _known(asked: list[str], known: list[str], what: str = "budgets") -> None:
    for name in asked:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f": did you mean {near[0]!r}?" if near else "."
            raise UserError(f"a recipe must have names of its {what}, but {name!r} is none{hint}")


def load_recipe(name_or_path: str) -> Recipe:
    """Read a shipped recipe or a YAML file.

    Raises:
        UserError: If there is none, or something in it is wrong.
    """
    path = Path(name_or_path)
    if not path.is_file():
        shipped = {file.stem: file for file in sorted(SHIPPED.glob("*.yaml"))}
        stem = name_or_path.removesuffix(".yaml")
        if stem not in shipped:
            raise UserError(
                f"a recipe must be a YAML file or one of {', '.join(shipped)}, got "
                f"{name_or_path!r}."
            )
        path = shipped[stem]
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} must be a readable YAML file: {first_line(error)}.") from error
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path}: {first_sentence(error, _unknown, 'a recipe')}") from error
    return _with_absolute_weights(recipe, path.resolve().parent)


def _with_absolute_weights(recipe: Recipe, folder: Path) -> Recipe:
    def absolute(method: Method) -> Method:
        given = method.weights
        if (
            given is None
            or given in ("none", PRETRAINED)
            or re.match(r"^\w+:", given)
            or Path(given).is_absolute()
        ):
            return method
        return method.model_copy(update={"weights": str(folder / given)})

    return recipe.model_copy(update={"methods": [absolute(m) for m in recipe.methods]})


def _unknown(key: str) -> str:
    """Return the sentence on a key that is not known, with the nearest one that is."""
    near = difflib.get_close_matches(key.rpartition(".")[2], _keys(), 1)
    return f"unknown key {key}" + (f": did you mean {near[0]}?" if near else ".")


def _keys() -> list[str]:
    sections = (Recipe, Dataset, Method, Budget, FewCases, Pretraining)
    return [key for section in sections for key in section.model_fields]
