"""``meddinov3 doctor``: what is wrong with this installation, and how to fix it."""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from nnunetv2_meddinov3 import __version__, cli, discovery, settings
from nnunetv2_meddinov3.errors import UserError, first_line

# Runs in a process of its own, because in this one the command line has registered our names.
_STOCK_SEARCH = """
import json, os, sys
sys.path[:] = [folder for folder in sys.path if folder]  # an installed command does not see "."
import nnunetv2
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

def find_planner(name):
    folder = os.path.join(nnunetv2.__path__[0], "experiment_planning")
    found = recursive_find_python_class(folder, name, "nnunetv2.experiment_planning")
    if found is None:
        raise RuntimeError("not found")

def complaint(search, name):
    try:
        search(name)
    except Exception as error:
        if type(error).__name__ == "UserError":  # ours: the class is there but cannot be imported
            return str(error)
        print(error, file=sys.stderr)
        return "nnU-Net does not find it, because the discovery above does not work"
    return ""

complaints = [
    complaint(recursive_find_trainer_class_by_name, "MedDINOv3Trainer"),
    complaint(find_planner, "MedDINOv3Planner"),
]
print(json.dumps(complaints))
"""


class Finding(NamedTuple):
    """One line of the report.

    Args:
        ok: Whether this is as it must be.
        subject: What was looked at.
        sentence: What was found, and how to fix it if it is not ok.
    """

    ok: bool
    subject: str
    sentence: str


def main(argv: list[str] | None = None) -> int:
    """Print the report; return 0 if all is well and 1 if there is any problem."""
    parser = argparse.ArgumentParser(
        prog="meddinov3 doctor", description=cli.VERBS["doctor"].help.capitalize() + "."
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    as_json = parser.parse_args(argv).json
    findings = []
    for finding in examine():
        findings.append(finding)
        if not as_json:
            mark = "ok     " if finding.ok else "PROBLEM"
            print(f"{mark}  {finding.subject}: {finding.sentence}", flush=True)
    problems = sum(not finding.ok for finding in findings)
    if as_json:
        print(json.dumps([finding._asdict() for finding in findings], indent=2))
    else:
        print(f"{problems or 'no'} problem{'' if problems == 1 else 's'} found")
    return 1 if problems else 0


def examine() -> Iterator[Finding]:
    """Run one check after the other; a check that breaks down is a finding itself."""
    checks = {
        "versions": examine_versions,
        "torch and torchvision": examine_torchvision,
        "device": examine_device,
        "discovery": examine_discovery,
        "nnU-Net's search": examine_search,
        "nnU-Net's folders": examine_folders,
        "MEDDINOV3_* variables": examine_variables,
        "weights": examine_weights,
    }
    for subject, check in checks.items():
        try:
            yield from check()
        except UserError as error:
            yield Finding(False, subject, str(error))
        except Exception as error:
            yield Finding(False, subject, discovery.explain_import_error(error))


def examine_versions() -> Iterator[Finding]:
    """Check Python, and the packages whose version matters."""
    python = ".".join(map(str, sys.version_info[:3]))
    enough = sys.version_info >= (3, 10)
    yield Finding(enough, "python", python if enough else f"{python}; 3.10 or later is needed")
    yield Finding(True, "nnunetv2_meddinov3", f"{__version__} in {Path(__file__).parent}")
    yield _version("nnunetv2", at_least="2.8", below="3")
    yield _version("torch")
    yield _version("torchvision")
    yield _version("timm", at_least="1.0.21")


def examine_torchvision() -> Iterator[Finding]:
    """Check that torchvision loads into this torch; timm, hence every model of ours, needs it."""
    import torch
    import torchvision

    pair = f"{torch.__version__} and {torchvision.__version__} fit together"
    yield Finding(True, "torch and torchvision", pair)


def examine_device() -> Iterator[Finding]:
    """Say what training would run on, and in which number format."""
    import torch

    from nnunetv2_meddinov3.models.precision import has_bf16

    if not torch.cuda.is_available():
        sentence = "there is no CUDA device; training needs -device cpu and is slow, in fp32"
    else:
        precision = "bf16" if has_bf16() else "fp16 (this device has no native bf16)"
        sentence = f"{torch.cuda.get_device_name()}, training in {precision}"
    yield Finding(True, "device", sentence)


def examine_discovery() -> Iterator[Finding]:
    """Say how stock nnU-Net commands find our trainers."""
    opted_out = discovery.is_opted_out()
    if discovery.started_up and not opted_out:
        yield Finding(True, "discovery", "the start-up file is active")
    elif _ext_trainer_is_ours():
        yield Finding(True, "discovery", "nnUNet_extTrainer points to our folder")
    else:
        if opted_out:
            cause = f"{discovery.OPT_OUT}=0 switches the start-up file off: unset it"
        else:
            cause = (
                "the start-up file nnunetv2_meddinov3.pth was not read: install this package with "
                "pip into the environment of nnU-Net"
            )
        variable = f'export nnUNet_extTrainer="{cli.ext_path()}"'
        yield Finding(False, "discovery", f"{cause}, or {variable}, or use `meddinov3 train`")


def examine_search() -> Iterator[Finding]:
    """Check that nnU-Net's own search finds our classes, as in a stock command."""
    command = [sys.executable, "-c", _STOCK_SEARCH]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        last_line = (run.stderr.strip().splitlines() or ["it gave no message"])[-1]
        yield Finding(False, "nnU-Net's search", f"cannot be run: {last_line}; reinstall nnunetv2")
        return
    trainer, planner = json.loads(run.stdout.splitlines()[-1])
    yield Finding(not trainer, "-tr MedDINOv3Trainer", trainer or "found by nnU-Net")
    if planner and not trainer and _ext_trainer_is_ours():
        # nnU-Net has no such variable for planners, so this way there is nothing to fix.
        planner, sentence = "", "nnUNet_extTrainer serves trainers only: use `meddinov3 plan`"
    else:
        sentence = planner or "found by nnU-Net"
    yield Finding(not planner, "-pl MedDINOv3Planner", sentence)


def examine_folders() -> Iterator[Finding]:
    """Check nnU-Net's three variables, and the folders they name."""
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        complaint = _folder_complaint(variable, must_be_writable=variable != "nnUNet_raw")
        yield Finding(not complaint, variable, complaint or os.environ[variable])


def examine_variables() -> Iterator[Finding]:
    """Check our own variables: what is set, and whether a name or a value is mistyped."""
    settings.check_variables()
    settings.backbone_setting()
    settings.checkpointing_setting()
    for name in ("MEDDINOV3_EPOCHS", "MEDDINOV3_ITERATIONS"):
        settings.count_setting(name)
    values = [f"{n}={os.environ[n]}" for n in settings.VARIABLES if os.environ.get(n)]
    yield Finding(True, "MEDDINOV3_* variables", ", ".join(values) or "none is set")


def examine_weights() -> Iterator[Finding]:
    """Check that the weights ``-tr MedDINOv3Trainer`` would start from are available."""
    from nnunetv2_meddinov3.models.resolve import describe_weights_source

    trainer: Any = discovery.resolve("MedDINOv3Trainer")
    value = settings.weights_setting() or trainer.weights
    ok, sentence = describe_weights_source(value)
    yield Finding(ok, "weights", sentence)


def _version(distribution: str, at_least: str = "0", below: str = "") -> Finding:
    wanted = f"{distribution}>={at_least}" + (f",<{below}" if below else "")
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return Finding(False, distribution, f'not installed: pip install "{wanted}"')
    if _numbers(version) < _numbers(at_least) or (below and _numbers(version) >= _numbers(below)):
        return Finding(False, distribution, f'{version} does not fit: pip install "{wanted}"')
    return Finding(True, distribution, version)


def _numbers(version: str) -> list[int]:
    """Return the release numbers of a version: ``2.8.1+cpu`` -> [2, 8, 1]."""
    return [int(number) for number in re.split(r"[^\d.]", version)[0].split(".") if number]


def _ext_trainer_is_ours() -> bool:
    folders = os.environ.get("nnUNet_extTrainer", "").split(os.pathsep)
    return any(folder and Path(folder).resolve() == cli.ext_path() for folder in folders)


def _folder_complaint(variable: str, must_be_writable: bool) -> str:
    """Return what is wrong with a folder of nnU-Net's, nothing if all is well."""
    folder = os.environ.get(variable)
    if not folder:
        return f"not set: export {variable}=FOLDER"
    if not Path(folder).is_dir():
        return f"there is no folder {folder}: create it, or export {variable}=FOLDER"
    if must_be_writable:
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            return f"cannot write to {folder} ({first_line(error)}): export {variable}=FOLDER"
    return ""
