"""Time the trainers' augmentation against nnU-Net's own: patches per second and core, in turns.

    python benchmarks/augmentation_speed.py --sizes 224 512 896

Both take the same patches with the same seeds, as large as nnU-Net reads them, with 15 labels; CPU
time of one thread. The labels that differ are counted.
"""

import argparse
import statistics
import time

import numpy as np
import torch
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_meddinov3.augmentation import faster

_ROTATION = (-np.pi, np.pi)
_LABELS = 15


def main() -> None:
    """Print a line for each size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 512, 896])
    parser.add_argument("--patches", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}; {vars(args)}")
    for size in args.sizes:
        stock = nnUNetTrainer.get_training_transforms(
            (size, size), _ROTATION, None, (0, 1), False, use_mask_for_norm=[False]
        )
        ways = {"nnU-Net": stock, "ours": faster(stock)}
        image, labels = make_patch(size)
        rates: dict[str, list[float]] = {name: [] for name in ways}
        different = total = 0
        for _ in range(args.rounds):
            seconds = dict.fromkeys(ways, 0.0)
            for seed in range(args.patches):
                found = []
                for name in ways if seed % 2 else [*ways][::-1]:
                    np.random.seed(seed)  # noqa: NPY002  nnU-Net draws from the global generators
                    torch.manual_seed(seed)
                    inputs = {"image": image.clone(), "segmentation": labels.clone()}
                    start = time.process_time()
                    done = ways[name](**inputs)
                    seconds[name] += time.process_time() - start
                    found.append(done["segmentation"])
                different += int((found[0] != found[1]).sum())
                total += found[0].numel()
            for name, spent in seconds.items():
                rates[name].append(args.patches / spent)
        theirs, ours = (statistics.median(each) for each in rates.values())
        ratios = [b / a for a, b in zip(*rates.values(), strict=True)]
        print(
            f"{size:5} px   nnU-Net {theirs:7.1f}/s   ours {ours:7.1f}/s   "
            f"{statistics.median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f})   "
            f"{different} of {total} labels differ",
            flush=True,
        )


def make_patch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return noise and discs as large as nnU-Net reads for a patch: (1, H, W) each."""
    read = get_patch_size((size, size), _ROTATION, _ROTATION, _ROTATION, (0.85, 1.25))
    height, width = (int(side) for side in read)
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    labels = np.zeros((1, height, width), np.int16)
    for label in range(1, _LABELS + 1):
        row, column = rng.uniform(0, [height, width])
        labels[0][(y - row) ** 2 + (x - column) ** 2 < (rng.uniform(0.05, 0.2) * size) ** 2] = label
    image = rng.normal(size=labels.shape).astype(np.float32) + labels
    return torch.from_numpy(image.astype(np.float32)), torch.from_numpy(labels)


if __name__ == "__main__":
    main()
