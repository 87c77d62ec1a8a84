"""Where a run stands: its rank, device and precision, and the signals that end it early."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType

import torch
from torch import Tensor
from torch import distributed as dist

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.pretrain.config import Engine

_LOST_RANK_AFTER = timedelta(minutes=30)  # saving, probing and compiling keep the others waiting


@dataclass(frozen=True)
class Runtime:
    """The place of this process among all of a run.

    Attributes:
        rank: Of this process.
        world_size: Number of processes.
        device: Where it computes.
        precision: ``"bf16"`` or ``"fp32"``.
        compile: Whether blocks are compiled.
    """

    rank: int
    world_size: int
    device: torch.device
    precision: str
    compile: bool

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def reduce(self, values: Tensor, operation: str = "SUM") -> Tensor:
        """Combine a tensor of every rank in place, if there are several."""
        if self.world_size > 1:
            dist.all_reduce(values, op=getattr(dist.ReduceOp, operation))
        return values

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            dist.barrier()

    def gather(self, value: object) -> list:
        """Return the value of every rank, on every rank."""
        if self.world_size == 1:
            return [value]
        out: list = [None] * self.world_size
        dist.all_gather_object(out, value)
        return out


def world_size() -> int:
    """Return the number of processes that torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def started(engine: Engine) -> Iterator[Runtime]:
    """Join the processes that torchrun started, if it did, and leave them at the end.

    Raises:
        UserError: If the device is not there, or SLURM started several processes without torchrun.
    """
    processes = world_size()
    if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        raise UserError(
            "the processes of a run must be started by torchrun, but srun started "
            f"{os.environ['SLURM_STEP_NUM_TASKS']} alike: use one task per node and "
            "`srun torchrun ... -m nnunetv2_meddinov3 pretrain ...` (docs/pretraining.md)."
        )
    device = _device(engine)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    joined = processes > 1
    if joined:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", timeout=_LOST_RANK_AFTER
        )
    try:
        yield Runtime(
            rank=int(os.environ.get("RANK", "0")) if joined else 0,
            world_size=processes,
            device=device,
            precision=_precision(engine, device),
            compile=engine.compile == "always"
            or (engine.compile == "auto" and device.type == "cuda"),
        )
    finally:
        if joined:
            dist.destroy_process_group()


def _device(engine: Engine) -> torch.device:
    available = torch.cuda.is_available()
    if engine.device == "cuda" and not available:
        raise UserError(
            "engine.device=cuda needs a GPU that PyTorch can use, but there is none: set "
            "engine.device=cpu, or install PyTorch for this GPU's driver."
        )
    if engine.device == "cpu" or not available:
        return torch.device("cpu")
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= count:
        raise UserError(
            f"every process of a node needs a GPU of its own, but process {local + 1} found "
            f"{count}: start torchrun with --nproc-per-node {count}."
        )
    return torch.device("cuda", local)


def _precision(engine: Engine, device: torch.device) -> str:
    if engine.precision != "auto":
        return engine.precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


class Stop:
    """Notes SIGTERM, SIGUSR1 and SIGINT, so that the step at work is finished and saved.

    SLURM sends the first two before it takes a node away (``--signal``), torchrun hands SIGTERM on
    to its processes. A second Ctrl-C ends at once.
    """

    _SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Stop:
        for name in self._SIGNALS:
            if number := getattr(signal, name, None):  # Windows lacks SIGUSR1
                with contextlib.suppress(ValueError):  # not the main thread
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = int(number)
