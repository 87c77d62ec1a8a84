"""The folds that nnU-Net reads: the dataset's own, and one for each number of few cases."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from nnunetv2_meddinov3.benchmark.recipe import ALL, Dataset, Recipe
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.files import write_text


def with_few_cases(
    splits: Sequence[dict[str, list[str]]], recipe: Recipe
) -> tuple[list[dict[str, list[str]]], dict[str, int]]:
    """Return splits with a fold for each number of cases, and ``"fold/cases"`` -> its index.

    A fold that is among the splits already is not added again.

    The few are the first of a fold's training cases in an order that hashing gives: each smaller
    set is part of the larger.
    """
    wanted = recipe.few_cases.numbers if recipe.few_cases else []
    folds = [dict(fold) for fold in splits]
    index = {f"{fold}/{ALL}": fold for fold in recipe.folds}
    for fold in recipe.folds:
        order = sorted(
            splits[fold]["train"], key=lambda case: hashlib.sha256(case.encode()).hexdigest()
        )
        for number in wanted:
            few = {"train": sorted(order[:number]), "val": list(splits[fold]["val"])}
            if few not in folds:
                folds.append(few)
            index[f"{fold}/{number}"] = folds.index(few)
    return folds, index


def write_folds(recipe: Recipe, dataset: Dataset, folders: Mapping[str, Path], out: Path) -> None:
    """Add the folds of few cases to splits_final.json, after those that are there.

    Other recipes, and models trained without one, keep the folds that they know by number.

    Raises:
        UserError: If a recipe's folds are missing, or the dataset has others already.
    """
    place = folders["nnUNet_preprocessed"] / dataset.name
    raw = folders["nnUNet_raw"] / dataset.name
    splits_file = place / "splits_final.json"
    own = raw / "splits_final.json"
    if dataset.splits and not own.is_file():
        raise UserError(f"{own} must give the folds of {dataset.name}, but there is none.")
    base = None
    if splits_file.is_file():
        base = json.loads(splits_file.read_text(encoding="utf-8"))
    if dataset.splits:
        given = json.loads(own.read_text(encoding="utf-8"))
        if base is not None and base[: len(given)] != given:
            raise UserError(
                f"{splits_file} must begin with the folds of {own}, as the recipe says, but has "
                "others: remove it, or let nnUNet_preprocessed name another folder."
            )
        base = base or given
    if base is None:
        from nnunetv2_meddinov3.datasets.convert import five_folds
        from nnunetv2_meddinov3.raw_dataset import open_raw_dataset

        base = five_folds(list(open_raw_dataset(raw).images()))
    folds, index = with_few_cases(base, recipe)
    write_text(splits_file, f"{json.dumps(folds, indent=1)}\n")
    _folds_file(dataset, out).parent.mkdir(parents=True, exist_ok=True)
    write_text(_folds_file(dataset, out), f"{json.dumps(index, indent=1)}\n")


def _folds_file(dataset: Dataset, out: Path) -> Path:
    """Return where a recipe notes which fold has which of its cases."""
    return out / "prepared" / f"{dataset.name}__folds.json"


def read_folds(dataset: Dataset, out: Path) -> dict[str, int]:
    """Return ``"fold/cases"`` -> number of the fold, as ``write_folds`` noted it.

    Raises:
        UserError: If it did not.
    """
    place = _folds_file(dataset, out)
    try:
        return json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{place} must give the folds of {dataset.name}: run `meddinov3 benchmark run` "
            "with --prepare first."
        ) from error
