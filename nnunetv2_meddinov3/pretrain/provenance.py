"""What a run says of itself: command, versions, code, machine, slices; beside its config."""

from __future__ import annotations

import configparser
import functools
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import timm
import torch

from nnunetv2_meddinov3 import __version__
from nnunetv2_meddinov3.files import write_text
from nnunetv2_meddinov3.models.architecture import Architecture
from nnunetv2_meddinov3.pretrain.distributed import Runtime
from nnunetv2_meddinov3.pretrain.run_folder import CONFIG, PROVENANCE
from nnunetv2_meddinov3.store.reader import SliceStore

_PACKAGE = Path(__file__).resolve().parents[1]
_DISTRIBUTION = "nnunetv2-meddinov3"


def versions() -> dict[str, str]:
    """Return the versions that can change numbers."""
    return {
        _PACKAGE.name: __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
    }


@functools.cache
def git_state() -> dict[str, Any] | None:
    """Return commit and cleanness of our own checkout, asked of git once a process.

    Returns:
        None where this code does not run from a checkout of this project: of an installed package,
        which may lie in a repository of the user's, ``versions`` says what runs.
    """
    try:
        top = Path(_git("rev-parse", "--show-toplevel"))
        if not _is_ours(top):
            return None
        _git("ls-files", "--error-unmatch", str(_PACKAGE / "__init__.py"))
        return {"commit": _git("rev-parse", "HEAD"), "clean": not _git("status", "--porcelain")}
    except (OSError, subprocess.SubprocessError):
        return None


def _is_ours(top: Path) -> bool:
    """Return whether a repository is this project's, as its metadata say."""
    metadata = configparser.ConfigParser(interpolation=None)
    try:
        metadata.read(top / "setup.cfg", encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError):
        return False
    return metadata.get("metadata", "name", fallback=None) == _DISTRIBUTION


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(_PACKAGE), *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=10,
    )
    return done.stdout.strip()


def run_provenance(runtime: Runtime, architecture: Architecture, base: str) -> str:
    """Return what ``run.json`` holds.

    Args:
        runtime: This process.
        architecture: Of the backbone that is trained.
        base: What the first stage started from.
    """
    device = runtime.device
    facts = {
        "command": sys.argv,
        "versions": versions(),
        "git": git_state(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "world_size": runtime.world_size,
        "precision": runtime.precision,
        "architecture": architecture.to_dict(),
        "base": base,
    }
    return json.dumps(facts, indent=1) + "\n"


def write_provenance(folder: Path, config_yaml: str, provenance: str) -> None:
    """Write ``config.yaml`` and ``run.json`` of a stage.

    Args:
        folder: Of the stage.
        config_yaml: What the first holds.
        provenance: What ``run_provenance`` returned.

    Raises:
        UserError: If they cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / CONFIG, config_yaml)
    write_text(folder / PROVENANCE, provenance)


def store_provenance(store: SliceStore, rows: np.ndarray) -> dict[str, Any]:
    """Return what a checkpoint says of the slices it was trained on.

    Returns:
        ``records_sha256`` of the store, number of ``slices``, median in-plane ``spacing_mm`` (y, x)
        or None where unknown.
    """
    taken = store.rows.select(["spacing_y", "spacing_x"]).take(rows)
    medians = [pc.approximate_median(taken[name]).as_py() for name in taken.column_names]
    return {
        "records_sha256": store.records_sha256,
        "slices": len(rows),
        "spacing_mm": None if None in medians else medians,
    }
