"""The small models that are fitted to frozen features, and the figures of merit."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

NEIGHBOURS = 20
TEMPERATURE = 0.07  # of the votes, as in DINO's k-NN
_STEPS = 60  # of L-BFGS
_L2 = (
    1e-4,
    1e-2,
    1.0,
)  # of standardised features; one is chosen on a part of the training patients
_THRESHOLDS = torch.linspace(0.05, 0.95, 19)


def neighbour_scores(train: Tensor, labels: Tensor, test: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """Return the weighted votes of the nearest neighbours by cosine.

    Args:
        train: (n, D).
        labels: (n, structures), 0 or 1.
        test: (m, D).
        k: Neighbours; at most n.

    Returns:
        (m, structures) in [0, 1].
    """
    a, b = F.normalize(train.float(), dim=-1), F.normalize(test.float(), dim=-1)
    cosine, places = (b @ a.T).topk(min(k, len(a)), dim=1)
    weights = (cosine / TEMPERATURE).softmax(1)
    return (weights[..., None] * labels.float()[places]).sum(1)


class Linear:
    """Independent logistic regressions on standardised features, one for each structure.

    Args:
        features: (n, D).
        targets: (n, structures) in [0, 1]; shares of a patch are soft labels.
        l2: Weight of the squared weights.
    """

    def __init__(self, features: Tensor, targets: Tensor, l2: float) -> None:
        self.mean = features.float().mean(0)
        self.std = features.float().std(0).clamp(min=1e-6)
        x, y = self._standard(features), targets.float()
        weight = torch.zeros(x.shape[1], y.shape[1], requires_grad=True)
        share = y.mean(0).clamp(1e-4, 1 - 1e-4)
        bias = torch.logit(share).requires_grad_(True)
        optimizer = torch.optim.LBFGS(
            [weight, bias], max_iter=_STEPS, history_size=10, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.binary_cross_entropy_with_logits(x @ weight + bias, y)
            loss = loss + l2 * weight.square().sum() / len(x) ** 0.5
            loss.backward()
            return loss

        optimizer.step(closure)
        self.weight, self.bias = weight.detach(), bias.detach()

    def __call__(self, features: Tensor) -> Tensor:
        """Return logits (m, structures)."""
        return self._standard(features) @ self.weight + self.bias

    def _standard(self, features: Tensor) -> Tensor:
        return (features.float() - self.mean) / self.std


def fit_linear(features: Tensor, targets: Tensor, groups: list[str], seed: int) -> Linear:
    """Fit with the L2 weight that is best on patients left out of the fit.

    Args:
        features: (n, D).
        targets: (n, structures).
        groups: Patient of each row.
        seed: Of who is left out.
    """
    names = sorted(set(groups))
    if len(names) < 3:
        return Linear(features, targets, _L2[1])
    rng = np.random.default_rng(seed)
    left_out = set(rng.permutation(names)[: max(1, len(names) // 4)])
    inner = torch.tensor([g not in left_out for g in groups])
    losses = []
    for l2 in _L2:
        model = Linear(features[inner], targets[inner], l2)
        logits = model(features[~inner])
        losses.append(F.binary_cross_entropy_with_logits(logits, targets[~inner].float()).item())
    return Linear(features, targets, _L2[int(np.argmin(losses))])


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Return the area under precision over recall, ties together; NaN without both labels."""
    labels = np.asarray(labels, bool)
    if labels.all() or not labels.any():
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    hits, ranked = np.cumsum(labels[order]), scores[order]
    last = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)
    hits, seen = hits[last], last + 1
    return float((np.diff(np.append(0, hits)) * hits / seen).sum() / labels.sum())


def best_thresholds(shares: Tensor, masks: Tensor) -> Tensor:
    """Return for each structure the threshold of greatest Dice.

    Args:
        shares: (n, structures, H, W), predicted probabilities.
        masks: The same shape, bool.
    """
    scores = []
    for threshold in _THRESHOLDS:
        found = shares > threshold
        both = (found & masks).sum((0, 2, 3))
        scores.append(2 * both / (found.sum((0, 2, 3)) + masks.sum((0, 2, 3))).clamp(min=1))
    return _THRESHOLDS[torch.stack(scores).argmax(0)]
