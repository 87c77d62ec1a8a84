"""Numbers that tell a healthy run from one that collapses, and what they mean in words."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from nnunetv2_meddinov3.pretrain.monitor.words import name_of

_MAX_TOKENS = 1024  # patch tokens that are looked at; more say the same
_MAX_GRAM_IMAGES = 4  # whose Gram matrices are compared


@torch.no_grad()
def effective_rank(features: Float[Tensor, "row dim"]) -> float:
    """Return exp of the entropy of the normalised singular values (Roy and Vetterli, 2007).

    Args:
        features: Their mean is subtracted first.

    Returns:
        From 1 (all on a line, or all the same) to min(rows - 1, dim).
    """
    x = features.float()
    if not torch.isfinite(x).all():
        return math.nan
    x = x - x.mean(0)
    singular = torch.linalg.svdvals(x)
    total = singular.sum()
    # what is left of equal features after rounding has a high rank
    if total <= 1e-5 * features.float().norm():
        return 1.0
    p = singular / total
    return float(torch.exp(-(p * p.clamp(min=1e-12).log()).sum()))


@torch.no_grad()
def similarity(features: Float[Tensor, "row dim"]) -> float:
    """Return the mean cosine between different rows, 1 where all point the same way."""
    x = F.normalize(features.float(), dim=-1)
    n = len(x)
    return float((x.sum(0).square().sum() - n) / max(n * (n - 1), 1))


@torch.no_grad()
def entropy(probs: Float[Tensor, "row prototype"]) -> float:
    """Return the mean entropy of the rows, in nats."""
    p = probs.float()
    return float(-(p * p.clamp(min=1e-12).log()).sum(-1).mean())


@torch.no_grad()
def gram_distance(
    a: Float[Tensor, "image patch _dim"], b: Float[Tensor, "image patch _dim"]
) -> float:
    """Return the mean absolute difference between the patch similarities of two networks."""
    x, y = (F.normalize(t[:_MAX_GRAM_IMAGES].float(), dim=-1) for t in (a, b))
    return float((x @ x.mT - y @ y.mT).abs().mean())


@torch.no_grad()
def measure(observed: dict[str, Tensor]) -> dict[str, float]:
    """Return the health metrics of one step.

    Args:
        observed: ``cls_*`` (crop, dim) and ``patches_*`` (crop, patch, dim) of student and teacher,
            ``cls_targets`` and ``patch_targets`` (row, prototype) of the teacher; each rank has its
            own share.

    Returns:
        Entropies in nats and as a share of ln K, effective ranks of cls and patch features, mean
        cosine between cls tokens of different crops, share of prototypes that are some crop's first
        choice.
    """
    cls_k, patch_k = observed["cls_targets"].shape[1], observed["patch_targets"].shape[1]
    out = {
        "cls_target_entropy": entropy(observed["cls_targets"]),
        "patch_target_entropy": entropy(observed["patch_targets"]),
    }
    out["cls_target_entropy_share"] = out["cls_target_entropy"] / math.log(cls_k)
    out["patch_target_entropy_share"] = out["patch_target_entropy"] / math.log(patch_k)
    for who in ("student", "teacher"):
        cls, patches = observed[f"cls_{who}"], observed[f"patches_{who}"].flatten(0, 1)
        stride = max(1, len(patches) // _MAX_TOKENS)
        out[f"cls_rank_{who}"] = effective_rank(cls)
        out[f"patch_rank_{who}"] = effective_rank(patches[::stride][:_MAX_TOKENS])
        out[f"cls_similarity_{who}"] = similarity(cls)
    winners = observed["cls_targets"].argmax(1).unique()
    out["prototypes_used"] = len(winners) / min(cls_k, len(observed["cls_targets"]))
    return out


# When something is wrong. Ranks are compared with the highest of the run, since small batches and
# fresh networks have small ones; similarities are absolute.
_MIN_RANK_SHARE = 0.4  # of the highest rank; healthy runs keep more than half of it
_MIN_RANK = 1.5  # below it all features lie on a line
# mean cosine of different images; fresh and pretrained ViTs have less after a while
_MAX_SIMILARITY = 0.98
_MAX_ENTROPY_SHARE = 0.995  # of ln K; from it on targets say nothing
_UNIFORM_AFTER = 500  # steps; fresh heads start with uniform targets
_MIN_PROTOTYPES_USED = 0.05  # share of those that a batch could use
_MAX_LOSS_RATIO = 1.5  # loss against the lowest so far
_MIN_UPDATE = 1e-9  # relative change of the weights below which nothing is learnt


def verdicts(history: list[dict[str, Any]]) -> list[str]:
    """Say in words what is wrong at the last health check.

    Args:
        history: What ``measure`` returned at every check so far, in order, with ``step``, ``loss``
            and ``update`` (relative change of the weights since the check before).

    Returns:
        One sentence for each problem; none for a healthy run.
    """
    now = history[-1]
    out = [
        f"{name_of(key)} is not a number: the run has diverged; go back to a checkpoint and lower "
        "optim.lr."
        for key, value in now.items()
        if isinstance(value, float) and math.isnan(value)
    ]
    if out:
        return out[:1]
    out += _collapse(history)
    if now["cls_target_entropy_share"] > _MAX_ENTROPY_SHARE and now["step"] >= _UNIFORM_AFTER:
        out.append(
            "the teacher's targets are uniform (entropy "
            f"{100 * now['cls_target_entropy_share']:.1f} % of the maximum): they say "
            "nothing, so nothing is learnt; lower losses.teacher_temp or optim.lr."
        )
    if now["prototypes_used"] < _MIN_PROTOTYPES_USED:
        out.append(
            f"only {100 * now['prototypes_used']:.1f} % of the prototypes a batch could use are "
            "used: images fall into a few clusters; raise the batch or lower optim.lr."
        )
    lowest = min(each["loss"] for each in history)
    if len(history) > 2 and now["loss"] > _MAX_LOSS_RATIO * lowest + 1:
        out.append(
            f"the loss is {now['loss']:.2f} after it was {lowest:.2f}: the run diverges; lower "
            "optim.lr."
        )
    if now.get("update") is not None and now["update"] < _MIN_UPDATE:
        out.append(
            "the weights do not change: optim.lr is 0 or every step is skipped; check optim.lr and "
            "the skipped steps."
        )
    return out


def _collapse(history: list[dict[str, Any]]) -> list[str]:
    now, first = history[-1], history[0]
    out = []
    for what, key in (("images", "cls_rank"), ("patches", "patch_rank")):
        for who in ("student", "teacher"):
            rank, highest = now[f"{key}_{who}"], max(row[f"{key}_{who}"] for row in history)
            if rank < max(_MIN_RANK, _MIN_RANK_SHARE * highest):
                out.append(
                    f"collapse: the {who} gives all {what} nearly the same features (effective "
                    f"rank {rank:.1f}, it was {highest:.1f}); the learning rate may be too high."
                )
    for who in ("student", "teacher"):
        if now[f"cls_similarity_{who}"] > _MAX_SIMILARITY > first[f"cls_similarity_{who}"]:
            out.append(
                f"collapse: the {who}'s cls tokens of different images point the same way (mean "
                f"cosine {now[f'cls_similarity_{who}']:.3f}); the learning rate may be too high."
            )
    return out
