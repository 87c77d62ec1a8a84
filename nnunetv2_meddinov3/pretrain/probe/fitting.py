"""The small models that are fitted to frozen features, and how their output is scored."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sklearn.metrics import average_precision_score
from sklearn.neighbors import KNeighborsRegressor
from torch import Tensor
from torch.nn import functional as F

NEIGHBOURS = 20
TEMPERATURE = 0.07  # of the votes, as in DINO's k-NN
_STEPS = 60  # of L-BFGS
_L2 = (1e-4, 1e-2, 1.0)  # of standardised features; chosen on a part of the training patients
_THRESHOLDS = torch.linspace(0.05, 0.95, 19)


def neighbour_scores(
    train: Float[Tensor, "slice dim"],
    labels: Bool[Tensor, "slice structure"],
    test: Float[Tensor, "other dim"],
    k: int = NEIGHBOURS,
) -> Float[np.ndarray, "other structure"]:
    """Return the weighted votes, in [0, 1], of the nearest neighbours by cosine.

    Args:
        train: Features of labelled slices.
        labels: Which structures they show.
        test: Features of other slices.
        k: Neighbours; at most as many as there are labelled slices.
    """
    votes = KNeighborsRegressor(
        min(k, len(train)), weights=lambda d: np.exp(-d / TEMPERATURE), metric="cosine"
    )
    return votes.fit(train.float(), labels.float()).predict(test.float())


class Linear:
    """Independent logistic regressions on standardised features, one for each structure.

    Unlike scikit-learn's, it takes soft labels: the share of a patch that shows a structure.

    Args:
        features: What is fitted to.
        targets: Labels in [0, 1].
        l2: Weight of the squared weights.
    """

    def __init__(self, features: Float[Tensor, "row dim"], targets: Tensor, l2: float) -> None:
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

    def __call__(self, features: Float[Tensor, "row dim"]) -> Float[Tensor, "row structure"]:
        """Return logits."""
        return self._standard(features) @ self.weight + self.bias

    def _standard(self, features: Tensor) -> Tensor:
        return (features.float() - self.mean) / self.std


def fit_linear(
    features: Float[Tensor, "row dim"], targets: Tensor, groups: list[str], seed: int
) -> Linear:
    """Fit with the L2 weight that is best on patients left out of the fit.

    Args:
        features: What is fitted to.
        targets: (row, structure) labels.
        groups: Patient of each row.
        seed: Decides who is left out.
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


def average_precision(
    scores: Float[np.ndarray, " slice"], labels: Bool[np.ndarray, " slice"]
) -> float:
    """Return the average precision, equal scores taken together; NaN without both labels."""
    if labels.all() or not labels.any():
        return float("nan")
    return float(average_precision_score(labels, scores))


def resampled_average_precision(
    scores: Float[np.ndarray, " slice"],
    labels: Bool[np.ndarray, " slice"],
    times: Int[np.ndarray, "draw slice"],
) -> Float[np.ndarray, " draw"]:
    """Return the average precision of every draw of a bootstrap; NaN without both labels.

    It is scikit-learn's with ``sample_weight``, of all draws at once: a probe has tens of thousands
    of structures and draws, and scikit-learn takes half a millisecond for each.

    Args:
        scores: Of each slice.
        labels: Of each slice.
        times: How often each draw has each slice.
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)  # of equal scores
    seen = times[:, order].cumsum(1)[:, ends]
    hits = (times * labels)[:, order].cumsum(1)[:, ends]
    total = hits[:, -1]
    gained = np.diff(hits, prepend=0)
    precision = (gained * hits / np.maximum(seen, 1)).sum(1) / np.maximum(total, 1)
    return np.where((total > 0) & (total < seen[:, -1]), precision, np.nan)


def best_thresholds(
    shares: Float[Tensor, "slice structure height width"],
    masks: Bool[Tensor, "slice structure height width"],
) -> Float[Tensor, " structure"]:
    """Return the threshold of greatest Dice for each structure.

    Args:
        shares: Predicted probabilities.
        masks: Where the structures are.
    """
    scores = []
    for threshold in _THRESHOLDS:
        found = shares > threshold
        both = (found & masks).sum((0, 2, 3))
        scores.append(2 * both / (found.sum((0, 2, 3)) + masks.sum((0, 2, 3))).clamp(min=1))
    return _THRESHOLDS[torch.stack(scores).argmax(0)]
