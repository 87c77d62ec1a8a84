"""``meddinov3 bench``: how fast this machine trains and predicts, and which sizes fit into it."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2_meddinov3 import files, settings
from nnunetv2_meddinov3.errors import UserError

if TYPE_CHECKING:
    import torch

_PATCH = 16  # pixels
_ROOM = 0.9  # share of a GPU's memory that a training may take; nnU-Net's own needs the rest
_STEPS = 250  # of an epoch of nnU-Net's
_LEAST_BATCH = 2  # of nnU-Net's planner


@dataclass
class Row:
    """What was measured at one size.

    Attributes:
        size: Side of the images in pixels.
        forward_s: Seconds of a forward pass of one image.
        forward_gflops: Billions of operations per second in it.
        step_s: Seconds of a training step of one image, AdamW included.
        step_gflops: Billions of operations per second in it.
        memory_gb: Peak of a training step of one image: allocated on a GPU, of the process on a
            CPU.
        batch: Images that a GPU's memory holds in training; None on a CPU.
    """

    size: int
    forward_s: float
    forward_gflops: float
    step_s: float
    step_gflops: float
    memory_gb: float
    batch: int | None


def main(argv: list[str] | None = None) -> int:
    """Measure and print.

    Raises:
        UserError: If an argument cannot be used, or not even the smallest size fits.
    """
    parser = argparse.ArgumentParser(
        prog="meddinov3 bench",
        description="Measure how fast this machine trains and predicts, as a share of its own rate "
        "of matrix products, and which sizes (2d_N) and batches fit. Weights are random: nothing "
        "is read, and nothing but -o is written.",
    )
    parser.add_argument("--backbone", default="vit_base", help="default: vit_base")
    parser.add_argument(
        "--sizes", type=int, nargs="+", help="pixels; default: 224 448, and 896 on a GPU"
    )
    parser.add_argument("--classes", type=int, default=16, help="default: 16")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=3, help="counted runs of each; default: 3")
    parser.add_argument("-o", "--out", type=Path, help="also write the figures here, as JSON")
    args = parser.parse_args(argv)
    _check(args)
    bench(args)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse arguments before torch is imported."""
    if args.backbone not in settings.SIZE_NAMES:
        raise UserError(
            f"--backbone must be one of {', '.join(settings.SIZE_NAMES)}, got {args.backbone!r}."
        )
    for size in args.sizes or ():
        if size < _PATCH or size % _PATCH:
            raise UserError(f"--sizes must be multiples of {_PATCH} pixels, got {size}.")
    for name in ("classes", "rounds"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(args, name)}.")
    if args.out is not None:
        files.check_writable(args.out.parent)


def bench(args: argparse.Namespace) -> None:
    """Measure every size, the smallest first, and print a table."""
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda needs a GPU, but torch sees none: take --device cpu.")
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    is_gpu = name == "cuda"
    dtype = torch.float32
    if is_gpu:
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    sizes = sorted(set(args.sizes or ([224, 448, 896] if is_gpu else [224, 448])))
    where = torch.cuda.get_device_name() if is_gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.backbone}, {args.classes} classes; {where}; torch {torch.__version__}, {dtype}")
    rate = matrix_rate(device, dtype, args.rounds)
    print(f"matrix products: {rate:.0f} GFLOP/s\n")
    print(f"{'':8}{'forward':>10}{'GFLOP/s':>16}{'training step':>16}{'GFLOP/s':>16}{'memory':>10}")
    rows = []
    for size in sizes:
        try:
            row = measure(args.backbone, args.classes, size, device, dtype, args.rounds)
        except torch.OutOfMemoryError:
            print(f"2d_{size:<5}  does not fit into the memory of this GPU")
            break
        rows.append(row)
        print(_line(row, rate), flush=True)
    if not rows:
        raise UserError(
            f"a training step of 2d_{sizes[0]} must fit, but it does not: take a smaller "
            "--backbone or smaller --sizes."
        )
    print("\n" + "\n".join(_advice(rows)))
    if args.out is not None:
        found = {
            "backbone": args.backbone,
            "classes": args.classes,
            "device": where,
            "torch": torch.__version__,
            "dtype": str(dtype),
            "matrix_gflops": rate,
            "rows": [asdict(row) for row in rows],
        }
        files.write_text(args.out, json.dumps(found, indent=1) + "\n")


def measure(
    backbone: str,
    classes: int,
    size: int,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
) -> Row:
    """Measure one size with a network of its own.

    Raises:
        torch.OutOfMemoryError: If a training step of one image does not fit.
    """
    import torch

    from nnunetv2_meddinov3.models import build_segmenter
    from nnunetv2_meddinov3.processes import forget_peak, peak_gb

    torch.manual_seed(0)
    network = build_segmenter(backbone, classes).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)

    def forward(images: torch.Tensor) -> None:
        network.eval()
        with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=_is_low(dtype)):
            network(images)

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        network.train()
        with torch.autocast(device.type, dtype, enabled=_is_low(dtype)):
            loss = torch.nn.functional.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def inputs(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        images = torch.randn(batch, 1, size, size, device=device)
        return images, torch.randint(classes, (batch, size, size), device=device)

    images, labels = inputs(1)
    if device.type == "cuda":
        peaks = []
        for batch in (1, 2):
            torch.cuda.reset_peak_memory_stats()
            try:
                for _ in range(2):  # the first makes the optimiser's state
                    step(*inputs(batch))
            except torch.OutOfMemoryError:
                if batch == 1:
                    raise
                break
            peaks.append(torch.cuda.max_memory_allocated() / 1e9)
        total = torch.cuda.get_device_properties(device).total_memory / 1e9
        memory, fitting = peaks[0], fitting_batch(peaks, _ROOM * total)
    else:
        forget_peak()
        step(images, labels)
        memory, fitting = peak_gb() or float("nan"), None
    forward_s = seconds_of(lambda: forward(images), device, rounds)
    step_s = seconds_of(lambda: step(images, labels), device, rounds)
    return Row(
        size,
        forward_s,
        operations_of(lambda: forward(images)) / forward_s / 1e9,
        step_s,
        operations_of(lambda: step(images, labels)) / step_s / 1e9,
        memory,
        fitting,
    )


def fitting_batch(peaks_gb: list[float], room_gb: float) -> int:
    """Return the largest batch whose peak fits, from the peaks of one image and of two.

    Args:
        peaks_gb: Of one, and of two if these fit.
        room_gb: Memory for them.
    """
    if len(peaks_gb) < 2 or peaks_gb[1] > room_gb:
        return 1
    each = max(peaks_gb[1] - peaks_gb[0], 1e-9)
    return 1 + int((room_gb - peaks_gb[0]) / each)


def matrix_rate(device: torch.device, dtype: torch.dtype, rounds: int) -> float:
    """Return the GFLOP/s of large matrix products on a device."""
    import torch

    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / seconds_of(lambda: a @ b, device, max(rounds, 5)) / 1e9


def seconds_of(function: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """Return the median seconds of a function, after one run that is not counted."""
    import torch

    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def operations_of(function: Callable[[], Any]) -> int:
    """Return the floating-point operations of a function's matrix products and attention."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop

    def attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return sdpa_flop(query, key, value)

    def backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return sdpa_backward_flop(grad, query, key, value)

    ops = torch.ops.aten
    on_cpu = {  # which torch's counter does not know
        ops._scaled_dot_product_flash_attention_for_cpu: attention,
        ops._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    with FlopCounterMode(display=False, custom_mapping=on_cpu) as counter:
        function()
    return counter.get_total_flops()


def _is_low(dtype: torch.dtype) -> bool:
    return dtype.itemsize < 4


def _line(row: Row, rate: float) -> str:
    def share(gflops: float) -> str:
        return f"{gflops:,.0f} ({gflops / rate:.0%})"

    return (
        f"2d_{row.size:<5}{row.forward_s:8.3f} s{share(row.forward_gflops):>16}"
        f"{row.step_s:14.3f} s{share(row.step_gflops):>16}{row.memory_gb:7.1f} GB"
    )


def _advice(rows: list[Row]) -> list[str]:
    """Return lines about what fits and how long an epoch takes."""
    lines = []
    for row in rows:
        batch = row.batch or _LEAST_BATCH
        minutes = _STEPS * batch * row.step_s / 60
        what = f"an epoch of {_STEPS} steps of {batch} images takes about {minutes:,.0f} min"
        fits = "" if row.batch is None else f"batch_size up to {row.batch} fits in training; "
        lines.append(f"2d_{row.size}: {fits}{what}")
    fitting = [row for row in rows if row.batch is not None and row.batch >= _LEAST_BATCH]
    if fitting:
        largest = fitting[-1]
        lines.append(
            f"recommended: MEDDINOV3_SIZE={largest.size}, the largest size with room for a batch "
            f"of {_LEAST_BATCH} (batch_size {largest.batch} in the plans)"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
