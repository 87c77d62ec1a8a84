"""How fast slices become views: this package against torchvision on 8-bit pictures, in turns.

    python benchmarks/views_speed.py --slices 16 --rounds 7

One thread. From 512 x 512 slices: two global crops of 256 and eight local ones of 112 pixels. The
reference is torchvision.transforms.v2 on PIL pictures of three channels with the steps of DINO
(crop, flip, colour jitter, blur, to float, normalise), which is what the original runs; its hue,
saturation and greyscale do nothing on grey.
"""

import argparse
import multiprocessing
import os
import statistics
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from nnunetv2_meddinov3.demo.phantom import make_phantom
from nnunetv2_meddinov3.pretrain.config import load_config
from nnunetv2_meddinov3.pretrain.views import Slices, make_views
from nnunetv2_meddinov3.processes import peak_gb

_PLAIN = [
    f"augment.{name}_probability=0"
    for name in ("window", "contrast", "gamma", "noise", "low_resolution")
] + ["augment.blur_probability=[0,0,0]"]


def main() -> None:
    """Time the three ways in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slices", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    slices = synthetic_slices(arguments.slices)
    ways = {
        "ours, all changes": ours(slices, []),
        "ours, geometry alone": ours(slices, _PLAIN),
        "torchvision, all changes": theirs(slices),
    }
    peaks = {name: megabytes(make) for name, make in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(arguments.rounds + 1):
        for name, make in ways.items():
            start = time.process_time()
            make(turn)
            if turn:  # the first warms up
                seconds[name].append(time.process_time() - start)
    reference = statistics.median(seconds["torchvision, all changes"])
    print(f"{'':28}images/s   ms/image   ratio    peak MB")
    for name, times in seconds.items():
        median = statistics.median(times)
        rate, each = len(slices) / median, 1000 * median / len(slices)
        row = f"{name:28}{rate:8.1f}   {each:8.1f}   {reference / median:5.2f} x"
        print(f"{row}   {peaks[name]:8.0f}")


def megabytes(make) -> float:
    """Return what one call adds to the peak memory of a process that has made nothing yet."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_measure, args=(make, sender))
    child.start()
    added = receiver.recv()
    child.join()
    return added


def _measure(make, sender) -> None:
    before = peak_gb()
    make(0)
    sender.send((peak_gb() - before) * 1e9 / 2**20)


def synthetic_slices(count: int) -> list[np.ndarray]:
    """Return (512, 512) slices of phantoms."""
    ct, _ = make_phantom(np.random.default_rng(0), (count, 512, 512), (8.0, 0.75, 0.75))
    return list(ct)


def ours(slices: list[np.ndarray], overrides: list[str]):
    """Return a function that makes the views of all slices."""
    config = load_config("vitb16_stage1", overrides)

    def make(turn: int) -> None:
        make_views(Slices.of(slices), config.crops.resolutions[0], config, (0, turn))

    return make


def theirs(slices: list[np.ndarray]):
    """Return a function that does the same with torchvision on PIL pictures."""
    pictures = []
    for each in slices:
        grey = np.clip((each.astype(np.float32) + 1000) / 2000 * 255, 0, 255).astype(np.uint8)
        pictures.append(Image.fromarray(np.repeat(grey[..., None], 3, 2)))

    def crop(size: int, scale: tuple[float, float], blur: float) -> v2.Compose:
        return v2.Compose(
            [
                v2.RandomResizedCrop(size, scale, interpolation=v2.InterpolationMode.BICUBIC),
                v2.RandomHorizontalFlip(),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                v2.RandomGrayscale(p=0.2),
                v2.RandomApply([v2.GaussianBlur(9, (0.1, 2.0))], p=blur),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            ]
        )

    first, second = (crop(256, (0.32, 1.0), blur) for blur in (0.0, 0.9))
    local = crop(112, (0.05, 0.32), 0.5)

    def make(turn: int) -> None:
        torch.manual_seed(turn)
        for picture in pictures:
            torch.stack([first(picture), second(picture)])
            torch.stack([local(picture) for _ in range(8)])

    return make


if __name__ == "__main__":
    main()
