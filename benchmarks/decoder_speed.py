"""Time the decoder as matrix products on tokens against the plain convolutions, in one run.

Interleaved, median of the repetitions, the ratio against the plain decoder of the same run.

    python benchmarks/decoder_speed.py --grid 28 --width 3072 --classes 16
"""

import argparse
import statistics
import time
from typing import Literal

import torch

from nnunetv2_meddinov3.models.decoder import TokenDecoder


def run(decoder: TokenDecoder, tokens: torch.Tensor, grid: int, training: bool) -> float:
    """Return the seconds of one forward pass, with its backward pass if ``training``."""
    decoder.zero_grad(set_to_none=True)
    start = time.perf_counter()
    with torch.set_grad_enabled(training):
        logits = decoder(tokens, (grid, grid))
        if training:
            logits.square().mean().backward()
    if tokens.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Print a table: chunk of tokens, seconds, ratio to the plain decoder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grid", type=int, default=28, help="patches along each side")
    parser.add_argument("--width", type=int, default=3072, help="width of the aggregated tokens")
    parser.add_argument("--classes", type=int, default=16)
    parser.add_argument("--chunks", type=int, nargs="+", default=[512])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    decoder = TokenDecoder(args.width, args.classes).to(args.device)
    tokens = torch.randn(1, args.grid**2, args.width, device=args.device, requires_grad=True)
    variants: list[int | Literal["auto"] | None] = [None, "auto", *args.chunks]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.device}")
    for training in (False, True):
        seconds: dict[object, list[float]] = {chunk: [] for chunk in variants}
        for repetition in range(args.repetitions + 1):
            for chunk in variants:
                decoder.chunk = chunk
                elapsed = run(decoder, tokens, args.grid, training)
                if repetition:  # the first round warms up
                    seconds[chunk].append(elapsed)
        plain = statistics.median(seconds[None])
        print("\nforward and backward" if training else "\nforward")
        for chunk in variants:
            median = statistics.median(seconds[chunk])
            name = f"{chunk} tokens at a time" if isinstance(chunk, int) else chunk
            name = name or "plain convolutions"
            print(f"{name:24} {median:8.3f} s   {plain / median:5.2f} x")


if __name__ == "__main__":
    main()
