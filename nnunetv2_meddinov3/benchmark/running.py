"""Runs a recipe here: prepares, trains, predicts and measures; finished work is not repeated."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import Queue
from typing import Any, TextIO

from nnunetv2_meddinov3.benchmark.jobs import (
    OURS,
    Command,
    Job,
    Preparation,
    Weights,
    jobs,
    preparations,
    read_state,
    seconds_per_epoch,
    settings,
    weights_to_make,
    write_state,
)
from nnunetv2_meddinov3.benchmark.nnunet_process import NO_VALIDATION, check_changes
from nnunetv2_meddinov3.benchmark.recipe import Dataset, Recipe
from nnunetv2_meddinov3.benchmark.splits import read_folds, write_folds
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.files import write_text
from nnunetv2_meddinov3.locks import locked
from nnunetv2_meddinov3.progress import Progress
from nnunetv2_meddinov3.raw_dataset import open_raw_dataset

OUR_PREDICTOR = {"MEDDINOV3_PREDICTOR": "1"}

_TAIL = 12  # lines of a failed command's log


def check_folders() -> dict[str, Path]:
    """Return nnU-Net's folders.

    Raises:
        UserError: If a variable is unset.
    """
    found = {}
    for name in ("nnUNet_raw", "nnUNet_preprocessed"):
        value = os.environ.get(name)
        if not value:
            raise UserError(f"{name} must name a folder, as for every command of nnU-Net.")
        found[name] = Path(value)
    return found


def prepare(recipe: Recipe, out: Path, stream: TextIO | None = None) -> None:
    """Plan and preprocess every dataset, and write its folds.

    Raises:
        UserError: If a raw dataset is missing, a trainer has no attribute that a method changes, or
            a command fails.
    """
    folders = check_folders()
    for method in recipe.methods:
        if method.changes:
            check_changes(method.trainer, method.changes)
    for dataset in recipe.datasets:
        if not (folders["nnUNet_raw"] / dataset.name / "dataset.json").is_file():
            raise UserError(
                f"{folders['nnUNet_raw'] / dataset.name} must be a raw dataset of nnU-Net, but has "
                "no dataset.json: `meddinov3 dataset --help` says how to make the paper's."
            )
    wanted, weights = preparations(recipe), weights_to_make(recipe)
    steps = len(wanted) + len(weights)
    with Progress(steps, "preparations", title="prepare", stream=stream) as progress:
        for preparation in wanted:
            _prepare_one(preparation, out)
            progress.advance(preparation.name)
        for made in weights:
            _make_weights(made, out, folders["nnUNet_raw"] / made.dataset.name)
            progress.advance(made.name)
    for dataset in recipe.datasets:
        write_folds(recipe, dataset, folders, out)
        if recipe.batch_size is not None:
            place = folders["nnUNet_preprocessed"] / dataset.name
            _set_batch_size(recipe.batch_size, recipe, dataset, place)


def _set_batch_size(batch_size: int, recipe: Recipe, dataset: Dataset, place: Path) -> None:
    """Write it into the plans of a dataset, once all is planned: planning anew resets it."""
    methods = [m for m in recipe.methods if m.is_trained_on(dataset)]
    for name in {method.plans for method in methods}:
        path = place / f"{name}.json"
        plans = json.loads(path.read_text(encoding="utf-8"))
        for configuration in {m.configuration for m in methods if m.plans == name}:
            plans["configurations"][configuration]["batch_size"] = batch_size
        write_text(path, f"{json.dumps(plans, indent=4)}\n")


def _prepare_one(preparation: Preparation, out: Path) -> None:
    folder = out / "prepared" / preparation.name
    with locked(folder, print):
        if read_state(folder).get("done"):
            return
        command = preparation.command()
        if os.environ.get("nnUNet_n_proc_DA") == "0":  # right for training alone: nnU-Net's
            more = {"nnUNet_n_proc_DA": "1"}  # planner takes it for a number of threads
            command = Command(command.arguments, command.variables | more)
        seconds = run_logged(command, folder / "log.txt")
        write_state(folder, done=True, seconds=seconds)


def _make_weights(weights: Weights, out: Path, raw: Path) -> None:
    folder = weights.folder(out)
    with locked(folder, print):
        if not read_state(folder).get("done"):
            seconds = sum(run_logged(c, folder / "log.txt") for c in weights.commands(out, raw))
            write_state(folder, done=True, seconds=seconds)


def run_logged(command: Command, log: Path) -> float:
    """Run a command with its output in a log, and return the seconds it took.

    Raises:
        UserError: If it fails, with the last lines of the log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    arguments = list(command.arguments)
    found = shutil.which(arguments[0], path=str(Path(sys.executable).parent))
    arguments[0] = found or shutil.which(arguments[0]) or arguments[0]
    start = time.monotonic()
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {command}\n")
        file.flush()
        try:
            done = subprocess.run(
                arguments,
                env=os.environ | command.variables,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                check=False,
            )
        except OSError as error:
            raise UserError(f"{command.arguments[0]} must be installed, but: {error}.") from error
    if done.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:]
        raise UserError(
            f"`{command}` failed with exit code {done.returncode}; its log is {log}:\n"
            + "\n".join(f"  | {line}" for line in lines)
        )
    return time.monotonic() - start


def run(
    recipe: Recipe,
    out: Path,
    *,
    only: Sequence[int] | None = None,
    slots: Sequence[Mapping[str, str]] = ({},),
    device: str = "cuda",
    retry: bool = False,
    stream: TextIO | None = None,
) -> list[str]:
    """Run the jobs of a recipe that are not done; failed ones are noted and do not stop others.

    Args:
        recipe: The comparison; ``prepare`` was run.
        out: Folder of its results.
        only: Numbers of jobs; all by default.
        slots: Variables of each place where a job can run, such as ``CUDA_VISIBLE_DEVICES``.
        device: nnU-Net's ``-device``.
        retry: Whether jobs that failed before are run again.
        stream: Where progress goes.

    Returns:
        What went wrong, a sentence per failed job.
    """
    every = jobs(recipe)
    wanted = every if only is None else [every[number] for number in only]
    failures: list[str] = []
    # A budget in minutes needs the times of the first budget's jobs: one after the other.
    with Progress(len(wanted), "jobs", title=recipe.name, stream=stream) as progress:
        for budget in recipe.budgets:
            part = [job for job in wanted if job.budget.name == budget.name]
            free: Queue[Mapping[str, str]] = Queue()
            for slot in slots:
                free.put(slot)
            with ThreadPoolExecutor(len(slots)) as pool:
                futures = [
                    pool.submit(_in_slot, job, recipe, out, free, device, retry) for job in part
                ]
                for future in as_completed(futures):
                    name, wrong = future.result()
                    if wrong:
                        failures.append(f"{name}: {wrong}")
                        progress.say(f"failed: {name}: {wrong.splitlines()[0]}")
                    progress.advance(name)
    return failures


def _in_slot(
    job: Job, recipe: Recipe, out: Path, free: Queue[Mapping[str, str]], device: str, retry: bool
) -> tuple[str, str]:
    slot = free.get()
    try:
        folder = job.folder(out)
        with locked(folder, print):
            state = read_state(folder)
            if changed := _changed_since(job, recipe, folder, state):
                return job.name, changed
            if state.get("done"):
                return job.name, ""
            if "failed" in state and not retry:
                return job.name, f"it failed before (--retry runs it again): {state['failed']}"
            try:
                write_state(folder, **{**state, "settings": settings(job, recipe)})
                _run_job(job, recipe, out, slot, device)
            except UserError as error:
                write_state(folder, failed=str(error), settings=settings(job, recipe))
                return job.name, str(error)
    except UserError as error:  # another process has it
        return job.name, str(error)
    finally:
        free.put(slot)
    return job.name, ""


def _changed_since(job: Job, recipe: Recipe, folder: Path, state: Mapping[str, Any]) -> str:
    """Return a sentence if what is trained already is not what the recipe describes now."""
    now = settings(job, recipe)
    before = state.get("settings", now)
    differ = [name for name in now if before.get(name) != now[name]]
    if not differ or not any((folder / "results").rglob("checkpoint_*.pth")):
        return ""
    name = differ[0]
    return (
        f"{folder} has the job with {name} {before.get(name)!r}, but the recipe says "
        f"{now[name]!r}: remove the folder, or give another -o."
    )


def _run_job(job: Job, recipe: Recipe, out: Path, slot: Mapping[str, str], device: str) -> None:
    folder = job.folder(out)
    epochs, iterations = _length(job, recipe, out)
    variables = job.variables(out, epochs, iterations) | dict(slot)
    variables["nnUNet_results"] = str(folder / "results")
    fold = job.fold_text(read_folds(job.dataset, out))
    seconds = _train(job, out, fold, variables, device)
    more = () if recipe.mirroring else ("--disable_tta",)
    predictions = _predictions(job, out, fold, variables, device, more)
    raw = check_folders()["nnUNet_raw"] / job.dataset.name
    part = "labelsTs" if job.dataset.evaluate_on == "test" else "labelsTr"
    measured = ["evaluate", str(predictions), str(raw / part), "-o", str(folder / "evaluation")]
    measured += ["--dataset-json", str(raw / "dataset.json"), "-np", "1"]
    measured += ["--tolerance", str(job.dataset.tolerance), "--empty", job.dataset.empty]
    if job.dataset.evaluate_on == "validation":
        measured += ["--missing", "skip"]  # the folder of labels has the training cases too
    for option, value in (
        ("--tolerances", job.dataset.tolerances),
        ("--patients", job.dataset.patients),
    ):
        measured += [option, value] if value else []
    run_logged(
        Command((*OURS, *measured), dict(slot)),
        folder / "evaluate.txt",
    )
    state = read_state(folder)
    write_state(
        folder,
        done=True,
        training_seconds=seconds + state.get("training_seconds", 0.0),
        seconds_per_epoch=_epoch_time(job, out, fold),
        epochs=epochs,
        iterations=iterations,
        settings=settings(job, recipe),
    )


def _length(job: Job, recipe: Recipe, out: Path) -> tuple[int | None, int | None]:
    """Return epochs and iterations of a job; those of a budget in minutes come from its times."""
    budget = job.budget
    if budget.minutes is None:
        return budget.epochs, budget.iterations
    first = recipe.budgets[0]
    peers = [
        other
        for other in jobs(recipe)
        if (other.budget.name, other.method.name, other.dataset.name, other.cases)
        == (first.name, job.method.name, job.dataset.name, None)
    ]
    times = sorted(
        time for peer in peers if (time := read_state(peer.folder(out)).get("seconds_per_epoch"))
    )
    if not times:
        raise UserError(
            f"{job.method.name} must have a finished job of the budget {first.name!r} on "
            f"{job.dataset.name}, whose time per epoch gives the number of epochs of "
            f"{budget.minutes:g} minutes, but has none: run those jobs first."
        )
    median = times[len(times) // 2]
    return max(1, math.floor(budget.minutes * 60 / median)), first.iterations


def _train(job: Job, out: Path, fold: str, variables: dict[str, str], device: str) -> float:
    """Train, or go on where a training was stopped; return the seconds of this run."""
    place = job.model_folder(out) / f"fold_{fold}"
    is_trained = (place / "checkpoint_final.pth").is_file()
    # nnU-Net predicts the validation cases after the last checkpoint, and this file at the end
    is_validated = (place / "validation" / "summary.json").is_file()
    if is_trained and (is_validated or job.dataset.evaluate_on == "test"):
        return 0.0
    arguments = [job.dataset.number, job.method.configuration, fold, "-tr", job.method.trainer]
    arguments += ["-p", job.method.plans, "-device", device]
    if is_trained:
        arguments.append("--val")
    elif (place / "checkpoint_latest.pth").is_file():
        arguments.append("--c")
    if job.checkpoint == "best":
        arguments.append("--val_best")
    process = _process(job, json.dumps(job.method.changes))
    if job.dataset.evaluate_on == "test":
        process = (*process, NO_VALIDATION)
    command = Command((*process, "nnUNetv2_train", *arguments), variables)
    return run_logged(command, job.folder(out) / "train.txt")


def _predictions(
    job: Job,
    out: Path,
    fold: str,
    variables: dict[str, str],
    device: str,
    more: Sequence[str],
) -> Path:
    place = job.model_folder(out) / f"fold_{fold}"
    if job.dataset.evaluate_on == "validation":
        _check_validated(job, place / "validation", int(fold))
        return place / "validation"
    raw = check_folders()["nnUNet_raw"] / job.dataset.name
    target = job.folder(out) / "predictions"
    arguments = ["-i", str(raw / "imagesTs"), "-o", str(target), "-d", job.dataset.number]
    arguments += ["-c", job.method.configuration, "-f", fold, "-tr", job.method.trainer]
    arguments += ["-p", job.method.plans, "-device", device, "--continue_prediction"]
    arguments += ["-npp", "1", "-nps", "1", "-chk", f"checkpoint_{job.checkpoint}.pth", *more]
    run_logged(
        # the same labels, faster
        Command((*_process(job), "nnUNetv2_predict", *arguments), variables | OUR_PREDICTOR),
        job.folder(out) / "predict.txt",
    )
    return target


def _check_validated(job: Job, predictions: Path, fold: int) -> None:
    """Refuse a validation of some of a fold's cases, whose scores would be those of others.

    Raises:
        UserError: If a case is missing.
    """
    from nnunetv2_meddinov3.datasets.convert import named

    folders = check_folders()
    splits = folders["nnUNet_preprocessed"] / job.dataset.name / "splits_final.json"
    wanted = json.loads(splits.read_text(encoding="utf-8"))[fold]["val"]
    ending = open_raw_dataset(folders["nnUNet_raw"] / job.dataset.name).ending
    missing = [case for case in wanted if not (predictions / f"{case}{ending}").is_file()]
    if missing:
        raise UserError(
            f"{predictions} must have all {len(wanted)} validation cases of the fold, but lacks "
            f"{named(missing)}: remove its summary.json and run again with --retry."
        )


def _process(job: Job, changes: str = "{}") -> tuple[str, ...]:
    """Return what goes before a command of nnU-Net's: see ``nnunet_process``."""
    module = "nnunetv2_meddinov3.benchmark.nnunet_process"
    return sys.executable, "-m", module, str(job.seed), changes


def _epoch_time(job: Job, out: Path, fold: str) -> float | None:
    logs = sorted((job.model_folder(out) / f"fold_{fold}").glob("training_log_*.txt"))
    return seconds_per_epoch("\n".join(log.read_text(encoding="utf-8") for log in logs))
