"""What must be there before nnU-Net starts work: its variables, a device, planned and ready data.

nnU-Net finds most of this late, and in the words of the library that failed.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunetv2_meddinov3.errors import UserError

NEEDED = {
    "nnUNetv2_train": ("nnUNet_preprocessed", "nnUNet_results"),
    "nnUNetv2_predict": ("nnUNet_results",),
    "nnUNetv2_predict_from_modelfolder": (),
    "nnUNetv2_find_best_configuration": ("nnUNet_preprocessed", "nnUNet_results"),
    "nnUNetv2_accumulate_crossval_results": ("nnUNet_preprocessed", "nnUNet_results"),
    "nnUNetv2_export_model_to_zip": ("nnUNet_results",),
    "nnUNetv2_plan_and_preprocess": ("nnUNet_raw", "nnUNet_preprocessed"),
    "nnUNetv2_plan_experiment": ("nnUNet_raw", "nnUNet_preprocessed"),
    "nnUNetv2_preprocess": ("nnUNet_raw", "nnUNet_preprocessed"),
}
"""Command of nnU-Net -> the variables it cannot do without."""

_ON_A_DEVICE = ("nnUNetv2_train", "nnUNetv2_predict", "nnUNetv2_predict_from_modelfolder")

_HOLDS = {
    "nnUNet_raw": "raw datasets",
    "nnUNet_preprocessed": "preprocessed datasets",
    "nnUNet_results": "trained models",
}


def check_command(command: str, arguments: Sequence[str]) -> None:
    """Refuse a command of nnU-Net that could not run here, before it imports anything.

    Args:
        command: Its name.
        arguments: What follows it; a question for help is always answered.

    Raises:
        UserError: If a variable is not set or there is no such device.
    """
    if command not in NEEDED or not arguments or {"-h", "--help"} & {*arguments}:
        return
    for variable in NEEDED[command]:
        if not os.environ.get(variable):
            raise UserError(
                f"{variable} must name the folder for your {_HOLDS[variable]}, but is not set: "
                f"export {variable}=FOLDER (`meddinov3 doctor` checks all of nnU-Net's folders)."
            )
    if command in _ON_A_DEVICE:
        check_device(_device_of(arguments))


def check_device(device: str) -> None:
    """Refuse ``cuda`` and ``mps`` where torch sees no such device.

    Raises:
        UserError: If there is none.
    """
    kind = device.split(":")[0]
    if kind not in ("cuda", "mps"):
        return
    import torch

    backend = torch.cuda if kind == "cuda" else torch.backends.mps
    if not backend.is_available():
        raise UserError(
            f"-device {kind} needs such a device, but torch {torch.__version__} sees none: add "
            "-device cpu to the command (`meddinov3 doctor` says more), which is slow."
        )


def check_planned(plans: dict[str, Any], configuration: str) -> None:
    """Refuse a ``2d_N`` that the plans do not hold, with the commands that add it.

    Raises:
        UserError: If it is missing; any other configuration is nnU-Net's affair.
    """
    size = size_of(configuration)
    if configuration in plans["configurations"] or not size or size % 16:
        return
    name, number = plans["plans_name"], number_of(plans["dataset_name"])
    raise UserError(
        f"the plans {name} of {plans['dataset_name']} must hold the configuration {configuration}, "
        f"but they hold {', '.join(plans['configurations']) or 'none'}: plan it with `meddinov3 "
        f"plan -d {number} --size {size} -p {name}` (MedDINOv3Planner adds 2d_N where "
        f"MEDDINOV3_SIZE is N, and 2d_896 without it), then run `"
        f"{_preprocess(number, name, configuration)}`."
    )


def check_trainer(trainer: Any) -> None:
    """Refuse a training without its device or its preprocessed data, before weights are read.

    Args:
        trainer: An nnUNetTrainer.

    Raises:
        UserError: If one of them is missing.
    """
    check_device(trainer.device.type)
    configuration = trainer.configuration_name
    base = trainer.preprocessed_dataset_folder_base
    if base is None:
        return  # nnU-Net says which variable is not set
    folder = Path(base, trainer.configuration_manager.data_identifier)
    _check_filled(folder, f"the preprocessed data of {configuration}", trainer)


def check_labels(trainer: Any) -> None:
    """Refuse a validation without the labels that preprocessing copied, before it predicts.

    Args:
        trainer: An nnUNetTrainer.

    Raises:
        UserError: If they are missing.
    """
    if trainer.preprocessed_dataset_folder_base is not None:
        folder = Path(trainer.preprocessed_dataset_folder_base, "gt_segmentations")
        _check_filled(folder, "the labels for the validation", trainer)


def _check_filled(folder: Path, what: str, trainer: Any) -> None:
    if folder.is_dir() and any(folder.iterdir()):
        return
    plans = trainer.plans_manager
    number, configuration = number_of(plans.dataset_name), trainer.configuration_name
    raise UserError(
        f"{folder} must hold {what}, but {'is empty' if folder.is_dir() else 'does not exist'}: "
        f"run `{_preprocess(number, plans.plans_name, configuration)}`."
    )


def _preprocess(number: int, plans_name: str, configuration: str) -> str:
    return f"nnUNetv2_preprocess -d {number} -plans_name {plans_name} -c {configuration}"


def size_of(configuration: str) -> int | None:
    """Return N of a configuration ``2d_N``, None for any other."""
    match = re.fullmatch(r"2d_([1-9]\d*)", configuration)
    return int(match[1]) if match else None


def number_of(dataset_name: str) -> int:
    """Return the id in a dataset's name, 0 where there is none."""
    match = re.match(r"Dataset(\d+)", dataset_name)
    return int(match[1]) if match else 0


def _device_of(arguments: Sequence[str]) -> str:
    """Return what follows ``-device``, or nnU-Net's default."""
    device = "cuda"
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        if name in ("-device", "--device"):
            device = value if equals else following
    return device
