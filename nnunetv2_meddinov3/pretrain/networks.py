"""Networks with their heads, read from a training checkpoint of Meta's code or of ours."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.models.build import backbone_from
from nnunetv2_meddinov3.models.formats import listing
from nnunetv2_meddinov3.models.tensor_files import read_files
from nnunetv2_meddinov3.models.weights import read_checkpoint
from nnunetv2_meddinov3.pretrain.distillation import Distillation, LossOptions
from nnunetv2_meddinov3.pretrain.heads import ProjectionHead
from nnunetv2_meddinov3.pretrain.student import Noise, Student

_HEADS = ("dino_head", "ibot_head")


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
    bottleneck, hidden = len(tensors[weights[-1]]), len(tensors[weights[0]])
    with torch.device("meta"):
        head = ProjectionHead(
            in_dim=tensors[weights[0]].shape[1],
            prototypes=len(tensors["last_layer.weight"]),
            hidden_dim=hidden,
            bottleneck_dim=bottleneck,
            layers=len(weights),
        )
    expected = {name: t.shape for name, t in head.state_dict().items()}
    if {name: t.shape for name, t in tensors.items()} != expected:
        raise UserError(f"{where} must be a whole projection head, but its tensors do not fit.")
    head.load_state_dict({k: t.detach().float().clone() for k, t in tensors.items()}, assign=True)
    return head


def read_student(
    path: Path | str,
    branch: str,
    noise: Noise = Noise(),  # noqa: B008 (frozen)
    **overrides: Any,
) -> Student:
    """Read one branch of a training checkpoint, with its heads.

    Args:
        path: A file with ``BRANCH.backbone.*``, ``BRANCH.dino_head.*`` and ``BRANCH.ibot_head.*``,
            as Meta's code or ours writes it.
        branch: ``student`` or ``teacher``.
        noise: What is drawn in training mode.
        **overrides: Fields of ``Architecture`` that the tensors cannot say.

    Raises:
        UserError: If anything is missing, or does not fit.
    """
    backbone = backbone_from(read_checkpoint(path, branch=branch, **overrides))
    if backbone.mask_token is None:
        backbone.mask_token = nn.Parameter(torch.zeros(1, backbone.embed_dim))
    tensors = {k.removeprefix("model."): t for k, t in read_files(path).tensors.items()}
    heads = []
    for name in _HEADS:
        mark = f"{branch}.{name}."
        own = {k[len(mark) :]: t for k, t in tensors.items() if k.startswith(mark)}
        if not own:
            raise UserError(
                f"{path} must hold the heads of its {branch}, but {name} is missing: give it as "
                "weights without heads (init.source), or take a training checkpoint."
            )
        heads.append(head_of(own, f"{mark[:-1]} in {path}"))
    return Student(backbone, *heads, noise)


def read_distillation(
    path: Path | str,
    options: LossOptions,
    noise: Noise = Noise(),  # noqa: B008 (frozen)
    **overrides: Any,
) -> Distillation:
    """Read student, teacher and, if it is there, Gram teacher of a training checkpoint.

    Raises:
        UserError: If anything is missing, or does not fit.
    """
    gram_teacher = None
    if options.gram and not options.gram_from_teacher:
        gram_teacher = backbone_from(read_checkpoint(path, branch="gram_teacher", **overrides))
    return Distillation(
        read_student(path, "student", noise, **overrides),
        read_student(path, "teacher", **overrides),
        gram_teacher,
        options,
    )
