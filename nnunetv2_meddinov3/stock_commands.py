"""Commands of stock nnU-Net with our names in them, checked before they start work.

``discovery`` calls ``check`` when such a command imports its module, before torch and nnU-Net's own
imports. What other trainers and planners do is left alone.
"""

import argparse
import json
import os
import re
import shlex
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from nnunetv2_meddinov3 import readiness
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.spelling import is_like, refuse_misspelt
from nnunetv2_meddinov3.stock_options import read_options

_ROOTS = ("nnUNet_preprocessed", "nnUNet_raw", "nnUNet_results")
_OUR_PLANS, _OUR_PLANNER = "nnUNetMedDINOv3Plans", "MedDINOv3Planner"
_DEFAULT_SIZE = 896  # pixels, of MedDINOv3Planner


def check(
    command: str, arguments: Sequence[str], trainers: Iterable[str], planners: Iterable[str]
) -> bool:
    """Refuse a command with our names that could not end well, with what to do instead.

    Args:
        command: Its name, such as ``nnUNetv2_train``.
        arguments: What follows it; what nnU-Net's own parser refuses is left to it.
        trainers: Names of ours.
        planners: Names of ours.

    Returns:
        Whether a name of ours is in it.

    Raises:
        UserError: If a name is misspelt, or a variable, a device, a dataset, plans, data, a model
            or a fold is missing.
    """
    given = read_options(command, arguments)
    if given is None:
        return False
    if command == "nnUNetv2_preprocess":
        ours = any(readiness.size_of(name) for name in given.c) or given.plans_name == _OUR_PLANS
    elif command == "nnUNetv2_predict_from_modelfolder":
        name = Path(given.m or "").name.partition("__")[0]
        ours = name in trainers
    else:
        known = list(planners if hasattr(given, "pl") else trainers)
        asked = given.pl if hasattr(given, "pl") else given.tr
        names = asked if isinstance(asked, list) else [asked]
        for each in names:
            if each not in known and is_like(each, known):
                refuse_misspelt(each, known, _folder_of_nnunet())
        ours = any(name in known for name in names)
    if ours:
        # torch says this while nnU-Net imports it, before whatever there is to say
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", FutureWarning)
        readiness.check_command(command, arguments)
        if command in _CHECKS:
            _CHECKS[command](given)
    return ours


def _folder_of_nnunet() -> str | None:
    """Return a file as deep in nnU-Net as a trainer's, found without importing nnU-Net."""
    from importlib.util import find_spec

    spec = find_spec("nnunetv2")
    places = list(spec.submodule_search_locations or ()) if spec else []
    return str(Path(places[0], "training", "nnUNetTrainer", "x.py").parent) if places else None


def _check_train(given: argparse.Namespace) -> None:
    name = _dataset(given.dataset)
    folder = _root("nnUNet_preprocessed") / name
    plans = _plans(folder, given.p, given.configuration, "-p")
    readiness.check_planned(plans, given.configuration)
    if given.val or given.val_best:
        model = _model_folder(name, given.tr, given.p, given.configuration)
        wanted = ["checkpoint_final.pth"] * given.val
        wanted += ["checkpoint_best.pth"] * (given.val and given.val_best)
        fold = model / f"fold_{given.fold}"
        for checkpoint in wanted:
            if not (fold / checkpoint).is_file():
                advice = "run the same command without --val, which trains it"
                if any(fold.glob("checkpoint_*.pth")):
                    advice = "its training is not finished: continue it with --c in place of --val"
                elif there := _folds(model, checkpoint):
                    advice += f" (there: {', '.join(there)})"
                raise UserError(
                    f"--val needs the trained model of this fold, but there is no "
                    f"{fold / checkpoint}: {advice}."
                )


def _check_predict(given: argparse.Namespace) -> None:
    if given.d is None or given.c is None:
        return  # nnU-Net requires them
    name = _dataset(given.d)
    _check_model(_model_folder(name, given.tr, given.p, given.c), given)


def _check_modelfolder(given: argparse.Namespace) -> None:
    _check_model(Path(given.m), given)


def _check_model(model: Path, given: argparse.Namespace) -> None:
    """Refuse a folder without a trained model, or without its folds."""
    _check_trained(model)
    _check_folds(model, given.f, given.chk)
    if given.i is not None and not Path(given.i).is_dir():
        raise UserError(f"-i must name a folder of images, but there is no folder {given.i}.")


def _check_trained(model: Path) -> None:
    if (model / "plans.json").is_file() and (model / "dataset.json").is_file():
        return
    others = sorted(path.parent.name for path in model.parent.glob("*__*__*/plans.json"))
    there = f"those there are {', '.join(others)}" if others else "there are none beside it"
    raise UserError(
        f"{model} must hold a trained model (plans.json, dataset.json and its folds), but does "
        f"not; {there}: check -tr, -p and -c, or train it first."
    )


def _check_folds(model: Path, folds: Sequence[str], *parts: str) -> None:
    """Refuse folds that were not trained; nnU-Net's default are five."""
    for fold in folds:
        if not Path(model, f"fold_{fold}", *parts).exists():
            there = [name.removeprefix("fold_") for name in _folds(model, *parts)]
            advice = f"give -f {' '.join(there)}, or train it" if there else "train it first"
            raise UserError(
                f"{model} must hold every fold that is used, but fold_{fold}/{'/'.join(parts)} "
                f"does not exist: {advice}."
            )


def _folds(model: Path, *parts: str) -> list[str]:
    return sorted(path.name for path in model.glob("fold_*") if Path(path, *parts).exists())


def _check_best(given: argparse.Namespace) -> None:
    name = _dataset(given.dataset)
    for identifier in _listed(given.p):
        folder = _root("nnUNet_preprocessed") / name
        plans = _plans(folder, identifier, None, "-p")
        for trainer in _listed(given.tr):
            for configuration in _listed(given.c):
                if configuration not in plans["configurations"]:
                    continue  # nnU-Net says so and goes on
                model = _model_folder(name, trainer, identifier, configuration)
                _check_trained(model)
                _check_folds(model, given.f, "validation")


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _check_plan(given: argparse.Namespace) -> None:
    identifier = getattr(given, "overwrite_plans_name", None) or _OUR_PLANS
    for dataset in given.d:
        name = _dataset(dataset, only_ids=True)
        path = _root("nnUNet_raw") / name / "dataset.json"
        if not path.is_file():
            raise UserError(
                f"the raw dataset must be in nnUNet_raw, but there is no {path}: check -d and "
                "nnUNet_raw."
            )
        if getattr(given, "no_pp", True):
            continue
        known = _read(_root("nnUNet_preprocessed") / name / f"{identifier}.json")
        planned = set(known["configurations"]) if known else set()
        size = os.environ.get("MEDDINOV3_SIZE", "").strip() or str(_DEFAULT_SIZE)
        for configuration in given.c:
            asked = readiness.size_of(configuration)
            if asked and str(asked) != size and configuration not in planned:
                raise UserError(
                    f"{_OUR_PLANNER} plans one 2d_N at a time, N being MEDDINOV3_SIZE (now {size}),"
                    f" but -c asks for {configuration}: export MEDDINOV3_SIZE={asked}, or add it "
                    f"to existing plans with `meddinov3 plan -d {dataset} --size {asked}`."
                )


def _check_preprocess(given: argparse.Namespace) -> None:
    for dataset in given.d:
        folder = _root("nnUNet_preprocessed") / _dataset(dataset, only_ids=True)
        sizes = [name for name in given.c if readiness.size_of(name)]
        for configuration in sizes or [None]:
            plans = _plans(folder, given.plans_name, configuration, "-plans_name")
            if configuration is not None:
                readiness.check_planned(plans, configuration)


_CHECKS: dict[str, Callable[[argparse.Namespace], None]] = {
    "nnUNetv2_train": _check_train,
    "nnUNetv2_predict": _check_predict,
    "nnUNetv2_predict_from_modelfolder": _check_modelfolder,
    "nnUNetv2_find_best_configuration": _check_best,
    "nnUNetv2_accumulate_crossval_results": _check_best,
    "nnUNetv2_plan_and_preprocess": _check_plan,
    "nnUNetv2_plan_experiment": _check_plan,
    "nnUNetv2_preprocess": _check_preprocess,
}


def _root(variable: str) -> Path:
    return Path(os.environ.get(variable, ""))


def _model_folder(dataset: str, trainer: str, plans: str, configuration: str) -> Path:
    return _root("nnUNet_results") / dataset / f"{trainer}__{plans}__{configuration}"


def _dataset(given: str, *, only_ids: bool = False) -> str:
    """Return a dataset's name from its id or name, as nnU-Net finds it in its three folders.

    Args:
        given: What was typed.
        only_ids: Whether the command takes no names.
    """
    if given.startswith("Dataset") and not only_ids:
        return given
    if not given.isdecimal():
        raise UserError(
            f"a dataset must be given by its id, such as 802{'' if only_ids else ', or its name'}, "
            f"got {given!r}."
        )
    start = f"Dataset{int(given):03d}"
    folders = [_root(variable) for variable in _ROOTS if os.environ.get(variable)]
    found = sorted({p.name for f in folders for p in f.glob(f"{start}*") if p.is_dir()})
    own = [name for name in found if re.match(rf"{start}(?!\d)", name)]
    if not own:
        where = ", ".join(f"{name}={os.environ.get(name) or '(not set)'}" for name in _ROOTS)
        instead = f" (nnU-Net would take {found[0]}, which begins so)" if found else ""
        raise UserError(
            f"the dataset {given} must be in a folder of nnU-Net's, but none of them has a "
            f"{start}_...{instead}: check the id and the variables ({where})."
        )
    if len(found) > 1:  # nnU-Net takes whatever begins so
        what = "rename or move the others" if only_ids else f"give the name {own[0]}"
        raise UserError(
            f"the id {given} must belong to one dataset, but nnU-Net takes every folder that begins"
            f" with {start}, here {', '.join(found)}: {what}."
        )
    return found[0]


def _plans(folder: Path, identifier: str, configuration: str | None, option: str) -> dict[str, Any]:
    """Return the plans of a dataset.

    Args:
        folder: Of its preprocessed data.
        identifier: Name of the plans.
        configuration: One that is asked for; None if the plans alone matter.
        option: What names other plans.

    Raises:
        UserError: If there are none of that name, or others have the configuration.
    """
    files = sorted(folder.glob("*[pP]lans*.json"))
    every = {path.stem: plans for path in files if (plans := _read(path))}
    plans = _read(folder / f"{identifier}.json") if identifier not in every else every[identifier]
    having = [
        name
        for name, other in every.items()
        if name != identifier
        and (configuration is None or configuration in other["configurations"])
    ]
    if plans is not None and (
        configuration is None or configuration in plans["configurations"] or not having
    ):
        return plans
    if having:
        holds = "is not there" if plans is None else f"does not hold {configuration}"
        advice = f"{option} {having[0]} {'does' if plans is not None else 'is'}: add it"
        raise UserError(
            f"the plans {identifier} of {folder.name} must exist and hold the configuration, but "
            f"{folder / f'{identifier}.json'} {holds}, and {advice}."
        )
    raise UserError(
        f"{folder} must hold the plans {identifier}, but does not"
        f"{f' (those there: {chr(44).join(every)})' if every else ''}: run "
        f"`{_planning_command(folder.name, configuration)}`."
    )


def _planning_command(dataset: str, configuration: str | None) -> str:
    number = readiness.number_of(dataset)
    size = readiness.size_of(configuration or "")
    ours = f"-pl {_OUR_PLANNER} " if size else ""
    before = f"MEDDINOV3_SIZE={size} " if size and size != _DEFAULT_SIZE else ""
    chosen = f"-c {shlex.quote(configuration)}" if configuration else ""
    return f"{before}nnUNetv2_plan_and_preprocess -d {number} {ours}{chosen}".strip()


def _read(path: Path) -> dict[str, Any] | None:
    """Return plans, None for what is missing or no plans: nnU-Net says so."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_plans = isinstance(content, dict) and isinstance(content.get("configurations"), dict)
    return content if is_plans else None
