"""How a stage runs on several processes: DDP or FSDP2, accumulation, precision, compilation."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator

import torch
import torch._dynamo.config as dynamo_config
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_meddinov3.pretrain.config import Engine
from nnunetv2_meddinov3.pretrain.distillation import Distillation
from nnunetv2_meddinov3.pretrain.runtime import Runtime
from nnunetv2_meddinov3.pretrain.student import GramTeacher, Student

_MOST_GRAPHS = 64  # torch gives up compiling after 8, fewer than three networks of five resolutions


class Parallel:
    """The student as it is run, and the contexts in which.

    Gradients are averaged over ranks. The teacher is not wrapped by DDP: every rank moves its copy
    in the same way. Under FSDP2 teachers are sharded as the student is.

    Args:
        distillation: On its device; DDP is put around its student.
        engine: ``parallel`` says which way.
        runtime: This process.
    """

    def __init__(self, distillation: Distillation, engine: Engine, runtime: Runtime) -> None:
        self.distillation, self.runtime = distillation, runtime
        self.is_sharded = engine.parallel == "fsdp2" and dist.is_initialized()
        if runtime.compile:
            _compile(distillation)
        self._ddp: DistributedDataParallel | None = None
        if self.is_sharded:
            _shard(distillation, runtime)
        elif dist.is_initialized():
            ids = [runtime.device.index] if runtime.device.type == "cuda" else None
            self._ddp = DistributedDataParallel(
                distillation.student,
                device_ids=ids,
                broadcast_buffers=False,  # rotary periods never change
                gradient_as_bucket_view=True,
            )
            distillation.run_student_by(self._ddp)

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Compute in bf16 where asked; FSDP2 casts its shards itself."""
        wanted = self.runtime.precision == "bf16" and not self.is_sharded
        with torch.autocast(self.runtime.device.type, torch.bfloat16, enabled=wanted):
            yield

    @contextlib.contextmanager
    def accumulating(self, is_last: bool) -> Iterator[None]:
        """Exchange gradients with the other ranks at the last micro-batch of a step alone."""
        if self.is_sharded:
            self.distillation.student.set_requires_gradient_sync(is_last)
            yield
        elif self._ddp is not None and not is_last:
            with self._ddp.no_sync():
                yield
        else:
            yield


def _compile(distillation: Distillation) -> None:
    """Compile each block by itself: shapes are static, and the graphs are small.

    One function serves all blocks of three networks, with a graph for each resolution of each.
    """
    limit = "recompile_limit" if hasattr(dynamo_config, "recompile_limit") else "cache_size_limit"
    setattr(dynamo_config, limit, max(getattr(dynamo_config, limit), _MOST_GRAPHS))
    for network in _networks(distillation):
        for block in network.backbone.vit.blocks:
            block.compile(dynamic=False)


def _networks(distillation: Distillation) -> list[Student | GramTeacher]:
    found = [distillation.student, distillation.teacher, distillation.gram_teacher]
    return [network for network in found if network is not None]


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
    # tokens are views of one tensor; nothing changes them in place
    warnings.filterwarnings("ignore", message=".*returned a view tensor.*")
