"""The options of stock nnU-Net's commands that may name our trainers, planner or configurations."""

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn


class _Options(NamedTuple):
    """What a command takes, in words as on the command line.

    Attributes:
        places: Positional arguments.
        values: Options with one value.
        lists: Options with one value or more.
        flags: Options without a value.
        defaults: Of the options that are read here.
    """

    places: str
    values: str
    lists: str
    flags: str
    defaults: dict[str, Any]


_FOLDS = [str(fold) for fold in range(5)]
_CONFIGURATIONS = ["2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres"]
_ONE_MODEL = {"tr": "nnUNetTrainer", "p": "nnUNetPlans"}
_PREDICTION = (
    "-i -o -step_size -chk -npp -nps -prev_stage_predictions -device",
    "-f",
    "--disable_tta --verbose --save_probabilities --continue_prediction --disable_progress_bar "
    "--not_on_device",
)
_PREDICTION_DEFAULTS = {"f": _FOLDS, "chk": "checkpoint_final.pth", "device": "cuda"}
_PLANNING = "-fpe -npfp -pl -gpu_memory_target -preprocessor_name -overwrite_plans_name"
_COMMANDS = {
    "nnUNetv2_train": _Options(
        "dataset configuration fold",
        "-tr -p -pretrained_weights -num_gpus -device",
        "",
        "--npz --c --val --val_best --disable_checkpointing",
        {**_ONE_MODEL, "device": "cuda"},
    ),
    "nnUNetv2_predict": _Options(
        "",
        f"{_PREDICTION[0]} -d -p -tr -c -num_parts -part_id",
        *_PREDICTION[1:],
        {**_ONE_MODEL, **_PREDICTION_DEFAULTS},
    ),
    "nnUNetv2_predict_from_modelfolder": _Options(
        "", f"{_PREDICTION[0]} -m", *_PREDICTION[1:], _PREDICTION_DEFAULTS
    ),
    "nnUNetv2_find_best_configuration": _Options(
        "dataset",
        "-np",
        "-p -c -tr -f",
        "--disable_ensembling --no_overwrite",
        {"tr": ["nnUNetTrainer"], "p": ["nnUNetPlans"], "c": _CONFIGURATIONS, "f": _FOLDS},
    ),
    "nnUNetv2_accumulate_crossval_results": _Options(
        "dataset", "-c -o -p -tr", "-f", "", {**_ONE_MODEL, "f": _FOLDS}
    ),
    "nnUNetv2_export_model_to_zip": _Options(
        "", "-d -o -tr -p", "-c -f -chk", "--not_strict --exp_cv_preds", {**_ONE_MODEL}
    ),
    "nnUNetv2_plan_and_preprocess": _Options(
        "",
        _PLANNING,
        "-d -overwrite_target_spacing -c -np",
        "--verify_dataset_integrity --no_pp --clean --verbose --no_pbar",
        {"d": [], "pl": "ExperimentPlanner", "c": []},
    ),
    "nnUNetv2_plan_experiment": _Options(
        "", _PLANNING, "-d -overwrite_target_spacing", "", {"d": [], "pl": "ExperimentPlanner"}
    ),
    "nnUNetv2_preprocess": _Options(
        "",
        "-plans_name",
        "-d -c -np",
        "--verbose --no_pbar",
        {"d": [], "plans_name": "nnUNetPlans", "c": []},
    ),
}


def read_options(command: str, arguments: Sequence[str]) -> argparse.Namespace | None:
    """Return what a command was asked, as nnU-Net's own parser reads it.

    Args:
        command: Its name, such as ``nnUNetv2_train``.
        arguments: What follows it.

    Returns:
        Options by name; None for a question for help, for a command that is not here, and for what
        nnU-Net's parser refuses.
    """
    if command not in _COMMANDS or {"-h", "--help"} & {*arguments}:
        return None
    try:
        return _parse(_COMMANDS[command], arguments)
    except ValueError:
        return None


class _Parser(argparse.ArgumentParser):
    """One that does not end the process: nnU-Net's own will say what is wrong."""

    def error(self, message: str) -> NoReturn:
        """Raise ValueError."""
        raise ValueError(message)


def _parse(options: _Options, arguments: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(add_help=False)
    for name in options.places.split():
        parser.add_argument(name)
    for name in options.values.split():
        parser.add_argument(name)
    for name in options.lists.split():
        parser.add_argument(name, nargs="+")
    for name in options.flags.split():
        parser.add_argument(name, action="store_true")
    parser.set_defaults(**options.defaults)
    return parser.parse_known_args(list(arguments))[0]
