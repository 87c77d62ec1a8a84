"""Where and how a stage runs: ranks and device, DDP or FSDP2, precision, compilation."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch._dynamo.config as dynamo_config
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.models.precision import has_bf16
from nnunetv2_meddinov3.pretrain.config import Engine
from nnunetv2_meddinov3.pretrain.distillation import Distillation
from nnunetv2_meddinov3.pretrain.stages import world_size
from nnunetv2_meddinov3.pretrain.student import GramTeacher, Student

_LOST_RANK_AFTER = timedelta(minutes=30)  # saving, probing and compiling keep the others waiting
_AVERAGES_ON_CPU = torch.__version__ >= "2.9"  # FSDP2 with gloo; torch compares versions here
_MAX_GRAPHS = 64  # torch gives up compiling after 8, fewer than three networks of five resolutions


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


@contextlib.contextmanager
def started(engine: Engine) -> Iterator[Runtime]:
    """Join the processes that torchrun started, if it did, and leave them at the end.

    What this sets for the whole process (precision of matrix products, number of compiled graphs,
    warnings) is put back at the end.

    Raises:
        UserError: If the device is missing, SLURM started several processes without torchrun, or
            FSDP2 of this PyTorch is wrong there.
    """
    processes = world_size()
    if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        raise UserError(
            "the processes of a run must be started by torchrun, but srun started "
            f"{os.environ['SLURM_STEP_NUM_TASKS']} alike: use one task per node and "
            "`srun torchrun ... -m nnunetv2_meddinov3 pretrain ...` (docs/pretraining.md)."
        )
    device = _device(engine)
    joined = processes > 1
    if joined and engine.parallel == "fsdp2" and device.type == "cpu" and not _AVERAGES_ON_CPU:
        raise UserError(
            f"FSDP2 on CPUs needs PyTorch 2.9 or later, but this is {torch.__version__}, which "
            "adds the gradients of the processes there instead of averaging them: set "
            "engine.parallel=ddp, or install a later PyTorch."
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with _process_wide_settings(device):
        if joined:
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=_LOST_RANK_AFTER)
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


@contextlib.contextmanager
def _process_wide_settings(device: torch.device) -> Iterator[None]:
    limit = "recompile_limit" if hasattr(dynamo_config, "recompile_limit") else "cache_size_limit"
    graphs = max(getattr(dynamo_config, limit), _MAX_GRAPHS)
    before = torch.get_float32_matmul_precision()
    with dynamo_config.patch({limit: graphs}), warnings.catch_warnings():
        # FSDP2 warns of tokens, which are views of one tensor; nothing changes them in place
        warnings.filterwarnings("ignore", message=".*returned a view tensor.*")
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


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
    return "bf16" if has_bf16(device) else "fp32"


class Parallel:
    """The student as it is run, and the contexts it runs in.

    Gradients are averaged over ranks. The teacher is not wrapped by DDP: every rank moves its copy
    in the same way. Under FSDP2 teachers are sharded as the student is.

    Args:
        distillation: On its device.
        engine: ``parallel`` says which way.
        runtime: This process.

    Attributes:
        student: What runs the student: itself, or DDP around it.
    """

    def __init__(self, distillation: Distillation, engine: Engine, runtime: Runtime) -> None:
        self.student: nn.Module = distillation.student
        self.runtime = runtime
        self.is_sharded = engine.parallel == "fsdp2" and dist.is_initialized()
        if runtime.compile:
            _compile(distillation)
        if self.is_sharded:
            _shard(distillation, runtime)
        elif dist.is_initialized():
            ids = [runtime.device.index] if runtime.device.type == "cuda" else None
            self.student = DistributedDataParallel(
                distillation.student,
                device_ids=ids,
                broadcast_buffers=False,  # rotary periods never change
                gradient_as_bucket_view=True,
            )

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Compute in bf16 where asked; FSDP2 casts its shards itself."""
        wanted = self.runtime.precision == "bf16" and not self.is_sharded
        with torch.autocast(self.runtime.device.type, torch.bfloat16, enabled=wanted):
            yield

    @contextlib.contextmanager
    def accumulating(self, is_last: bool) -> Iterator[None]:
        """Exchange gradients with the other ranks at the last micro-batch of a step alone."""
        if isinstance(self.student, FSDPModule):
            self.student.set_requires_gradient_sync(is_last)
            yield
        elif isinstance(self.student, DistributedDataParallel) and not is_last:
            with self.student.no_sync():
                yield
        else:
            yield


def _compile(distillation: Distillation) -> None:
    """Compile each block by itself: shapes are static, and the graphs are small.

    One function serves all blocks of three networks, with a graph for each resolution of each.
    """
    for network in _networks(distillation):
        for block in network.backbone.vit.blocks:
            block.compile(dynamic=False)


def _shard(distillation: Distillation, runtime: Runtime) -> None:
    mesh = init_device_mesh(runtime.device.type, (runtime.world_size,))
    policy = MixedPrecisionPolicy()
    if runtime.precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    # blocks get what the module above them made; casting it again would round rotary embeddings
    inner = dataclasses.replace(policy, cast_forward_inputs=False)
    for network in _networks(distillation):
        for block in network.backbone.vit.blocks:
            fully_shard(block, mesh=mesh, mp_policy=inner)
        for head in ("dino_head", "ibot_head"):
            if hasattr(network, head):
                fully_shard(getattr(network, head), mesh=mesh, mp_policy=policy)
        # without a backward pass nothing else would give the teachers' shards back
        reshard = network is not distillation.student
        fully_shard(network, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
        if reshard:  # torch 2.7 takes no such word of a root module
            network.register_forward_hook(_give_shards_back)


def _give_shards_back(network: nn.Module, inputs: object, outputs: object) -> None:
    assert isinstance(network, FSDPModule)
    network.reshard()


def _networks(distillation: Distillation) -> list[Student | GramTeacher]:
    found = [distillation.student, distillation.teacher, distillation.gram_teacher]
    return [network for network in found if network is not None]
