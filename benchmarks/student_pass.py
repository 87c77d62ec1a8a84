"""How fast the student's pass over all crops is, against timm's blocks group by group, in turns.

    python benchmarks/student_pass.py --images 8 --depth 2 --rounds 5

Forward and backward of a ViT-S cut to some blocks, 2 x 224 and 8 x 96 pixels per image, one thread,
fp32. Reference: one forward for each group of crops through timm's blocks, with drop path that
computes every image and masks some. Ours: one pass, and dropped images are not computed.
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from timm.layers import DropPath

from nnunetv2_meddinov3.models.architecture import architecture_of
from nnunetv2_meddinov3.models.backbone import Backbone
from nnunetv2_meddinov3.pretrain.student import StochasticOptions, encode, pack_blocks

_RATE = 0.3


def main() -> None:
    """Time the three ways in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    architecture = architecture_of("vit_small", depth=arguments.depth)
    b = arguments.images
    groups = [torch.randn(2 * b, 3, 224, 224), torch.randn(8 * b, 3, 96, 96)]
    packed = pack_blocks(Backbone(architecture, mask_token=True)).train()
    plain = Backbone(architecture, mask_token=True).train()
    for block in plain.vit.blocks:
        block.drop_path1, block.drop_path2 = DropPath(_RATE), DropPath(_RATE)
    ways = {
        "timm, group by group": lambda: one_by_one(plain, groups),
        "one pass, nothing dropped": lambda: together(packed, groups, 0.0),
        "one pass, dropped images skipped": lambda: together(packed, groups, _RATE),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(arguments.rounds + 1):
        for name, run in ways.items():
            start = time.process_time()
            run()
            if turn:  # the first warms up
                seconds[name].append(time.process_time() - start)
    reference = statistics.median(seconds["timm, group by group"])
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"{name:34}{median:7.2f} s   {reference / median:5.2f} x")


def one_by_one(backbone: Backbone, groups: list[torch.Tensor]) -> None:
    """Forward each group by itself, then backward."""
    last = [backbone.depth - 1]
    losses = [backbone.intermediate_tokens(g, last)[0].cls.square().mean() for g in groups]
    sum(losses).backward()


def together(backbone: Backbone, groups: list[torch.Tensor], rate: float) -> None:
    """Forward all groups in one pass, then backward."""
    generator = torch.Generator().manual_seed(0)
    tokens = encode(backbone, groups, None, StochasticOptions(drop_path=rate), generator)
    sum(t.cls.square().mean() for t in tokens).backward()


if __name__ == "__main__":
    main()
