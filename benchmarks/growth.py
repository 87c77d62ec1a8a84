"""How time and memory grow, and the exponent: t ~ n ** exponent between the two largest n.

    python benchmarks/growth.py                 # all, a few minutes
    python benchmarks/growth.py side slices     # some

    side      forward pass of ViT-S, pixels along an image
    batch     the same at 224 pixels, images
    labels    labels of a slice of 512 x 512 from its logits, resampled, classes
    slices    prediction of a volume with 105 classes by a network of two layers, slices
    rows      build of a store's index, slices in it
    excluded  search for slices that look like an excluded one, excluded slices

Each point is measured in a process of its own: the median seconds of three runs, and the peak of
the process above what it held before. One thread.
"""

import argparse
import atexit
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from nnunetv2_meddinov3.processes import forget_peak, peak_gb

POINTS = {
    "side": [224, 448, 896, 1536],
    "batch": [1, 2, 4, 8],
    "labels": [2, 16, 64, 105],
    "slices": [10, 50, 250, 500],
    "rows": [40_000, 400_000, 4_000_000],
    "excluded": [1_000, 10_000, 100_000, 1_000_000],
}


def side(pixels: int, images: int = 1) -> Callable[[], object]:
    """A forward pass of ViT-S on square images."""
    import torch

    from nnunetv2_meddinov3.models import build_segmenter

    network = build_segmenter("vit_small", 16).eval()
    batch = torch.randn(images, 1, pixels, pixels)

    def forward() -> object:
        with torch.inference_mode():
            return network(batch)

    return forward


def batch(images: int) -> Callable[[], object]:
    """The same for several images of 224 pixels."""
    return side(224, images)


def labels(classes: int) -> Callable[[], object]:
    """Labels of a slice of 512 x 512 from logits of 448 x 448, as a prediction makes them."""
    import functools

    import torch
    from nnunetv2.preprocessing.resampling.resample_torch import resample_torch_fornnunet

    from nnunetv2_meddinov3.prediction.slicewise import slice_resampling

    class Configuration:
        spacing = (0.8, 0.8)
        resampling_fn_probabilities = functools.partial(
            resample_torch_fornnunet, is_seg=False, force_separate_z=False
        )

    resample = slice_resampling(Configuration, (3.0, 0.7, 0.7), (1, 1))  # type: ignore[arg-type]
    assert resample is not None
    logits = torch.randn(classes, 448, 448).half()
    return lambda: resample(logits, (512, 512)).argmax(0)


def slices(count: int) -> Callable[[], object]:
    """The sliding window over a volume of 128 x 128 pixels a slice, 105 classes, labels kept."""
    import torch
    from torch import nn

    from nnunetv2_meddinov3.prediction.sliding_window import SlidingWindow

    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 105, 1)).eval()
    volume = torch.randn(1, count, 128, 128)
    tiles = [
        (slice(None), z, slice(y, y + 64), slice(x, x + 64))
        for z in range(count)
        for y in (0, 32, 64)
        for x in (0, 32, 64)
    ]
    window = SlidingWindow([network], torch.device("cpu"), 105)

    def predict() -> object:
        found = np.empty(volume.shape[1:], np.uint8)
        with torch.inference_mode():
            for z, logits in window.slices(volume, tiles):
                found[z] = logits.argmax(0)
        return found

    return predict


def rows(count: int) -> Callable[[], object]:
    """The build of an index, from records of 400 slices each."""
    from slice_store import write_records

    from nnunetv2_meddinov3.store.index import build_index

    folder = Path(tempfile.mkdtemp(prefix="growth-"))
    atexit.register(shutil.rmtree, folder)
    write_records(count, folder / "store")
    return lambda: build_index(folder / "store")


def excluded(count: int) -> Callable[[], object]:
    """The search of a thousand slices in their eight symmetries."""
    from nnunetv2_meddinov3.store.fingerprints import NearHashes

    rng = np.random.default_rng(0)
    near = NearHashes(rng.integers(0, 2**64, count, dtype=np.uint64), 4)
    asked = rng.integers(0, 2**64, (1000, 8), dtype=np.uint64)
    return lambda: [near.any_near(each) for each in asked]


def point(name: str, n: int) -> None:
    """Measure one point in this process and print seconds and GB."""
    work = globals()[name](n)
    forget_peak()
    before = peak_gb() or 0.0
    times = []
    for _ in range(1 if name == "rows" else 3):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    print(f"{statistics.median(times)} {(peak_gb() or 0.0) - before}")


def main() -> None:
    """Print a table for each thing that grows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="*", default=list(POINTS), help=", ".join(POINTS))
    parser.add_argument("--point", type=int, help="measure this one here, in this process")
    args = parser.parse_args()
    if args.point is not None:
        point(args.what[0], args.point)
        return
    for name in args.what:
        print(f"\n{name}: {(globals()[name].__doc__ or '').splitlines()[0]}")
        found: list[tuple[int, float, float]] = []
        for n in POINTS[name]:
            command = [sys.executable, __file__, name, "--point", str(n)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            seconds, gb = (float(text) for text in done.stdout.split()[-2:])
            found.append((n, seconds, gb))
            print(f"{n:>12,}{seconds:10.3f} s{gb * 1000:10.0f} MB", flush=True)
        (m, before, less), (n, after, more) = found[-2:]
        time_exponent = math.log(after / before) / math.log(n / m)
        print(f"{'exponent':>12}{time_exponent:10.2f}", end="")
        if less > 0.005:  # GB; below, gaps of the allocator are all there is
            print(f"{math.log(more / less) / math.log(n / m):12.2f}", end="")
        print()


if __name__ == "__main__":
    main()
