"""SLURM scripts of a recipe: one that prepares, and an array with a task per job."""

from __future__ import annotations

import shlex
from pathlib import Path

from nnunetv2_meddinov3.benchmark.jobs import OURS
from nnunetv2_meddinov3.benchmark.recipe import Recipe
from nnunetv2_meddinov3.files import write_text

_HEAD = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --output={out}/slurm_%A_%a.txt
#SBATCH --cpus-per-task=12
#SBATCH --time={time}
{more}set -euo pipefail
{exports}
"""


def write_scripts(recipe: Recipe, name: str, out: Path, count: int, device: str) -> list[Path]:
    """Write ``prepare.sbatch`` and ``train.sbatch``.

    Time limits and the number of CPUs are meant to be edited.

    Args:
        recipe: The comparison.
        name: What the command was given as its recipe.
        out: Folder of the results, which every node sees.
        count: Number of jobs.
        device: nnU-Net's ``-device``.

    Returns:
        Both scripts.

    Raises:
        UserError: If they cannot be written.
    """
    import os

    exports = "\n".join(
        f"export {variable}={shlex.quote(os.environ[variable])}"
        for variable in ("nnUNet_raw", "nnUNet_preprocessed")
    )
    base = shlex.join(
        [*OURS, "benchmark", "run", name, "-o", str(out.resolve()), "-device", device]
    )
    given = {"out": str(out.resolve()), "exports": exports}
    gpu = "#SBATCH --gres=gpu:1\n" if device == "cuda" else ""
    prepare = _HEAD.format(name=f"{recipe.name}-prepare", time="24:00:00", more="", **given)
    array = f"#SBATCH --array=0-{count - 1}\n#SBATCH --requeue\n{gpu}"
    train = _HEAD.format(name=recipe.name, time="48:00:00", more=array, **given)
    scripts = {
        "prepare.sbatch": f"{prepare}{base} --prepare\n",
        "train.sbatch": f'{train}{base} --job "$SLURM_ARRAY_TASK_ID"\n',
    }
    out.mkdir(parents=True, exist_ok=True)
    for file, text in scripts.items():
        write_text(out / file, text)
    return [out / file for file in scripts]
