"""What a run says of itself: command, versions, code, machine; beside its config."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import timm
import torch

from nnunetv2_meddinov3 import __version__
from nnunetv2_meddinov3.files import replacing
from nnunetv2_meddinov3.pretrain.folders import CONFIG, RUN_FACTS
from nnunetv2_meddinov3.pretrain.runtime import Runtime


def versions() -> dict[str, str]:
    """Return the versions that can change numbers."""
    return {
        "nnunetv2_meddinov3": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
    }


def git_state() -> dict[str, Any] | None:
    """Return commit and cleanness of the checkout this code runs from, None if it is none."""
    folder = Path(__file__).resolve().parent
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return {"commit": commit, "clean": not _git(folder, "status", "--porcelain")}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=10,
    )
    return done.stdout.strip()


def run_facts(runtime: Runtime) -> dict[str, Any]:
    """Return what ``run.json`` holds."""
    device = runtime.device
    return {
        "command": sys.argv,
        "versions": versions(),
        "git": git_state(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "world_size": runtime.world_size,
        "precision": runtime.precision,
    }


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all.

    Raises:
        UserError: If it cannot be written.
    """
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def write_run_facts(folder: Path, config_yaml: str, runtime: Runtime) -> None:
    """Write ``config.yaml`` and ``run.json`` of a stage."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / CONFIG, config_yaml)
    write_text(folder / RUN_FACTS, json.dumps(run_facts(runtime), indent=1) + "\n")
