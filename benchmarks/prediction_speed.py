"""Time ``meddinov3 predict`` against stock ``nnUNetv2_predict``: whole commands, in turns.

A model is planned and trained for one iteration on synthetic CT, then one held-out CT is predicted
by both commands with the same arguments. Start-up, reading, resampling and writing are counted.
Memory is that of all processes of a command together (PSS), sampled ten times a second. At the end
the label files are compared voxel by voxel.

    python benchmarks/prediction_speed.py --backbone vit_tiny --size 256
    python benchmarks/prediction_speed.py --backbone vit_tiny --size 256 --spacing 0.8 --mirror
    python benchmarks/prediction_speed.py --trainer UNetTrainer
    python benchmarks/prediction_speed.py --labels 105 --slices 100 --repetitions 1
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch

from nnunetv2_meddinov3.demo.phantom import make_phantom, write_phantom_dataset

NUMBER, NAME = "701", "Dataset701_Speed"
TRAINING_SPACING = 0.75  # mm within slices


def main() -> None:
    """Print seconds, memory and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trainer", default="MedDINOv3Trainer_scratch")
    parser.add_argument("--backbone", default="vit_tiny")
    parser.add_argument("--size", type=int, default=256, help="side of a tile in pixels")
    parser.add_argument("--slices", type=int, default=60)
    parser.add_argument("--side", type=int, default=512, help="of the image, in pixels")
    parser.add_argument("--spacing", type=float, default=TRAINING_SPACING, help="of the image, mm")
    parser.add_argument("--labels", type=int, default=0, help="with background; default 4")
    parser.add_argument("--cases", type=int, default=1)
    parser.add_argument("--mirror", action="store_true", help="average over mirrored tiles")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {args.device}; {vars(args)}")
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), args)


def compare(folder: Path, args: argparse.Namespace) -> None:
    """Make a model, predict in turns, print."""
    environment = {**os.environ, "nnUNet_n_proc_DA": "1", "nnUNet_compile": "f"}
    for part in ("raw", "preprocessed", "results"):
        environment[f"nnUNet_{part}"] = str(folder / part)
    environment |= {"MEDDINOV3_BACKBONE": args.backbone, "MEDDINOV3_SIZE": str(args.size)}
    environment |= {"MEDDINOV3_EPOCHS": "1", "MEDDINOV3_ITERATIONS": "1"}
    model = make_model(folder, args, environment)
    draw_cases(folder / "images", args)
    predict = ["-i", str(folder / "images"), *model, "-f", "0", "-device", args.device]
    predict += [] if args.mirror else ["--disable_tta"]
    commands = {"nnUNetv2_predict": [tool("nnUNetv2_predict"), *predict]}
    commands["meddinov3 predict"] = [tool("meddinov3"), "predict", *predict]
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    peaks: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(args.repetitions):
        for name, command in commands.items():
            took, peak = run([*command, "-o", str(folder / name)], environment)
            seconds[name].append(took)
            peaks[name].append(peak)
    print(f"\n{'':20}{'seconds':>10}{'least':>9}{'most':>9}{'peak GB':>9}")
    for name, times in seconds.items():
        median, peak = statistics.median(times), statistics.median(peaks[name])
        print(f"{name:20}{median:10.1f}{min(times):9.1f}{max(times):9.1f}{peak:9.2f}")
    stock, ours = (statistics.median(times) for times in seconds.values())
    stock_gb, our_gb = (statistics.median(each) for each in peaks.values())
    print(f"{stock / ours:.2f} x as fast, {our_gb / stock_gb:.2f} x the memory")
    different = total = 0
    for path in sorted((folder / "nnUNetv2_predict").glob("*.nii.gz")):
        other = folder / "meddinov3 predict" / path.name
        a, b = (sitk.GetArrayFromImage(sitk.ReadImage(str(each))) for each in (path, other))
        different, total = different + int((a != b).sum()), total + a.size
    print(f"{different} of {total} voxels have another label")


def make_model(folder: Path, args: argparse.Namespace, environment: dict[str, str]) -> list[str]:
    """Plan and train on small phantoms; return the arguments that name the model."""
    raw = folder / "raw" / NAME
    spacing = (5.0, TRAINING_SPACING, TRAINING_SPACING)
    write_phantom_dataset(raw, 5, 0, shape=(4, args.side, args.side), spacing_mm=spacing)
    description = json.loads((raw / "dataset.json").read_text())
    for value in range(len(description["labels"]), args.labels):
        description["labels"][f"label {value}"] = value
    (raw / "dataset.json").write_text(json.dumps(description))
    configuration, plans = f"2d_{args.size}", "nnUNetMedDINOv3Plans"
    plan = ["-d", NUMBER, "-pl", "MedDINOv3Planner", "-c", configuration, "-np", "1", "-npfp", "1"]
    run([tool("nnUNetv2_plan_and_preprocess"), *plan], environment)
    train = [NUMBER, configuration, "0", "-tr", args.trainer, "-p", plans, "-device", args.device]
    run([tool("nnUNetv2_train"), *train], {**environment, "nnUNet_n_proc_DA": "0"})
    return ["-d", NUMBER, "-c", configuration, "-tr", args.trainer, "-p", plans]


def draw_cases(folder: Path, args: argparse.Namespace) -> None:
    """Write the held-out images."""
    folder.mkdir()
    spacing = (5.0, args.spacing, args.spacing)
    for case in range(args.cases):
        few = (min(args.slices, 60), args.side, args.side)
        ct, _ = make_phantom(np.random.default_rng([1, case]), few, spacing)
        ct = np.resize(ct, (args.slices, args.side, args.side))  # repeated from 60 slices on
        image = sitk.GetImageFromArray(ct)
        image.SetSpacing(spacing[::-1])
        sitk.WriteImage(image, str(folder / f"case_{case}_0000.nii.gz"), useCompression=True)


def tool(name: str) -> str:
    """Return a command of this environment."""
    return str(Path(sys.executable).with_name(name))


def run(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Return the seconds of a command and the most memory of its processes together, in GB."""
    with tempfile.TemporaryFile() as said:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, env=environment, stdout=said, stderr=said, start_new_session=True
        )
        peak = [0.0]
        ended = threading.Event()
        watcher = threading.Thread(target=watch, args=(process.pid, peak, ended))
        watcher.start()
        try:
            code = process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            ended.set()
        took = time.perf_counter() - start
        watcher.join()
        if code:
            said.seek(0)
            sys.exit(f"{command[0]} ended with {code}:\n{said.read().decode()[-3000:]}")
    return took, peak[0]


def watch(session: int, peak: list[float], ended: threading.Event) -> None:
    """Note the largest sum of the PSS of all processes of a session, in GB."""
    while not ended.wait(0.1):
        total = 0
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if os.getsid(int(folder.name)) == session:
                    lines = (folder / "smaps_rollup").read_text().splitlines()
                    total += next(int(line.split()[1]) for line in lines if line[:4] == "Pss:")
            except (OSError, StopIteration):
                continue
        peak[0] = max(peak[0], total * 1024 / 1e9)


if __name__ == "__main__":
    main()
