"""Where a stage starts: random weights, any pretrained backbone, or an earlier stage."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.models.architecture import Architecture, architecture_of
from nnunetv2_meddinov3.models.backbone import Backbone
from nnunetv2_meddinov3.models.build import resolve_source
from nnunetv2_meddinov3.pretrain.checkpoints import read_state
from nnunetv2_meddinov3.pretrain.config import Head, StageConfig
from nnunetv2_meddinov3.pretrain.distillation import Distillation, LossOptions
from nnunetv2_meddinov3.pretrain.gram import gram_teacher_of
from nnunetv2_meddinov3.pretrain.heads import ProjectionHead
from nnunetv2_meddinov3.pretrain.intensity import check_same_contract
from nnunetv2_meddinov3.pretrain.networks import read_student
from nnunetv2_meddinov3.pretrain.origins import check_size, fitted, state_of
from nnunetv2_meddinov3.pretrain.student import Noise, Student

OWN_LICENCE = "that of whoever trained them: the run started from random weights"
_NO_WEIGHTS = "none"


@dataclass
class Start:
    """The networks of a stage before its first step.

    Attributes:
        distillation: On the CPU.
        architecture: Of the backbone.
        licence: Terms of the weights.
        base: What the first stage started from.
        optimizer: State of AdamW to go on with, or None.
    """

    distillation: Distillation
    architecture: Architecture
    licence: str
    base: str
    optimizer: dict[str, Any] | None = None


@dataclass
class _Networks:
    """What a source gives: both branches, and facts that go into the export."""

    student: Student
    teacher: Student
    licence: str
    base: str
    optimizer: dict[str, Any] | None = None


def loss_options(config: StageConfig) -> LossOptions:
    """Return the options of a config that stay the same over its stage."""
    losses = config.losses
    return LossOptions(
        dino_weight=losses.dino_weight,
        ibot_weight=losses.ibot_weight,
        koleo_weight=losses.koleo_weight,
        koleo_group=losses.koleo_group,
        ignore_diagonal=losses.ignore_diagonal,
        student_temp=losses.student_temp,
        gram=losses.gram.weight is not None,
        gram_from_teacher=losses.gram.teacher == "ema",
    )


def noise_of(config: StageConfig) -> Noise:
    """Return what the student of a config draws in training."""
    model = config.model
    return Noise(model.drop_path, model.rope_shift, model.rope_jitter, model.rope_rescale)


def load_start(
    config: StageConfig, previous: Path | None, state: dict[str, Any] | None = None
) -> Start:
    """Build the networks of a stage.

    Args:
        config: Of the stage.
        previous: Folder of the stage before, for ``init.source`` and Gram teachers that need it.
        state: A training state that will be loaded into the networks: they are built with its
            sizes and nothing else is read.

    Raises:
        UserError: If weights cannot be read, or do not fit the config.
    """
    if state is not None:
        return _empty(config, state)
    source = str(previous) if config.init.source == "previous" else config.init.source
    torch.manual_seed(config.optim.seed)  # of random weights and fresh heads
    networks = _from_stage(config, Path(source)) or _from_weights(config, source)
    networks.student.noise = noise_of(config)
    networks.student.backbone.vit.set_grad_checkpointing(config.engine.activation_checkpointing)
    architecture = networks.student.backbone.architecture
    distillation = Distillation(
        networks.student,
        networks.teacher,
        gram_teacher_of(config, previous, networks.teacher.backbone),
        loss_options(config),
    )
    return Start(distillation, architecture, networks.licence, networks.base, networks.optimizer)


def _empty(config: StageConfig, state: dict[str, Any]) -> Start:
    """Networks of a state's sizes, to be filled by it."""
    architecture = Architecture(**state["architecture"])
    needs_gram = loss_options(config).gram and not loss_options(config).gram_from_teacher
    student = _fresh(Backbone(architecture, mask_token=True), config)
    student.backbone.vit.set_grad_checkpointing(config.engine.activation_checkpointing)
    distillation = Distillation(
        student,
        _fresh(Backbone(architecture, mask_token=True), config),
        Backbone(architecture, mask_token=True) if needs_gram else None,
        loss_options(config),
    )
    student.noise = noise_of(config)
    return Start(distillation, architecture, state["licence"], state["base"])


def _fresh(backbone: Backbone, config: StageConfig) -> Student:
    """A backbone with new heads."""
    heads = (_new_head(backbone.embed_dim, h) for h in (config.heads.dino, config.heads.ibot))
    return Student(backbone, *heads)


def _new_head(width: int, head: Head) -> ProjectionHead:
    return ProjectionHead(width, head.prototypes, head.hidden_dim, head.bottleneck_dim, head.layers)


def _from_weights(config: StageConfig, source: str) -> _Networks:
    """Random or pretrained weights without heads: the teacher starts as the student's copy."""
    if source.lower() == _NO_WEIGHTS:
        model = config.model
        architecture = architecture_of(
            model.size,
            qkv_bias=model.qkv_bias,
            norm_eps=model.norm_eps,
            rope_dtype=model.rope_dtype,
            input_channels=model.input_channels,
        )
        student = _fresh(Backbone(architecture, mask_token=True), config)
        return _Networks(student, copy.deepcopy(student), OWN_LICENCE, "random weights")
    checkpoint = resolve_source(source)
    check_same_contract(checkpoint.metadata, config, source)
    backbone = fitted(checkpoint, config, source)
    student = _fresh(backbone, config)
    base = checkpoint.metadata.get("base", source)
    return _Networks(student, copy.deepcopy(student), checkpoint.licence, base)


def _from_stage(config: StageConfig, source: Path) -> _Networks | None:
    """An earlier stage's networks with heads; None if the source is not one."""
    state_path = state_of(source)
    if state_path is None:
        return None
    state = read_state(state_path)
    check_same_contract({"intensity": state["intensity"]}, config, str(source))
    overrides = {k: state["architecture"][k] for k in ("norm_eps", "rope_dtype", "layer_scale")}
    teacher = read_student(state_path, "teacher", **overrides)
    keeps_both = config.init.student == "student"
    student = (
        read_student(state_path, "student", **overrides) if keeps_both else copy.deepcopy(teacher)
    )
    check_size(student.backbone.architecture, config, str(source))
    _check_heads(student, config, source)
    optimizer = state["optimizer"] if config.init.optimizer else None
    return _Networks(student, teacher, state["licence"], state["base"], optimizer)


def _check_heads(student: Student, config: StageConfig, source: Path) -> None:
    for name, head in (("dino", config.heads.dino), ("ibot", config.heads.ibot)):
        with torch.device("meta"):
            wanted = _new_head(student.backbone.embed_dim, head).state_dict()
        found = getattr(student, f"{name}_head").state_dict()
        if {k: t.shape for k, t in found.items()} != {k: t.shape for k, t in wanted.items()}:
            raise UserError(
                f"the heads of {source} must have the sizes of heads.{name}, but they differ "
                f"({len(found['last_layer.weight'])} prototypes there, {head.prototypes} here): "
                "give the same sizes."
            )
