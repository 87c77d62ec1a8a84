"""Where a stage starts: random weights, any pretrained backbone, or an earlier stage."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.models.architecture import Architecture, architecture_of
from nnunetv2_meddinov3.models.backbone import Backbone
from nnunetv2_meddinov3.models.build import backbone_from, resolve_source
from nnunetv2_meddinov3.models.weights import Checkpoint, read_checkpoint
from nnunetv2_meddinov3.pretrain.checkpoints import CheckpointFolder, read_state
from nnunetv2_meddinov3.pretrain.contract import check_same_contract
from nnunetv2_meddinov3.pretrain.distillation import Distillation, LossOptions
from nnunetv2_meddinov3.pretrain.encoder import Noise, Student
from nnunetv2_meddinov3.pretrain.folders import CHECKPOINTS, EXPORT, export_path
from nnunetv2_meddinov3.pretrain.heads import ProjectionHead
from nnunetv2_meddinov3.pretrain.initialise import read_student
from nnunetv2_meddinov3.pretrain.schema import Head, StageConfig

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
        remove_negatives=losses.gram.remove_negatives,
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
        _gram_teacher(config, previous, networks),
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
    backbone = _fitted(checkpoint, config, source)
    student = _fresh(backbone, config)
    base = checkpoint.metadata.get("base", source)
    return _Networks(student, copy.deepcopy(student), checkpoint.licence, base)


def _fitted(checkpoint: Checkpoint, config: StageConfig, source: str) -> Backbone:
    """Build a checkpoint's backbone with the config's input channels and a mask token.

    Raises:
        UserError: If it is of another size than the config's.
    """
    check_size(checkpoint.architecture, config, source)
    channels = config.model.input_channels
    stem = checkpoint.tensors["patch_embed.proj.weight"]
    if stem.shape[1] != channels:
        # one grey channel through the sum of the kernels gives what repeating it gives
        stem = stem.sum(1, keepdim=True).expand(-1, channels, -1, -1) / channels
        checkpoint.tensors["patch_embed.proj.weight"] = stem.contiguous()
        checkpoint.architecture = replace(checkpoint.architecture, input_channels=channels)
    backbone = backbone_from(checkpoint)
    if backbone.mask_token is None:
        backbone.mask_token = nn.Parameter(torch.zeros(1, backbone.embed_dim))
    return backbone


def check_size(found: Architecture, config: StageConfig, source: str) -> None:
    """Refuse weights of another size than ``model.size``.

    Raises:
        UserError: With what differs.
    """
    wanted = architecture_of(config.model.size)
    fields = ("embed_dim", "depth", "num_heads", "ffn", "ffn_hidden", "patch_size")
    differ = [
        f"{name} {getattr(found, name)} instead of {getattr(wanted, name)}"
        for name in fields
        if getattr(found, name) != getattr(wanted, name)
    ]
    if differ:
        raise UserError(
            f"the weights must be a {config.model.size} as model.size says, but {source} has "
            f"{', '.join(differ)}: take the config of its size, or other weights."
        )


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


def state_of(source: Path) -> Path | None:
    """Return the training state that a path means: a stage, a checkpoint's folder, its file."""
    if source.is_dir():
        if (source / CHECKPOINTS).is_dir():
            latest = CheckpointFolder(source / CHECKPOINTS).latest()
            if latest is None:
                raise UserError(f"{source} must hold a checkpoint, but its stage saved none yet.")
            return latest
        return source / "state.pt" if (source / "state.pt").is_file() else None
    return source if source.name == "state.pt" and source.is_file() else None


def _check_heads(student: Student, config: StageConfig, source: Path) -> None:
    for name, head in (("dino", config.heads.dino), ("ibot", config.heads.ibot)):
        with torch.device("meta"):
            wanted = _new_head(student.backbone.embed_dim, head).state_dict()
        found = getattr(student, f"{name}_head").state_dict()
        if {k: t.shape for k, t in found.items()} != {k: t.shape for k, t in wanted.items()}:
            raise UserError(
                f"the heads of {source} must have the sizes of heads.{name}, but they differ "
                f"({len(found['last_layer.weight'])} prototypes there, {head.prototypes} here): give "
                "the same sizes."
            )


def _gram_teacher(
    config: StageConfig, previous: Path | None, networks: _Networks
) -> Backbone | None:
    """Return the Gram teacher's backbone, None for a stage that has none of its own.

    Raises:
        UserError: If its source is missing or does not fit.
    """
    gram, architecture = config.losses.gram, networks.student.backbone.architecture
    if gram.weight is None or gram.teacher == "ema":
        return None
    if gram.teacher == "init":
        return copy.deepcopy(networks.teacher.backbone)
    if gram.teacher == "retained":
        if previous is None or (path := state_of(previous)) is None:
            raise UserError(
                "losses.gram.teacher=retained needs an earlier stage with a Gram teacher."
            )
        if not any(k.startswith("gram_teacher.") for k in read_state(path)["model"]):
            raise UserError(
                f"losses.gram.teacher=retained needs the Gram teacher of {previous}, which had none: "
                "set it to previous, init or a file."
            )
        checkpoint = read_checkpoint(
            path,
            branch="gram_teacher",
            norm_eps=architecture.norm_eps,
            rope_dtype=architecture.rope_dtype,
        )
    else:
        source = _gram_source(gram.teacher, previous)
        checkpoint = resolve_source(source)
    return _fitted(checkpoint, config, f"the Gram teacher {gram.teacher}")


def _gram_source(name: str, previous: Path | None) -> str:
    if not name.startswith("previous"):
        return name
    if previous is None:
        raise UserError(
            f"losses.gram.teacher={name} needs an earlier stage, but this is the first."
        )
    step = name.partition("@")[2]
    path = export_path(previous, int(step)) if step else previous / EXPORT
    if not path.is_file():
        raise UserError(
            f"losses.gram.teacher={name} needs {path}, which is not there: add {step or 'its end'} to "
            "engine.export_at of the stage before, or name another Gram teacher."
        )
    return str(path)
