"""One probe of one backbone: features once, three small models, figures with their uncertainty."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.models.architecture import default_layers
from nnunetv2_meddinov3.models.backbone import Backbone
from nnunetv2_meddinov3.pretrain.config import Intensity
from nnunetv2_meddinov3.pretrain.probe.fitting import (
    Linear,
    average_precision,
    best_thresholds,
    fit_linear,
    neighbour_scores,
)
from nnunetv2_meddinov3.pretrain.probe.labelled import ProbeData

_MOST_PATCHES = 20_000  # to which the dense probe is fitted
_DENSE_L2 = 1e-3
_BATCH = 16
_DRAWS = 1000  # of the bootstrap
_FEWEST = 5  # held-out patients for a verdict
KINDS = ("knn", "linear", "dense")


@dataclass
class ProbeResult:
    """Figures on held-out patients.

    Attributes:
        knn: Mean average precision of the structures a slice shows, by k-NN on cls tokens; None
            where no structure is both shown and not shown in both parts.
        linear: The same by logistic regression.
        dense: Mean Dice of a linear classifier of patch tokens.
        chance: Mean average precision of blind guessing.
        intervals: Kind -> 95 % interval over resampled held-out patients.
        structures: Name -> its own figures.
        slices: Numbers of slices trained on and held out.
        patients: Numbers of patients.
    """

    knn: float | None
    linear: float | None
    dense: float | None
    chance: float | None
    intervals: dict[str, list[float]]
    structures: dict[str, dict[str, float | None]]
    slices: list[int]
    patients: list[int]

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return asdict(self)


def run_probe(
    backbone: Backbone,
    data: ProbeData,
    *,
    intensity: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> ProbeResult:
    """Probe a frozen backbone.

    Args:
        backbone: Any; put into evaluation mode.
        data: Slices and masks.
        intensity: Contract of the weights (``clip``, ``mean``, ``std`` in HU); None: the release's.
        device: Where features are computed.
        seed: Of everything that is drawn.

    Raises:
        UserError: If the slices do not fit the backbone's patches.
    """
    size = data.images.shape[-1]
    if size % backbone.patch_size:
        raise UserError(
            f"the size of a probe must be a multiple of {backbone.patch_size} pixels, got {size}."
        )
    cls, patches = _features(backbone, data, intensity, device)
    out = torch.from_numpy(data.is_held_out)
    shown = data.masks.flatten(2).any(2)  # (n, structures)
    whose = np.array(data.patients)
    own = whose[~data.is_held_out].tolist()
    scores = {
        "knn": neighbour_scores(cls[~out], shown[~out], cls[out]).numpy(),
        "linear": fit_linear(cls[~out], shown[~out], own, seed)(cls[out]).numpy(),
    }
    labels = shown[out].numpy()
    usable = [
        i
        for i in range(len(data.structures))
        if all(0 < shown[part][:, i].sum() < part.sum() for part in (out, ~out))
    ]
    overlaps = _dense(patches, data, out, seed)  # (slices held out, structures, 3)
    groups = whose[data.is_held_out]

    def figures(rows: np.ndarray) -> dict[str, list[float]]:
        """Figures of each structure over some held-out slices, repeated ones included."""
        both, found, true = np.moveaxis(overlaps[rows].sum(0), -1, 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            dice = np.where(true > 0, 2 * both / (found + true), np.nan)
        ap = {
            kind: [average_precision(s[rows][:, i], labels[rows][:, i]) for i in usable]
            for kind, s in scores.items()
        }
        return {**ap, "dense": dice.tolist()}

    everyone = figures(np.arange(len(groups)))
    means = {kind: _mean(everyone[kind]) for kind in KINDS}
    return ProbeResult(
        **means,
        chance=_mean([float(labels[:, i].mean()) for i in usable]),
        intervals=_intervals(figures, groups, seed),
        structures={
            name: {
                "knn": _plain(everyone["knn"][usable.index(i)]) if i in usable else None,
                "linear": _plain(everyone["linear"][usable.index(i)]) if i in usable else None,
                "dense": _plain(everyone["dense"][i]),
            }
            for i, name in enumerate(data.structures)
        },
        slices=[int((~out).sum()), int(out.sum())],
        patients=[len(set(own)), len(set(groups))],
    )


@torch.no_grad()
def _features(
    backbone: Backbone,
    data: ProbeData,
    intensity: dict[str, Any] | None,
    device: torch.device | str,
) -> tuple[Tensor, Tensor]:
    """Return cls tokens (n, D) of the last block and patch tokens (n, h, w, 4 D) of four depths."""
    plain = Intensity()
    contract = intensity or {"clip": plain.clip_hu, "mean": plain.mean_hu, "std": plain.std_hu}
    backbone = backbone.eval().to(device)
    grid = data.images.shape[-1] // backbone.patch_size
    layers = default_layers(backbone.depth)
    cls, patches = [], []
    for images in data.images.split(_BATCH):
        x = (images.to(device).clamp(*contract["clip"]) - contract["mean"]) / contract["std"]
        x = x.expand(-1, backbone.architecture.input_channels, -1, -1)
        tokens = backbone.intermediate_tokens(x, layers)
        cls.append(tokens[-1].cls.float().cpu())
        joined = torch.cat([t.patches for t in tokens], -1).float().cpu()
        patches.append(joined.unflatten(1, (grid, grid)))
    return torch.cat(cls), torch.cat(patches)


def _dense(patches: Tensor, data: ProbeData, out: Tensor, seed: int) -> np.ndarray:
    """Return (held-out slices, structures, 3): pixels in both, in the prediction, in the mask."""
    grid = patches.shape[1]
    shares = F.adaptive_avg_pool2d(data.masks.float(), grid).movedim(1, -1)  # (n, h, w, structures)
    rows = patches[~out].flatten(0, 2)
    targets = shares[~out].flatten(0, 2)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(rows), generator=generator)[:_MOST_PATCHES]
    model = Linear(rows[chosen], targets[chosen], _DENSE_L2)

    def probabilities(part: Tensor) -> Tensor:
        logits = model(part.flatten(0, 2)).unflatten(0, part.shape[:3]).movedim(-1, 1)
        size = data.masks.shape[-2:]
        return F.interpolate(logits, size, mode="bilinear", align_corners=False).sigmoid()

    train = (~out).nonzero()[:, 0]
    some = train[torch.randperm(len(train), generator=generator)[:64]]
    thresholds = best_thresholds(probabilities(patches[some]), data.masks[some])
    overlaps = []
    for part, masks in zip(patches[out].split(_BATCH), data.masks[out].split(_BATCH), strict=True):
        found = probabilities(part) > thresholds[:, None, None]
        counts = [(found & masks).sum((2, 3)), found.sum((2, 3)), masks.sum((2, 3))]
        overlaps.append(torch.stack(counts, -1))
    return torch.cat(overlaps).double().numpy()


def _intervals(figures: Any, groups: np.ndarray, seed: int) -> dict[str, list[float]]:
    """95 % percentile intervals of the means, held-out patients resampled."""
    names = np.unique(groups)
    rows = {name: np.flatnonzero(groups == name) for name in names}
    rng = np.random.default_rng(seed)
    draws: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(_DRAWS if len(names) > 1 else 0):
        chosen = np.concatenate([rows[n] for n in rng.choice(names, len(names))])
        for kind, values in figures(chosen).items():
            if (mean := _mean(values)) is not None:
                draws[kind].append(mean)
    return {
        kind: [float(v) for v in np.percentile(values, [2.5, 97.5])]
        for kind, values in draws.items()
        if values
    }


def _mean(values: list[float]) -> float | None:
    known = [v for v in values if np.isfinite(v)]
    return float(np.mean(known)) if known else None


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def verdict(start: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Say in words if features have become worse than those the run started from.

    Args:
        start: ``to_dict`` of the starting weights.
        now: Of the current teacher.

    Returns:
        A sentence; None while their intervals overlap, or there are too few held-out patients for
        intervals to mean anything.
    """
    if start["patients"][1] < _FEWEST:
        return None
    names = {
        "knn": "k-NN on slices",
        "linear": "the linear probe on slices",
        "dense": "linear segmentation",
    }
    for kind, name in names.items():
        interval, later = start["intervals"].get(kind), now["intervals"].get(kind)
        if interval and later and later[1] < interval[0]:
            value = now[kind]
            return (
                f"the features have become worse than those the run started from: {name} gives "
                f"{value:.3f} now and gave {start[kind]:.3f} (95 % interval {interval[0]:.3f} to "
                f"{interval[1]:.3f}); lower optim.lr, or stop here and take an earlier export."
            )
    return None
