"""Figures that tell a healthy run from one that collapses, and the words for what they mean."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_MOST_TOKENS = 1024  # patch tokens of which figures are made; more say the same
_MOST_GRAM = 4  # images of which Gram matrices are compared


@torch.no_grad()
def effective_rank(features: Tensor) -> float:
    """Return exp of the entropy of the normalised singular values (Roy and Vetterli, 2007).

    Args:
        features: (n, D); their mean is taken away first.

    Returns:
        From 1 (all on a line, or all the same) to min(n - 1, D).
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
def similarity(features: Tensor) -> float:
    """Return the mean cosine between different rows of (n, D), 1 where all point the same way."""
    x = F.normalize(features.float(), dim=-1)
    n = len(x)
    return float((x.sum(0).square().sum() - n) / max(n * (n - 1), 1))


@torch.no_grad()
def entropy(probs: Tensor) -> float:
    """Return the mean entropy of rows of (n, K), in nats."""
    p = probs.float()
    return float(-(p * p.clamp(min=1e-12).log()).sum(-1).mean())


@torch.no_grad()
def gram_distance(a: Tensor, b: Tensor) -> float:
    """Return the mean absolute difference of patch similarities of two (B, P, D), P alike."""
    x, y = (F.normalize(t[:_MOST_GRAM].float(), dim=-1) for t in (a, b))
    return float((x @ x.mT - y @ y.mT).abs().mean())


@torch.no_grad()
def figures(seen: dict[str, Tensor]) -> dict[str, float]:
    """Return the figures of one step.

    Args:
        seen: ``Distillation.seen``: features of student and teacher, targets of the teacher. Of
            several ranks each sees its own share.

    Returns:
        Entropies in nats and as a share of ln K, effective ranks of cls and patch features, mean
        cosine between cls tokens of different crops, share of prototypes that are some crop's first
        choice.
    """
    cls_k, patch_k = seen["cls_targets"].shape[1], seen["patch_targets"].shape[1]
    out = {
        "cls_target_entropy": entropy(seen["cls_targets"]),
        "patch_target_entropy": entropy(seen["patch_targets"]),
    }
    out["cls_target_entropy_share"] = out["cls_target_entropy"] / math.log(cls_k)
    out["patch_target_entropy_share"] = out["patch_target_entropy"] / math.log(patch_k)
    for who in ("student", "teacher"):
        cls, patches = seen[f"cls_{who}"], seen[f"patches_{who}"].flatten(0, 1)
        stride = max(1, len(patches) // _MOST_TOKENS)
        out[f"cls_rank_{who}"] = effective_rank(cls)
        out[f"patch_rank_{who}"] = effective_rank(patches[::stride][:_MOST_TOKENS])
        out[f"cls_similarity_{who}"] = similarity(cls)
    winners = seen["cls_targets"].argmax(1).unique()
    out["prototypes_used"] = len(winners) / min(cls_k, len(seen["cls_targets"]))
    return out


# When a figure is wrong. Ranks are compared with the highest of the run, since small batches and
# fresh networks have small ones; similarities are absolute.
RANK_SHARE = 0.4  # of the highest rank; healthy runs keep more than half of it
RANK_FLOOR = 1.5  # below it all features lie on a line
SIMILARITY = (
    0.98  # mean cosine of different images; fresh and pretrained ViTs have less after a while
)
UNIFORM = 0.995  # share of ln K from which targets say nothing
UNIFORM_AFTER = 500  # steps; fresh heads start with uniform targets
USED = 0.05  # share of the prototypes that a batch could use
DIVERGED = 1.5  # loss against the lowest so far
STILL = 1e-9  # relative change of the weights from which nothing is learnt


def verdicts(history: list[dict[str, Any]]) -> list[str]:
    """Say in words what is wrong at the last check of health.

    Args:
        history: Figures of every check so far, first one first, with ``step``, ``loss`` and
            ``update`` (relative change of the weights since the check before).

    Returns:
        One sentence for each thing; none for a healthy run.
    """
    now = history[-1]
    out = [
        f"{key} is not a number: the run has diverged; go back to a checkpoint and lower optim.lr."
        for key, value in now.items()
        if isinstance(value, float) and math.isnan(value)
    ]
    if out:
        return out[:1]
    out += _collapse(history)
    if now["cls_target_entropy_share"] > UNIFORM and now["step"] >= UNIFORM_AFTER:
        out.append(
            "the teacher's targets are uniform (entropy "
            f"{100 * now['cls_target_entropy_share']:.1f} % of the most there is): they say "
            "nothing, so nothing is learnt; lower losses.teacher_temp or optim.lr."
        )
    if now["prototypes_used"] < USED:
        out.append(
            f"only {100 * now['prototypes_used']:.1f} % of the prototypes a batch could use are "
            "used: images fall into a few clusters; raise the batch or lower optim.lr."
        )
    lowest = min(each["loss"] for each in history)
    if len(history) > 2 and now["loss"] > DIVERGED * lowest + 1:
        out.append(
            f"the loss is {now['loss']:.2f} after it was {lowest:.2f}: the run diverges; lower "
            f"optim.lr."
        )
    if now.get("update") is not None and now["update"] < STILL:
        out.append(
            "the weights do not change: optim.lr is 0 or every step is skipped; look at optim.lr "
            "and at the steps that were skipped."
        )
    return out


def _collapse(history: list[dict[str, Any]]) -> list[str]:
    now, first = history[-1], history[0]
    out = []
    for what, key in (("images", "cls_rank"), ("patches", "patch_rank")):
        for who in ("student", "teacher"):
            rank, highest = now[f"{key}_{who}"], max(row[f"{key}_{who}"] for row in history)
            if rank < max(RANK_FLOOR, RANK_SHARE * highest):
                out.append(
                    f"collapse: the {who} gives all {what} nearly the same features (effective "
                    f"rank {rank:.1f}, it was {highest:.1f}); the learning rate may be too high."
                )
    for who in ("student", "teacher"):
        if now[f"cls_similarity_{who}"] > SIMILARITY > first[f"cls_similarity_{who}"]:
            out.append(
                f"collapse: the {who}'s cls tokens of different images point the same way (mean "
                f"cosine {now[f'cls_similarity_{who}']:.3f}); the learning rate may be too high."
            )
    return out
