"""How long ``meddinov3 evaluate`` takes for one large case, and its memory, against MONAI's calls.

    python benchmarks/evaluation_speed.py [--shape 500 512 512] [--labels 15] [--monai-labels 1]

The case is synthetic: ellipsoids at random places, as large as organs, and a prediction that is the
same shifted by a voxel with holes in it. The reference is MONAI's four functions (Dice, both NSDs,
HD95) on the whole volume, a label at a time as its memory demands; it is timed for a few labels.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch

from nnunetv2_meddinov3.processes import peak_gb

SPACING = (1.0, 0.8, 0.8)  # mm, (z, y, x)


def make_case(folder: Path, shape: tuple[int, int, int], labels: int) -> None:
    """Write a reference and a prediction as nnU-Net names them."""
    rng = np.random.default_rng(0)
    reference = np.zeros(shape, dtype=np.uint8)
    for label in range(1, labels + 1):
        radii = [max(4, int(side * rng.uniform(0.05, 0.15))) for side in shape]
        centre = [rng.integers(r + 1, side - r - 1) for r, side in zip(radii, shape, strict=True)]
        box = tuple(slice(c - r, c + r + 1) for c, r in zip(centre, radii, strict=True))
        axes = np.ogrid[tuple(slice(-r, r + 1) for r in radii)]
        inside = sum((a / r) ** 2 for a, r in zip(axes, radii, strict=True)) <= 1
        reference[box][inside] = label
    prediction = np.roll(reference, 1, axis=2)
    prediction[rng.random(shape, dtype=np.float32) < 1e-4] = 0
    names = {"background": 0} | {f"organ {n}": n for n in range(1, labels + 1)}
    for part, array in (("labels", reference), ("predictions", prediction)):
        image = sitk.GetImageFromArray(array)
        image.SetSpacing(SPACING[::-1])
        (folder / part).mkdir()
        sitk.WriteImage(image, str(folder / part / "case.nii.gz"), useCompression=True)
    content = {"labels": names, "file_ending": ".nii.gz", "channel_names": {"0": "CT"}}
    (folder / "dataset.json").write_text(json.dumps(content | {"numTraining": 1}))


_OURS = """
import sys
from nnunetv2_meddinov3.cli import main
from nnunetv2_meddinov3.processes import peak_gb
main(sys.argv[1:])
print(peak_gb())
"""


def ours(folder: Path) -> tuple[float, float]:
    """Return the seconds and the peak memory in GB of the command in a process of its own."""
    command = ["evaluate", folder / "predictions", folder / "labels", "-o", folder / "out"]
    command += ["--dataset-json", folder / "dataset.json", "-np", "1"]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _OURS, *map(str, command)],
        capture_output=True,
        text=True,
        check=True,
    )
    return time.perf_counter() - start, float(done.stdout.split()[-1])


def monai(folder: Path, labels: int) -> float:
    """Return the seconds per label of MONAI's functions on whole masks."""
    from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice

    arrays = [
        sitk.GetArrayFromImage(sitk.ReadImage(str(folder / part / "case.nii.gz")))
        for part in ("predictions", "labels")
    ]
    start = time.perf_counter()
    for label in range(1, labels + 1):
        masks = [torch.from_numpy(array == label)[None, None] for array in arrays]
        compute_dice(*masks, include_background=True)
        for subvoxels in (False, True):
            more = {"spacing": list(SPACING), "use_subvoxels": subvoxels}
            compute_surface_dice(*masks, [1.0], include_background=True, **more)
        compute_hausdorff_distance(*masks, True, percentile=95, spacing=list(SPACING))
    return (time.perf_counter() - start) / labels


def main() -> None:
    """Make the case, run both, print a row each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=3, default=[500, 512, 512])
    parser.add_argument("--labels", type=int, default=15)
    parser.add_argument("--monai-labels", type=int, default=1, help="0 leaves MONAI out")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_case(folder, tuple(arguments.shape), arguments.labels)
        seconds, memory = ours(folder)
        print(f"meddinov3 evaluate  {seconds:7.1f} s   {memory:5.2f} GB")
        if arguments.monai_labels:
            each = monai(folder, arguments.monai_labels)
            whole = each * arguments.labels
            print(
                f"MONAI on the volume {whole:7.1f} s   {peak_gb():5.2f} GB   ({each:.1f} s a label)"
            )


if __name__ == "__main__":
    main()
