"""The networks a stage starts with: random, from pretrained weights, or of an earlier stage."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.models.architecture import Architecture
from nnunetv2_meddinov3.models.backbone import Backbone
from nnunetv2_meddinov3.models.build import adapt_stem, backbone_from, resolve_source
from nnunetv2_meddinov3.models.formats import listing, parse_state_dict
from nnunetv2_meddinov3.models.weights import Checkpoint, checkpoint_from
from nnunetv2_meddinov3.pretrain.checkpoints import read_state, state_of
from nnunetv2_meddinov3.pretrain.config import Head, StageConfig
from nnunetv2_meddinov3.pretrain.distillation import Distillation, LossOptions
from nnunetv2_meddinov3.pretrain.heads import ProjectionHead
from nnunetv2_meddinov3.pretrain.intensity import check_same_contract
from nnunetv2_meddinov3.pretrain.run_folder import EXPORT, export_path
from nnunetv2_meddinov3.pretrain.stated import (
    UNSEEN,
    applied,
    check_size,
    check_stated,
    of_random_weights,
)
from nnunetv2_meddinov3.pretrain.student import StochasticOptions, Student

OWN_LICENCE = "that of whoever trained them: the run started from random weights"
_NO_WEIGHTS = "none"
_STEM = "patch_embed.proj.weight"

State = dict[str, Any]  # what ``checkpoints.read_state`` returns


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
class _Branches:
    """What a source gives: student and teacher, and what the export says of their weights."""

    student: Student
    teacher: Student
    licence: str
    base: str
    optimizer: dict[str, Any] | None = None


def load_start(config: StageConfig, previous: Path | None, state: State | None = None) -> Start:
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
        return _of_sizes(config, state)
    read = functools.cache(read_state)  # the start and the Gram teacher may be in one file
    source = str(previous) if config.init.source == "previous" else config.init.source
    torch.manual_seed(config.optim.seed)  # of random weights and fresh heads
    path = state_of(Path(source))
    branches = (
        _from_weights(config, source)
        if path is None
        else _from_state(config, read(path.resolve()), source)
    )
    gram_teacher = _gram_teacher(config, previous, branches.teacher.backbone, read)
    distillation = _prepared(config, branches.student, branches.teacher, gram_teacher)
    architecture = branches.student.backbone.architecture
    return Start(distillation, architecture, branches.licence, branches.base, branches.optimizer)


def _of_sizes(config: StageConfig, state: State) -> Start:
    """Networks of a state's sizes, to be filled by it."""
    architecture = Architecture(**state["architecture"])
    student, teacher = (_with_fresh_heads(_random(architecture), config) for _ in range(2))
    options = _loss_options(config)
    needs_gram = options.gram and not options.gram_from_teacher
    # states of earlier versions do not say: they built the Gram teacher like the student
    of_gram = Architecture(**(state.get("gram_architecture") or state["architecture"]))
    gram_teacher = _random(of_gram) if needs_gram else None
    distillation = _prepared(config, student, teacher, gram_teacher)
    return Start(distillation, architecture, state["licence"], state["base"])


def _prepared(
    config: StageConfig, student: Student, teacher: Student, gram_teacher: Backbone | None
) -> Distillation:
    model = config.model
    student.stochastic = StochasticOptions(
        model.drop_path, model.rope_shift, model.rope_jitter, model.rope_rescale
    )
    student.backbone.vit.set_grad_checkpointing(config.engine.activation_checkpointing)
    return Distillation(student, teacher, gram_teacher, _loss_options(config))


def _loss_options(config: StageConfig) -> LossOptions:
    losses = config.losses
    return LossOptions(
        dino_weight=losses.dino_weight,
        ibot_weight=losses.ibot_weight,
        koleo_weight=losses.koleo_weight,
        koleo_group=losses.koleo_group,
        sigreg_weight=losses.sigreg_weight if losses.regulariser == "sigreg" else None,
        sigreg_slices=losses.sigreg_slices,
        ignore_diagonal=losses.ignore_diagonal,
        student_temp=losses.student_temp,
        gram=losses.gram.weight is not None,
        gram_from_teacher=losses.gram.teacher == "ema",
    )


def _from_weights(config: StageConfig, source: str) -> _Branches:
    """Random or pretrained weights without heads: the teacher starts as the student's copy."""
    if source.lower() == _NO_WEIGHTS:
        student = _with_fresh_heads(_random(of_random_weights(config)), config)
        return _Branches(student, copy.deepcopy(student), OWN_LICENCE, "random weights")
    checkpoint = resolve_source(source, **applied(config))
    check_same_contract(checkpoint.metadata, config, source)
    check_stated(checkpoint.architecture, config, source)
    student = _with_fresh_heads(_fitted(checkpoint, config, source), config)
    base = checkpoint.metadata.get("base", source)
    return _Branches(student, copy.deepcopy(student), checkpoint.licence, base)


def _from_state(config: StageConfig, state: State, source: str) -> _Branches:
    """An earlier stage's networks with their heads."""
    check_same_contract({"intensity": state["intensity"]}, config, source)
    overrides = {k: state["architecture"][k] for k in UNSEEN} | applied(config)
    teacher = student_of(state["model"], "teacher", source, **overrides)
    student = (
        student_of(state["model"], "student", source, **overrides)
        if config.init.student == "student"
        else copy.deepcopy(teacher)
    )
    check_stated(student.backbone.architecture, config, source, is_stage=True)
    _check_heads(student, config, source)
    optimizer = state["optimizer"] if config.init.optimizer else None
    return _Branches(student, teacher, state["licence"], state["base"], optimizer)


def _gram_teacher(
    config: StageConfig,
    previous: Path | None,
    teacher: Backbone,
    read: Callable[[Path], State],
) -> Backbone | None:
    """Return the Gram teacher (DINOv3, sec. 4.2), None for a stage that has none of its own.

    Args:
        config: Of the stage.
        previous: Folder of the stage before.
        teacher: The backbone the stage starts from.
        read: Reads a training state.

    Raises:
        UserError: If its source is missing or does not fit.
    """
    gram = config.losses.gram
    if gram.weight is None or gram.teacher == "ema":
        return None
    if gram.teacher == "init":
        return copy.deepcopy(teacher)
    if gram.teacher != "retained":
        checkpoint = resolve_source(_gram_source(gram.teacher, previous))
        return _fitted(checkpoint, config, f"the Gram teacher {gram.teacher}")
    if previous is None or (path := state_of(previous)) is None:
        raise UserError("losses.gram.teacher=retained needs an earlier stage with a Gram teacher.")
    state = read(path.resolve())
    tensors = state["model"]
    if not any(name.startswith("gram_teacher.") for name in tensors):
        raise UserError(
            f"losses.gram.teacher=retained needs the Gram teacher of {previous}, which had none: "
            "set it to previous, init or a file."
        )
    of_gram = state.get("gram_architecture") or state["architecture"]
    overrides = {k: of_gram[k] for k in UNSEEN}
    checkpoint = _backbone_of(tensors, "gram_teacher", str(path), **overrides)
    return _fitted(checkpoint, config, "the Gram teacher retained")


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
            f"losses.gram.teacher={name} needs {path}, which does not exist: add "
            f"{step or 'its end'} to engine.export_at of the stage before, or name another Gram "
            "teacher."
        )
    return str(path)


def student_of(tensors: dict[str, Tensor], branch: str, where: str, **overrides: Any) -> Student:
    """Build one branch of a training checkpoint, with its heads.

    Args:
        tensors: ``BRANCH.backbone.*``, ``BRANCH.dino_head.*`` and ``BRANCH.ibot_head.*``, named as
            Meta's code or ours does.
        branch: ``student`` or ``teacher``.
        where: What to call the checkpoint in an error.
        **overrides: Fields of ``Architecture`` that the tensors cannot say.

    Raises:
        UserError: If anything is missing, or does not fit.
    """
    backbone = _with_mask_token(backbone_from(_backbone_of(tensors, branch, where, **overrides)))

    def head(name: str) -> ProjectionHead:
        mark = f"{branch}.{name}."
        own = {k[len(mark) :]: t for k, t in tensors.items() if k.startswith(mark)}
        if not own:
            raise UserError(
                f"{where} must hold the heads of its {branch}, but {name} is missing: give it as "
                "weights without heads (init.source), or take a training checkpoint."
            )
        return head_of(own, f"{mark[:-1]} in {where}")

    return Student(backbone, head("dino_head"), head("ibot_head"))


def head_of(tensors: dict[str, Tensor], where: str) -> ProjectionHead:
    """Build a head around its tensors, whose sizes say what it is.

    Args:
        tensors: ``mlp.0.weight`` ... ``last_layer.weight``.
        where: What to call it in an error.

    Raises:
        UserError: If they are not one head's.
    """
    weights = sorted(
        (k for k in tensors if re.fullmatch(r"mlp\.\d+\.weight", k)),
        key=lambda k: int(k.split(".")[1]),
    )
    if not weights or "last_layer.weight" not in tensors:
        raise UserError(f"{where} must be a projection head, but its keys are {listing(tensors)}.")
    with torch.device("meta"):
        head = ProjectionHead(
            in_dim=tensors[weights[0]].shape[1],
            prototypes=len(tensors["last_layer.weight"]),
            hidden_dim=len(tensors[weights[0]]),
            bottleneck_dim=len(tensors[weights[-1]]),
            layers=len(weights),
        )
    expected = {name: t.shape for name, t in head.state_dict().items()}
    if {name: t.shape for name, t in tensors.items()} != expected:
        raise UserError(f"{where} must be a whole projection head, but its tensors do not fit.")
    head.load_state_dict({k: t.detach().float().clone() for k, t in tensors.items()}, assign=True)
    return head


def _backbone_of(
    tensors: dict[str, Tensor], branch: str, where: str, **overrides: Any
) -> Checkpoint:
    return checkpoint_from(parse_state_dict(tensors, where, branch), where, **overrides)


def _random(architecture: Architecture) -> Backbone:
    return Backbone(architecture, mask_token=True)


def _with_mask_token(backbone: Backbone) -> Backbone:
    if backbone.mask_token is None:
        backbone.mask_token = nn.Parameter(torch.zeros(1, backbone.embed_dim))
    return backbone


def _with_fresh_heads(backbone: Backbone, config: StageConfig) -> Student:
    width, heads = backbone.embed_dim, config.heads
    return Student(backbone, _fresh_head(width, heads.dino), _fresh_head(width, heads.ibot))


def _fresh_head(width: int, head: Head) -> ProjectionHead:
    return ProjectionHead(width, head.prototypes, head.hidden_dim, head.bottleneck_dim, head.layers)


def _fitted(checkpoint: Checkpoint, config: StageConfig, source: str) -> Backbone:
    """Build a checkpoint's backbone with the config's input channels and a mask token.

    Args:
        checkpoint: Its stem is changed where the channels differ.
        config: Of the stage.
        source: What to call the weights.

    Raises:
        UserError: If it is of another size than the config's.
    """
    check_size(checkpoint.architecture, config, source)
    channels = config.model.input_channels
    if checkpoint.architecture.input_channels != channels:
        stem = adapt_stem(checkpoint.tensors[_STEM], channels, channels)
        checkpoint = replace(
            checkpoint,
            tensors={**checkpoint.tensors, _STEM: stem},
            architecture=replace(checkpoint.architecture, input_channels=channels),
        )
    return _with_mask_token(backbone_from(checkpoint))


def _check_heads(student: Student, config: StageConfig, source: str) -> None:
    for name, head in (("dino", config.heads.dino), ("ibot", config.heads.ibot)):
        with torch.device("meta"):
            wanted = _fresh_head(student.backbone.embed_dim, head).state_dict()
        found = getattr(student, f"{name}_head").state_dict()
        if {k: t.shape for k, t in found.items()} != {k: t.shape for k, t in wanted.items()}:
            raise UserError(
                f"the heads of {source} must have the sizes of heads.{name}, but they differ "
                f"({len(found['last_layer.weight'])} prototypes there, {head.prototypes} here): "
                "give the same sizes."
            )
