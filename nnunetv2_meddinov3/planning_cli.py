"""``meddinov3 plan``: add the configuration ``2d_N`` to existing nnU-Net plans."""

import argparse
import json
import os
import re
from pathlib import Path
from typing import Any

from nnunetv2_meddinov3.errors import UserError, first_line
from nnunetv2_meddinov3.files import write_text
from nnunetv2_meddinov3.settings import backbone_setting, check_variables


def main(argv: list[str]) -> int:
    """Add ``2d_N`` to the plans of the datasets named and print the two commands that follow.

    All datasets are checked before the plans of the first are written.

    Args:
        argv: What was typed after ``meddinov3 plan``.

    Returns:
        The exit code, 0.

    Raises:
        UserError: A mistake in the arguments, the variables or the plans, or a plans file that
            cannot be written; that file is unchanged.
    """
    arguments = _parser().parse_args(argv)
    # Imported here because nnU-Net's planner imports torch, for which `--help` need not wait.
    from nnunetv2_meddinov3 import planning
    from nnunetv2_meddinov3.preprocessed import other_plans

    check_variables()
    size = planning.size_setting(arguments.size)
    backbone = backbone_setting() or planning.DEFAULT_BACKBONE
    gpu_memory_gb = _gpu_memory(arguments.gpu_memory_target)
    planning.check_gpu_memory(gpu_memory_gb)
    amendments = []
    for dataset in arguments.d:
        path = _find_plans(_find_dataset(dataset), arguments.p)
        plans = _read_plans(path)
        amended = planning.add_configuration(
            plans,
            size,
            gpu_memory_gb=gpu_memory_gb,
            backbone=backbone,
            training_cases=_training_cases(path.parent),
            others=other_plans(path.parent, path.stem),
        )
        amended = _keep_unet(plans, amended, f"2d_{size}")
        if not arguments.overwrite:
            _refuse_to_replace(plans, amended, f"2d_{size}", path)
        amendments.append((path, plans, amended))
    for path, plans, amended in amendments:
        if amended != plans:
            write_text(path, json.dumps(amended, indent=4, sort_keys=False))  # as nnU-Net does
        number = _dataset_number(path.parent.name)
        print(planning.describe(amended, size, backbone))
        print("Next:")
        print(f"  nnUNetv2_preprocess -d {number} -plans_name {path.stem} -c 2d_{size}")
        print(f"  nnUNetv2_train {number} 2d_{size} 0 -p {path.stem} -tr MedDINOv3Trainer")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="meddinov3 plan",
        description="Add the configuration 2d_N to existing nnU-Net plans; nothing else changes.",
    )
    parser.add_argument(
        "-d", nargs="+", required=True, metavar="ID", help="[REQUIRED] ids or names of datasets"
    )
    parser.add_argument(
        "--size",
        metavar="N",
        help="[OPTIONAL] longest side of the patch in pixels. Default: MEDDINOV3_SIZE, else 896",
    )
    parser.add_argument(
        "-p",
        metavar="PLANS",
        help="[OPTIONAL] name of the plans. Default: nnUNetMedDINOv3Plans if they exist, else "
        "nnUNetPlans",
    )
    parser.add_argument(
        "-gpu_memory_target",
        metavar="GB",
        default="8",
        help="[OPTIONAL] GPU memory from which the batch size is estimated. Default: 8",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="[OPTIONAL] replace a configuration 2d_N that differs from the new one",
    )
    return parser


def _gpu_memory(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(
            f"-gpu_memory_target must be a positive number of GB, but is {text!r}: give the memory "
            "of your GPU, for example 24."
        ) from None


def _find_dataset(dataset: str) -> Path:
    """Return the folder in nnUNet_preprocessed of a dataset given by its id or name."""
    root = os.environ.get("nnUNet_preprocessed")
    if not root or not Path(root).is_dir():
        what = f"is {root!r}, which is not a folder" if root else "is not set"
        raise UserError(
            f"nnUNet_preprocessed must name the folder with your plans, but {what}: set it as for "
            "nnU-Net's own commands."
        )
    folders = sorted(p for p in Path(root).iterdir() if p.is_dir() and _dataset_number(p.name) >= 0)
    found = [
        folder
        for folder in folders
        if folder.name == dataset or str(_dataset_number(folder.name)) == dataset.lstrip("0")
    ]
    if len(found) != 1:
        what = ", ".join(folder.name for folder in found or folders) or "none"
        raise UserError(
            f"-d must name one dataset in {root}, but {dataset!r} matches {len(found)} of those "
            f"there ({what}): give one of their ids or names, or plan the dataset first with "
            "nnUNetv2_plan_and_preprocess."
        )
    return found[0]


def _dataset_number(folder_name: str) -> int:
    """Return the id in a dataset's name, -1 for the name of something else."""
    match = re.match(r"Dataset(\d+)(?:_|$)", folder_name)
    return int(match.group(1)) if match else -1


def _find_plans(folder: Path, name: str | None) -> Path:
    """Return the plans file of that name; without a name ours if it exists, else nnU-Net's."""
    from nnunetv2_meddinov3.planning import PLANS_NAME, STOCK_PLANS_NAME, check_plans_name

    if name is not None:
        check_plans_name(name)
    names = [PLANS_NAME, STOCK_PLANS_NAME] if name is None else [name]
    for path in (folder / f"{n}.json" for n in names):
        if path.is_file():
            return path
    others = sorted(path.stem for path in folder.glob("*[pP]lans*.json"))
    raise UserError(
        f"{folder} has no plans named {' or '.join(names)} (there: {', '.join(others) or 'none'}): "
        f"choose one with -p, or plan the dataset with nnUNetv2_plan_and_preprocess -d "
        f"{_dataset_number(folder.name)} -pl MedDINOv3Planner."
    )


def _read_plans(path: Path) -> dict[str, Any]:
    plans = _read_json(path)
    missing = {"configurations", "dataset_name", "original_median_shape_after_transp", "plans_name"}
    if isinstance(plans, dict):
        missing -= plans.keys()
    if missing:
        raise UserError(
            f"{path} must hold nnU-Net plans, but lacks {', '.join(sorted(missing))}: plan the "
            "dataset again with nnUNetv2_plan_experiment."
        )
    return plans


def _training_cases(folder: Path) -> int:
    dataset = _read_json(folder / "dataset.json")
    if not isinstance(dataset, dict) or not isinstance(dataset.get("numTraining"), int):
        raise UserError(
            f"{folder / 'dataset.json'} must hold numTraining, the number of training images: copy "
            "dataset.json there from the raw dataset."
        )
    return dataset["numTraining"]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} must be a JSON file of nnU-Net's, but cannot be read ({first_line(error)}): "
            "plan the dataset again with nnUNetv2_plan_experiment."
        ) from error


def _keep_unet(plans: dict[str, Any], amended: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the old plans where the new differ only by a U-Net that they do without.

    Versions before this one let ``2d_N`` inherit it. Where it fits, somebody may have trained it.
    """
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnunetv2_meddinov3.unet import fits

    old, new = plans["configurations"].get(name), amended["configurations"][name]
    if old is None or {**old, "architecture": new.get("architecture")} != new:
        return amended
    inherited = PlansManager(plans).get_configuration(name).configuration
    return plans if fits(inherited["architecture"], inherited["patch_size"]) else amended


def _refuse_to_replace(
    plans: dict[str, Any], amended: dict[str, Any], name: str, path: Path
) -> None:
    """Raise UserError if the plans hold a different configuration of that name."""
    old, new = plans["configurations"].get(name), amended["configurations"][name]
    if old is not None and "architecture" not in old:  # then one is only added, see _keep_unet
        old = {**old, **{key: new[key] for key in ("architecture",) if key in new}}
    if old is not None and old != new:
        differing = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        raise UserError(
            f"{path} already has a {name} with a different {', '.join(differing)}: keep it, or "
            "replace it with --overwrite."
        )
