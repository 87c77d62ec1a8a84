"""Probes of backbones: features once, three small models, scores with their uncertainty."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.models.architecture import default_layers
from nnunetv2_meddinov3.models.backbone import Backbone
from nnunetv2_meddinov3.models.contracts import contracts_of
from nnunetv2_meddinov3.pretrain.config import Intensity
from nnunetv2_meddinov3.pretrain.intensity import contract_in
from nnunetv2_meddinov3.pretrain.probe.fitting import (
    Linear,
    average_precision,
    best_thresholds,
    fit_linear,
    neighbour_scores,
    resampled_average_precision,
)
from nnunetv2_meddinov3.pretrain.probe.labelled import ProbeData

_MAX_PATCHES = 20_000  # to which the dense probe is fitted
_THRESHOLD_SLICES = 64  # on which its thresholds are chosen
_DENSE_L2 = 1e-3
_BATCH = 16
_DRAWS = 1000  # of the bootstrap
# Patients. With five or fewer, not even the range of all of them is a 95 % interval of their middle
# (2 x 0.5^5 > 0.05); a resampled interval covers 51 % with two, 83 % with five, 86 % with six and
# 93 % with twenty (normal scores, simulated).
MIN_HELD_OUT = 6
KINDS = ("knn", "linear", "dense")
_IN_WORDS = {
    "knn": "k-NN on slices",
    "linear": "the linear probe on slices",
    "dense": "linear segmentation",
}


@dataclass
class ProbeResult:
    """Scores on held-out patients.

    Attributes:
        knn: Mean average precision of the structures a slice shows, by k-NN on cls tokens; None
            where no structure is both shown and not shown in both parts.
        linear: The same by logistic regression.
        dense: Mean Dice of a linear classifier of patch tokens.
        chance: Mean average precision of blind guessing; that of ``blind`` for k-NN.
        blind: Kind -> what guessing scores that looks at no picture, on the same slices.
        intervals: Kind -> 95 % interval over resampled held-out patients; it means nothing below
            ``MIN_HELD_OUT`` of them, and is not shown then.
        structures: Name -> its own scores.
        slices: Numbers of slices trained on and held out.
        patients: Numbers of patients.
    """

    knn: float | None
    linear: float | None
    dense: float | None
    chance: float | None
    blind: dict[str, float | None]
    intervals: dict[str, list[float]]
    structures: dict[str, dict[str, float | None]]
    slices: list[int]
    patients: list[int]

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return {**asdict(self), "intervals_mean_something": self.patients[1] >= MIN_HELD_OUT}


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
        intensity: What the weights state of their contracts; the default where they have none for
            the unit of the data, for HU that of the release.
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
    held_out = _predict(cls, patches, data, seed)
    scores = held_out.scores()
    fitted_to = [p for p, out in zip(data.patients, data.is_held_out, strict=True) if not out]
    return ProbeResult(
        **{kind: _mean(scores[kind]) for kind in KINDS},
        chance=(blind := held_out.blind())["knn"],
        blind=blind,
        intervals=_intervals(held_out, seed),
        structures={
            name: {kind: _known(scores[kind][i]) for kind in KINDS}
            for i, name in enumerate(data.structures)
        },
        slices=[len(fitted_to), len(held_out.patients)],
        patients=[len(set(fitted_to)), len(set(held_out.patients))],
    )


@dataclass
class _HeldOut:
    """What was predicted for the held-out slices.

    Attributes:
        patients: Of each slice.
        shown: Which structures a slice shows.
        is_whole: Whether all of a slice is labelled; what others show is not fully known.
        usable: Structures whose average precision can be measured.
        predicted: Kind -> what says how likely a slice shows a structure.
        overlaps: Pixels in both prediction and mask, in the prediction, in the mask.
        blind_overlaps: The same of a prediction that is one picture for all slices.
    """

    patients: np.ndarray
    shown: Bool[np.ndarray, "slice structure"]
    is_whole: Bool[np.ndarray, " slice"]
    usable: list[int]
    predicted: dict[str, Float[np.ndarray, "slice structure"]]
    overlaps: Float[np.ndarray, "slice structure 3"]
    blind_overlaps: Float[np.ndarray, "slice structure 3"]

    def scores(self) -> dict[str, Float[np.ndarray, " structure"]]:
        """Return kind -> score of each structure; NaN where there is none."""
        shown, predicted = self._whole()
        out = {kind: np.full(shown.shape[1], np.nan) for kind in ("knn", "linear")}
        for kind, values in predicted.items():
            for i in self.usable:
                out[kind][i] = average_precision(values[:, i], shown[:, i])
        return {**out, "dense": _dice(self.overlaps.sum(0))}

    def resampled(
        self, times: Int[np.ndarray, "draw slice"]
    ) -> dict[str, Float[np.ndarray, "draw structure"]]:
        """Return kind -> scores of each draw, which has each slice so many times."""
        shown, predicted = self._whole()
        out = {
            kind: np.stack(
                [
                    resampled_average_precision(values[:, i], shown[:, i], times[:, self.is_whole])
                    for i in self.usable
                ],
                axis=1,
            )
            for kind, values in predicted.items()
        }
        return {**out, "dense": _dice(np.einsum("dn,nsk->dsk", times, self.overlaps))}

    def _whole(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """What whole slices show, and what was predicted for them."""
        predicted = {kind: values[self.is_whole] for kind, values in self.predicted.items()}
        return self.shown[self.is_whole], predicted

    def blind(self) -> dict[str, float | None]:
        """Return kind -> mean score of a guess that is the same for every slice.

        Equal scores have the average precision of how often a structure is shown.
        """
        shown, _ = self._whole()
        equal = np.zeros(len(shown))
        precision = _mean([average_precision(equal, shown[:, i]) for i in self.usable])
        dice = _mean(_dice(self.blind_overlaps.sum(0)))
        return {"knn": precision, "linear": precision, "dense": dice}


@torch.no_grad()
def _features(
    backbone: Backbone,
    data: ProbeData,
    stated: dict[str, Any] | None,
    device: torch.device | str,
) -> tuple[Float[Tensor, "slice dim"], Float[Tensor, "slice row column wide"]]:
    """Return cls tokens of the last block and patch tokens of four depths side by side."""
    plain = contract_in(data.unit, Intensity()).model_dump()
    contract = contracts_of(stated).get(data.unit, plain)
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


def _predict(cls: Tensor, patches: Tensor, data: ProbeData, seed: int) -> _HeldOut:
    """Fit the three models to the training patients and let them predict the held-out slices."""
    out = torch.from_numpy(data.is_held_out)
    shown = data.masks.flatten(2).any(2)  # (slice, structure)
    is_whole = ~data.ignored.flatten(1).any(1)
    parts = (is_whole & ~out, is_whole & out)
    usable = [
        i
        for i in range(len(data.structures))
        if all(0 < shown[part, i].sum() < part.sum() for part in parts)
    ]
    predicted = {}
    if usable:
        fit = parts[0]
        owners = np.array(data.patients)[fit.numpy()].tolist()
        predicted["knn"] = neighbour_scores(cls[fit], shown[fit], cls[out])
        predicted["linear"] = fit_linear(cls[fit], shown[fit], owners, seed)(cls[out]).numpy()
    overlaps, blind_overlaps = _overlaps(patches, data, out, seed)
    return _HeldOut(
        patients=np.array(data.patients)[data.is_held_out],
        shown=shown[out].numpy(),
        is_whole=is_whole[out].numpy(),
        usable=usable,
        predicted=predicted,
        overlaps=overlaps,
        blind_overlaps=blind_overlaps,
    )


def _overlaps(
    patches: Tensor, data: ProbeData, out: Tensor, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Segment the held-out slices and count pixels, by a linear classifier of patches and blindly.

    The blind one takes each structure to be where the training slices show it most.
    """
    generator = torch.Generator().manual_seed(seed)
    train = (~out).nonzero()[:, 0]
    model = _fit_dense(patches[train], data.masks[train], data.ignored[train], generator)
    some = train[torch.randperm(len(train), generator=generator)[:_THRESHOLD_SLICES]]
    usual = _usual_place(data.masks[train], data.ignored[train])

    def linear(rows: Tensor) -> Tensor:
        return _probabilities(model, patches[rows], data.ignored[rows])

    def blind(rows: Tensor) -> Tensor:
        return usual.expand(len(rows), -1, -1, -1).masked_fill(data.ignored[rows, None], 0)

    return _counted(linear, data, some, out), _counted(blind, data, some, out)


def _counted(
    shares_of: Callable[[Tensor], Tensor], data: ProbeData, some: Tensor, out: Tensor
) -> np.ndarray:
    """Count the pixels of a segmentation and of the masks in the held-out slices.

    Args:
        shares_of: Numbers of slices -> how likely their pixels show each structure.
        data: The slices.
        some: Numbers of the slices on which thresholds are chosen.
        out: Which slices are held out.
    """
    thresholds = best_thresholds(shares_of(some), data.masks[some])[:, None, None]
    counts = []
    for rows in out.nonzero()[:, 0].split(_BATCH):
        masks, found = data.masks[rows], shares_of(rows) > thresholds
        pixels = [(found & masks).sum((2, 3)), found.sum((2, 3)), masks.sum((2, 3))]
        counts.append(torch.stack(pixels, -1))
    return torch.cat(counts).double().numpy()


def _usual_place(
    masks: Bool[Tensor, "slice structure height width"],
    ignored: Bool[Tensor, "slice height width"],
) -> Float[Tensor, "structure height width"]:
    """Return how often slices show each structure at a pixel, 1 where that is most."""
    labelled = (~ignored).sum(0).clamp(min=1)
    often = masks.float().sum(0) / labelled
    return often / often.amax((1, 2), keepdim=True).clamp(min=1e-9)


def _fit_dense(
    patches: Tensor, masks: Tensor, ignored: Tensor, generator: torch.Generator
) -> Linear:
    """Fit to the share of each structure in what is labelled of a patch."""
    grid = patches.shape[1]
    labelled = F.adaptive_avg_pool2d((~ignored[:, None]).float(), grid).movedim(1, -1)
    shares = F.adaptive_avg_pool2d(masks.float(), grid).movedim(1, -1)  # (n, h, w, structure)
    is_known = labelled.flatten() > 0
    rows = patches.flatten(0, 2)[is_known]
    targets = (shares / labelled).flatten(0, 2)[is_known]
    chosen = torch.randperm(len(rows), generator=generator)[:_MAX_PATCHES]
    return Linear(rows[chosen], targets[chosen], _DENSE_L2)


def _probabilities(
    model: Linear, patches: Float[Tensor, "slice row column wide"], ignored: Tensor
) -> Float[Tensor, "slice structure height width"]:
    """Return the probability of each structure at each pixel, 0 where a pixel is ignored."""
    logits = model(patches.flatten(0, 2)).unflatten(0, patches.shape[:3]).movedim(-1, 1)
    size = ignored.shape[-2:]
    shares = F.interpolate(logits, size, mode="bilinear", align_corners=False).sigmoid()
    return shares.masked_fill(ignored[:, None], 0)


def _dice(overlaps: Float[np.ndarray, "*shape 3"]) -> Float[np.ndarray, "*shape"]:
    """Return the Dice of pixels in both, in the prediction, in the mask; NaN for an empty mask."""
    both, found, true = np.moveaxis(overlaps, -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(true > 0, 2 * both / (found + true), np.nan)


def _intervals(held_out: _HeldOut, seed: int) -> dict[str, list[float]]:
    """Return 95 % percentile intervals of the means, held-out patients resampled."""
    names, whose = np.unique(held_out.patients, return_inverse=True)
    if len(names) < 2:
        return {}
    chosen = np.random.default_rng(seed).choice(len(names), (_DRAWS, len(names)))
    times = np.stack([np.bincount(draw, minlength=len(names)) for draw in chosen])
    out = {}
    for kind, values in held_out.resampled(times[:, whose]).items():
        known = values[np.isfinite(values).any(1)]
        if len(known):
            low, high = np.percentile(np.nanmean(known, axis=1), [2.5, 97.5])
            out[kind] = [float(low), float(high)]
    return out


def _mean(values: Iterable[float]) -> float | None:
    known = [v for v in values if np.isfinite(v)]
    return float(np.mean(known)) if known else None


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def too_few(held_out: int) -> str | None:
    """Return what to say where there are too few held-out patients for intervals."""
    if held_out >= MIN_HELD_OUT:
        return None
    return (
        f"too few patients for an interval (n = {held_out} held out, at least {MIN_HELD_OUT} are "
        "needed): differences between weights may be chance."
    )


def verdict(start: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Say in words if features have become worse than those the run started from.

    Args:
        start: ``to_dict`` of the starting weights.
        now: Of the current teacher.

    Returns:
        A sentence; None while their intervals overlap, or there are too few held-out patients for
        intervals to mean anything.
    """
    if start["patients"][1] < MIN_HELD_OUT:
        return None
    for kind, name in _IN_WORDS.items():
        interval, later = start["intervals"].get(kind), now["intervals"].get(kind)
        if interval and later and later[1] < interval[0]:
            return (
                f"the features have become worse than those the run started from: {name} gives "
                f"{now[kind]:.3f} now and gave {start[kind]:.3f} (95 % interval {interval[0]:.3f} "
                f"to {interval[1]:.3f}); lower optim.lr, or stop here and take an earlier export."
            )
    return None
