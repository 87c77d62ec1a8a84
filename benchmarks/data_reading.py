"""What it costs to read a training patch from nnU-Net's blosc2 files, beside augmenting it.

    python benchmarks/data_reading.py --sizes 224 512 896

A phantom of 512 x 512 pixels a slice is written as nnU-Net's preprocessing writes it, for each
patch size. Then image and labels of random places are read as nnU-Net's loader reads them: as large
as rotation and scaling may need, and only as large as the patch, which would do for the patches
that are neither rotated nor scaled. One thread, CPU time, in turns; files are in the page cache.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from augmentation_speed import make_patch
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.training.dataloading.nnunet_dataset import (
    comp_blosc2_params,
    nnUNetDatasetBlosc2,
)
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_meddinov3.augmentation import faster
from nnunetv2_meddinov3.demo.phantom import make_phantom

_ROTATION = (-np.pi, np.pi)


def main() -> None:
    """Print a line for each size."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 512, 896])
    parser.add_argument("--patches", type=int, default=100)
    parser.add_argument("--slices", type=int, default=40)
    args = parser.parse_args()
    torch.set_num_threads(1)
    image, labels = make_phantom(
        np.random.default_rng(0), (args.slices, 512, 512), (4.0, 0.75, 0.75)
    )
    print(f"torch {torch.__version__}; {vars(args)} ms a patch: medians")
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            dataset = written(Path(folder), image, labels, size)
            read = get_patch_size((size, size), _ROTATION, _ROTATION, _ROTATION, (0.85, 1.25))
            sides = {"as nnU-Net": [int(s) for s in read], "no larger than needed": [size, size]}
            spent = {name: [] for name in [*sides, "augmentation"]}
            augment = faster(
                nnUNetTrainer.get_training_transforms(
                    (size, size), _ROTATION, None, (0, 1), False, use_mask_for_norm=[False]
                )
            )
            patch, truth = make_patch(size)
            rng = np.random.default_rng(0)
            for _ in range(args.patches):
                centre = rng.integers([0, 100, 100], [args.slices, 412, 412])
                for name, (height, width) in sides.items():
                    start = time.process_time()
                    read_patch(dataset, centre, height, width)
                    spent[name].append(time.process_time() - start)
                inputs = {"image": patch.clone(), "segmentation": truth.clone()}
                start = time.process_time()
                augment(**inputs)
                spent["augmentation"].append(time.process_time() - start)
        # most patches are augmented little and some much: what counts is the mean
        medians = {name: 1000 * statistics.median(times) for name, times in spent.items()}
        medians["augmentation"] = 1000 * statistics.mean(spent["augmentation"])
        said = "   ".join(f"{name} {ms:.2f}" for name, ms in medians.items())
        print(f"{size:5} px (read as {sides['as nnU-Net']})   {said} (mean)", flush=True)


def written(folder: Path, image: np.ndarray, labels: np.ndarray, size: int) -> nnUNetDatasetBlosc2:
    """Write a case as nnU-Net's preprocessing does for a 2D patch of this size."""
    data = ((image - image.mean()) / image.std()).astype(np.float32)[None]
    seg = labels.astype(np.int16)[None]
    blocks, chunks = comp_blosc2_params(data.shape, (size, size), data.itemsize)
    blocks_seg, chunks_seg = comp_blosc2_params(seg.shape, (size, size), seg.itemsize)
    nnUNetDatasetBlosc2.save_case(
        data,
        seg,
        {},
        str(folder / "case"),
        chunks=chunks,
        blocks=blocks,
        chunks_seg=chunks_seg,
        blocks_seg=blocks_seg,
    )
    return nnUNetDatasetBlosc2(str(folder))


def read_patch(dataset: nnUNetDatasetBlosc2, centre: np.ndarray, height: int, width: int) -> None:
    """Open the case and read image and labels about a place, as nnU-Net's loader does."""
    data, seg, _, _ = dataset.load_case("case")
    z, y, x = (int(each) for each in centre)
    top, left = y - height // 2, x - width // 2
    box = [[z, z + 1], [top, top + height], [left, left + width]]
    torch.from_numpy(crop_and_pad_nd(data, box, 0)).float()
    torch.from_numpy(crop_and_pad_nd(seg, box, -1)).to(torch.int16)


if __name__ == "__main__":
    main()
