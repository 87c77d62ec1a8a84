"""Fine-tune from several starting weights with the same budget and seeds, and compare the Dice.

    python benchmarks/transfer.py 801 2d_192 --weights none run/stage3/teacher.safetensors \
        --backbone vit_tiny --epochs 10 --iterations 40 --seeds 3 --out results

Runs stock nnU-Net (`nnUNetv2_train`) in this process's environment, one run after the other,
weights in turns, and prints the mean Dice of each run's validation cases. Every run has its own
results folder; finished runs are not run again.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

# nnU-Net has no seed: what it draws is seeded before it starts, data augmentation in this process
_RUN = (
    "import random, sys, numpy, torch; seed = int(sys.argv.pop(1));"
    "random.seed(seed); numpy.random.seed(seed); torch.manual_seed(seed);"
    "import nnunetv2_meddinov3.cli;"
    "from nnunetv2.run.run_training import run_training_entry; run_training_entry()"
)


def main() -> None:
    """Run every combination and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset")
    parser.add_argument("configuration")
    parser.add_argument("--weights", nargs="+", required=True)
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--fold", default="0")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    dice: dict[str, list[float]] = {weights: [] for weights in arguments.weights}
    for seed in range(arguments.seeds):
        for number, weights in enumerate(arguments.weights):
            folder = arguments.out / f"weights{number}_seed{seed}"
            seconds = _train(arguments, weights, seed, folder)
            (summary,) = folder.glob(f"*/*/fold_{arguments.fold}/validation/summary.json")
            value = json.loads(summary.read_text())["foreground_mean"]["Dice"]
            dice[weights].append(value)
            print(f"seed {seed}  {weights}  Dice {value:.4f}  {seconds:.0f} s", flush=True)
    for weights, values in dice.items():
        spread = f" +- {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        print(
            f"{weights}: mean Dice {statistics.mean(values):.4f}{spread} over {len(values)} seeds"
        )


def _train(arguments: argparse.Namespace, weights: str, seed: int, folder: Path) -> float:
    if list(folder.glob(f"*/*/fold_{arguments.fold}/validation/summary.json")):
        return 0.0
    folder.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "nnUNet_results": str(folder),
        "nnUNet_n_proc_DA": "0",
        "MEDDINOV3_WEIGHTS": weights,
        "MEDDINOV3_BACKBONE": arguments.backbone,
        "MEDDINOV3_EPOCHS": str(arguments.epochs),
        "MEDDINOV3_ITERATIONS": str(arguments.iterations),
    }
    command = [sys.executable, "-c", _RUN, str(seed), arguments.dataset, arguments.configuration]
    command += [arguments.fold, "-tr", "MedDINOv3Trainer", "-p", "nnUNetMedDINOv3Plans"]
    command += ["-device", "cuda" if _has_gpu() else "cpu"]
    start = time.monotonic()
    with (folder / "log.txt").open("w") as log:
        subprocess.run(command, env=environment, stdout=log, stderr=log, check=True)
    return time.monotonic() - start


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    main()
