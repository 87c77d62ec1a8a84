"""Time and peak memory of one training step of the whole network, each variant in its own process.

python benchmarks/training_step.py --backbone vit_base --size 896 --batch 2
"""

import argparse
import subprocess
import sys
import time

import torch
from torch.nn import functional as F

from nnunetv2_meddinov3.models import build_segmenter
from nnunetv2_meddinov3.processes import peak_gb

VARIANTS = {
    "token decoder": {"chunk": 512, "checkpointing": False},
    "token decoder, ViT recomputed": {"chunk": 512, "checkpointing": True},
    "plain decoder": {"chunk": None, "checkpointing": False},
}


def step(args: argparse.Namespace, variant: str) -> None:
    """Run one step of AdamW and print seconds and peak memory in GB."""
    torch.manual_seed(0)
    network = build_segmenter(args.backbone, args.classes).to(args.device).train()
    network.decoder.chunk = VARIANTS[variant]["chunk"]
    network.backbone.vit.set_grad_checkpointing(VARIANTS[variant]["checkpointing"])
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5)
    images = torch.randn(args.batch, 1, args.size, args.size, device=args.device)
    labels = torch.randint(args.classes, (args.batch, args.size, args.size), device=args.device)
    start = time.perf_counter()
    with torch.autocast("cuda", enabled=images.is_cuda):
        loss = F.cross_entropy(network(images), labels)
    loss.backward()
    optimizer.step()
    if images.is_cuda:
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / 1e9
    else:
        peak = peak_gb()
    seconds = time.perf_counter() - start
    print(f"{variant:32} {seconds:8.1f} s   {peak:6.2f} GB   loss {float(loss.detach()):.4f}")


def main() -> None:
    """Run every variant in a process of its own, so that each has its own peak."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="vit_base")
    parser.add_argument("--size", type=int, default=896, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--classes", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--variant", choices=VARIANTS, help="run this one here, in this process")
    args = parser.parse_args()
    if args.variant:
        step(args, args.variant)
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.device}")
    for variant in VARIANTS:
        done = subprocess.run([sys.executable, *sys.argv, "--variant", variant], check=False)
        if done.returncode:
            print(f"{variant:32} failed with exit code {done.returncode}")


if __name__ == "__main__":
    main()
