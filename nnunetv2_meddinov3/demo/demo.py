"""``meddinov3 demo``: nnU-Net's own commands with our trainer, on a synthetic CT or on your data.

It plans, preprocesses, trains, predicts held-out cases, measures Dice, and writes a picture and a
page. Every command is shown as one would type it. The tiny network of the demo shows that the
installation works; it does not measure accuracy.
"""

import argparse
import os
import platform
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from nnunetv2_meddinov3 import __version__
from nnunetv2_meddinov3.demo.commands import find_command, run_step
from nnunetv2_meddinov3.demo.data import (
    check_raw,
    dataset_number,
    held_out_cases,
    prepare_out,
)
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.raw_dataset import RawDataset, open_raw_dataset
from nnunetv2_meddinov3.settings import check_variables, count_setting

DEMO_TRAINER = "MedDINOv3Trainer_demo"
DEMO_BACKBONE = "vit_tiny"
DEFAULT_EPOCHS = 10
DEFAULT_ITERATIONS = 40  # of training per epoch, unless MEDDINOV3_ITERATIONS says it
DEFAULT_SIZE = 128  # pixels
PHANTOM_NAME = "Dataset900_Phantom"

# nnU-Net starts eight processes wherever it can, and each imports torch again. For a dataset of
# this size one is faster, and 0 predicts in the main process.
_FEW_PROCESSES = {"nnUNet_def_n_proc": "1", "nnUNet_npp": "0", "nnUNet_nps": "0"}

_PHANTOM_NOTE = (
    "The images are a synthetic phantom that this package draws. The numbers show that the "
    "installation works, from planning to prediction. They say nothing about accuracy on patients."
)
_RAW_NOTE = (
    "This run shows that the installation and this dataset work together. A run this short says "
    "nothing about the accuracy of a full training."
)
_TINY_NOTE = (
    " The network is a tiny vision transformer, trained from random weights for a few minutes, and "
    "not MedDINOv3's released model."
)


@dataclass(frozen=True)
class Recipe:
    """What nnU-Net's commands are given: names, device, and environment variables."""

    trainer: str = DEMO_TRAINER
    planner: str = "MedDINOv3Planner"
    plans: str = "nnUNetMedDINOv3Plans"
    configuration: str = "2d_128"
    device: str = "cpu"
    variables: Mapping[str, str] = field(default_factory=dict)


def main(argv: list[str] | None = None) -> int:
    """Run the demo from the command line.

    Args:
        argv: The arguments after ``meddinov3 demo``; by default those of this process.

    Returns:
        The exit code, 0.

    Raises:
        UserError: A mistake in the arguments, before anything is written, or a step that failed.
    """
    arguments = _parser().parse_args(argv)
    check_variables()
    iterations = count_setting("MEDDINOV3_ITERATIONS") or DEFAULT_ITERATIONS
    raw = None if arguments.raw is None else check_raw(arguments.raw)
    for command in ("nnUNetv2_plan_and_preprocess", "nnUNetv2_train", "nnUNetv2_predict"):
        find_command(command)
    size = DEFAULT_SIZE if arguments.size is None else _checked_size(arguments.size)
    variables = {
        "MEDDINOV3_SIZE": str(size),
        "MEDDINOV3_EPOCHS": str(arguments.epochs),
        "MEDDINOV3_ITERATIONS": str(iterations),
    }
    if arguments.trainer == DEMO_TRAINER:  # any other recipe takes the user's backbone
        variables["MEDDINOV3_BACKBONE"] = DEMO_BACKBONE
    recipe = Recipe(
        trainer=arguments.trainer,
        configuration=f"2d_{size}",
        device=_checked_device(arguments.device),
        variables=variables,
    )
    run_demo(prepare_out(arguments.out, raw.folder if raw else None), raw, recipe)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="meddinov3 demo",
        description="Plan, preprocess, train, predict and measure with nnU-Net's own commands, on "
        "a synthetic abdominal CT or on your own dataset, in a few minutes on a CPU.",
    )
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        default=Path("meddinov3_demo"),
        help="folder for everything that the demo writes; an earlier demo in it is replaced "
        "(default: ./meddinov3_demo)",
    )
    add(
        "--raw",
        type=Path,
        help="your own raw dataset (a folder DatasetXXX_Name), which is only read; Dice is "
        "measured on imagesTs if it has labelsTs, else on fold 0's validation cases (default: "
        "synthetic CT)",
    )
    add("--size", help=f"input of the network in pixels (default: {DEFAULT_SIZE})")
    add(
        "--epochs",
        type=_positive,
        default=DEFAULT_EPOCHS,
        help=f"length of the training, in epochs of {DEFAULT_ITERATIONS} steps unless "
        "MEDDINOV3_ITERATIONS says otherwise (default: %(default)s)",
    )
    add(
        "--trainer",
        default=DEMO_TRAINER,
        help="name of the recipe (default: %(default)s, a tiny network from random weights)",
    )
    add(
        "--device",
        choices=("auto", "cpu", "cuda", "mps"),
        default="auto",
        help="auto is cuda where there is one, else cpu (default: auto)",
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _checked_size(text: str) -> int:
    from nnunetv2_meddinov3.planning import size_setting  # imports nnU-Net: seconds

    return size_setting(text)


def _checked_device(device: str) -> str:
    if device == "cpu":
        return device
    import torch  # takes seconds, and --help must not wait for it

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    backend = torch.cuda if device == "cuda" else torch.backends.mps
    if not backend.is_available():
        raise UserError(
            f"--device {device} needs such a device, but torch {torch.__version__} sees none; "
            "use --device cpu."
        )
    return device


def run_demo(out: Path, raw: RawDataset | None, recipe: Recipe) -> dict[str, dict[str, float]]:
    """Run the demo in a prepared folder.

    Args:
        out: Empty folder; all that is written goes there.
        raw: The user's raw dataset, or None for the phantom.
        recipe: What to train.

    Returns:
        Case -> label -> Dice (0..1) of the held-out cases.

    Raises:
        UserError: If a step fails.
    """
    start = time.monotonic()
    note = (_PHANTOM_NOTE if raw is None else _RAW_NOTE) + (
        _TINY_NOTE if recipe.trainer == DEMO_TRAINER else ""
    )
    dataset = _draw_phantoms(out / "nnUNet_raw" / PHANTOM_NAME) if raw is None else raw
    name = dataset.folder.name
    folders = {
        "nnUNet_raw": dataset.folder.parent,
        "nnUNet_preprocessed": out / "nnUNet_preprocessed",
        "nnUNet_results": out / "nnUNet_results",
    }
    variables = {name: str(folder) for name, folder in folders.items()} | dict(recipe.variables)
    exports = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    print("\nThe steps below, typed in a shell after these lines, do the same:")
    print("\n".join(f"  {line}" for line in exports))

    predictions = out / "predictions"
    commands = _plan_and_train(out, name, recipe, variables)
    preprocessed = folders["nnUNet_preprocessed"] / name
    held_out = held_out_cases(dataset, preprocessed, out / "held_out")
    commands += [_predict(out, name, recipe, variables, held_out.images, predictions)]

    print("\nMeasure", flush=True)
    from nnunetv2_meddinov3.demo.report import write_report
    from nnunetv2_meddinov3.evaluation.dice import dice_per_label, format_table
    from nnunetv2_meddinov3.evaluation.overlay import save_overlay

    table = dice_per_label(predictions, held_out.labels, dataset)
    channels = dataset.images_in(held_out.images)
    images = {case: files[min(files)] for case, files in channels.items()}
    overlay, page = out / "overlay.png", out / "report.html"
    save_overlay(overlay, images, predictions, held_out.labels, dataset, table)
    title = f"meddinov3 demo: {name}"
    write_report(page, title, note, table, overlay, [*exports, *commands], _versions())
    print(f"\nDice of the held-out cases\n\n{format_table(table)}\n\n{note}\n")
    print(f"Picture  {overlay}\nReport   {page}\nDone in {time.monotonic() - start:.0f} s")
    return table


def _draw_phantoms(folder: Path) -> RawDataset:
    from nnunetv2_meddinov3.demo.phantom import write_phantom_dataset

    print(f"Drawing synthetic abdominal CTs in {folder}", flush=True)
    write_phantom_dataset(folder)
    return open_raw_dataset(folder)


def _plan_and_train(
    out: Path, name: str, recipe: Recipe, variables: Mapping[str, str]
) -> list[str]:
    """Run the first two steps on the dataset of a name; return the commands as typed."""
    number = str(dataset_number(name))
    plan = ["nnUNetv2_plan_and_preprocess", "-d", number, "-pl", recipe.planner]
    plan += ["-c", recipe.configuration, "-np", "1", "-npfp", "1", "--verify_dataset_integrity"]
    train = ["nnUNetv2_train", number, recipe.configuration, "0", "-tr", recipe.trainer]
    train += ["-p", recipe.plans, "-device", recipe.device]
    model = f"{recipe.trainer}__{recipe.plans}__{recipe.configuration}"
    fold = Path(variables["nnUNet_results"]) / name / model / "fold_0"
    # With 0 processes for augmentation a training starts at once, but a planner refuses it.
    environment = _environment(variables, augmentation_processes=1)
    run_step("[1/3] Plan and preprocess", plan, environment, out / "logs" / "1_plan.log")
    environment = _environment(variables, augmentation_processes=0)
    run_step("[2/3] Train", train, environment, out / "logs" / "2_train.log", training_folder=fold)
    return [shlex.join(plan), shlex.join(train)]


def _predict(
    out: Path,
    name: str,
    recipe: Recipe,
    variables: Mapping[str, str],
    images: Path,
    predictions: Path,
) -> str:
    """Run the last step; return the command as typed."""
    predict = ["nnUNetv2_predict", "-i", str(images), "-o", str(predictions)]
    predict += ["-d", str(dataset_number(name)), "-c", recipe.configuration, "-f", "0"]
    predict += ["-tr", recipe.trainer, "-p", recipe.plans, "-device", recipe.device]
    environment = _environment(variables, augmentation_processes=0)
    run_step("[3/3] Predict", predict, environment, out / "logs" / "3_predict.log")
    return shlex.join(predict)


def _environment(variables: Mapping[str, str], augmentation_processes: int) -> dict[str, str]:
    return {
        # Threads that wait asleep: where other programs want the cores too, spinning ones make the
        # training several times slower (measured: 1300 ms against 300 ms a step at a load of 4).
        "OMP_WAIT_POLICY": "passive",
        **os.environ,
        **_FEW_PROCESSES,
        **variables,
        "nnUNet_n_proc_DA": str(augmentation_processes),
        "nnUNet_compile": "f",  # compiling takes longer than this training
        "nnUNet_wandb_enabled": "0",
        "PYTHONUNBUFFERED": "1",  # progress as it is made
    }


def _versions() -> dict[str, str]:
    versions = {"nnunetv2_meddinov3": __version__}
    versions |= {name: metadata.version(name) for name in ("nnunetv2", "torch", "timm", "numpy")}
    return {**versions, "Python": platform.python_version(), "system": platform.platform()}
