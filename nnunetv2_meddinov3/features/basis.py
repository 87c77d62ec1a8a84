"""Principal components of patch tokens as colours, the same for all slices that they are used for.

The order of components is that of their variance. Their signs, which mean nothing, follow what the
patches show: a component is turned so that it grows with brightness, or towards the back, or to the
left, whichever it goes along with most.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float
from scipy.linalg import orthogonal_procrustes
from sklearn.decomposition import PCA

from nnunetv2_meddinov3.errors import UserError, first_line
from nnunetv2_meddinov3.features.npz import Damaged, read_npz, write_npz

FILE = "basis.npz"
_MOST_PATCHES = 20_000  # to which a basis is fitted
_RANGE = (1, 99)  # percentiles of the scores that are 0 and 1 in colour
_VERSION = 1
_ARRAYS = ("mean", "axes", "low", "high", "explained", "scores")


@dataclass(frozen=True)
class Basis:
    """Three axes of patch tokens and the range of the scores along them.

    Attributes:
        mean: Subtracted from tokens.
        axes: Scores are the tokens' coordinates along them.
        low: Score of each axis that is 0 in colour.
        high: Score that is 1.
        explained: Share of the variance along each component.
        weights: Identity of the backbone.
        patches: What was fitted to, in words that are equal only for the same patches.
        scores: Of these patches, by which another backbone's colours are matched.
    """

    mean: Float[np.ndarray, " dim"]
    axes: Float[np.ndarray, "3 dim"]
    low: Float[np.ndarray, " 3"]
    high: Float[np.ndarray, " 3"]
    explained: Float[np.ndarray, " 3"]
    weights: str
    patches: str
    scores: Float[np.ndarray, "patch 3"]

    def colours(self, tokens: Float[np.ndarray, "*any dim"]) -> Float[np.ndarray, "*any 3"]:
        """Return red, green and blue in [0, 1]."""
        scores = (tokens - self.mean) @ self.axes.T
        return np.clip((scores - self.low) / (self.high - self.low), 0, 1)

    def save(self, path: Path) -> None:
        """Write it to a file.

        Raises:
            UserError: If that cannot be written.
        """
        facts = {"version": _VERSION, "weights": self.weights, "patches": self.patches}
        arrays = {name: getattr(self, name).astype(np.float32) for name in _ARRAYS}
        write_npz(path, facts, arrays, compressed=True)

    @classmethod
    def load(cls, path: Path) -> Basis:
        """Read one, from its file or the folder that it is in.

        Raises:
            UserError: If it cannot be read.
        """
        file = path / FILE if path.is_dir() else path
        try:
            facts, arrays = read_npz(file, _ARRAYS)
            if facts.pop("version", None) != _VERSION:
                raise Damaged("it is of another version of this package")
            return cls(**arrays, weights=str(facts["weights"]), patches=str(facts["patches"]))
        except (Damaged, KeyError) as error:
            raise UserError(
                f"--like must be the output folder of an earlier `features pca`, but {file} cannot "
                f"be read ({first_line(error)})."
            ) from error


def fit_basis(
    tokens: Float[np.ndarray, "patch dim"],
    shown: Float[np.ndarray, "patch 3"],
    *,
    weights: str,
    patches: str,
) -> Basis:
    """Fit the first three principal components.

    Args:
        tokens: Of patches that show the body.
        shown: Of each patch its brightness, row and column, for the signs.
        weights: Identity of the backbone.
        patches: What the patches are, see ``Basis``.

    Raises:
        UserError: If there are too few patches.
    """
    if len(tokens) < 4:
        raise UserError(
            "principal components need at least four patches that show a body, but there are "
            f"{len(tokens)}: look at other slices, or make --size larger."
        )
    few = np.unique(np.linspace(0, len(tokens) - 1, _MOST_PATCHES).round().astype(int))
    tokens, shown = tokens[few], shown[few]
    fitted = PCA(3, svd_solver="full").fit(tokens.astype(np.float64))
    axes, scores = fitted.components_, fitted.transform(tokens.astype(np.float64))
    signs = _signs(scores, shown)
    axes, scores = axes * signs[:, None], scores * signs
    low, high = _range(scores)
    return Basis(
        fitted.mean_, axes, low, high, fitted.explained_variance_ratio_, weights, patches, scores
    )


def _signs(
    scores: Float[np.ndarray, "patch 3"], shown: Float[np.ndarray, "patch 3"]
) -> Float[np.ndarray, " 3"]:
    """Return 1 or -1 for each component: it grows with what it goes along with most."""
    a, b = (each - each.mean(0) for each in (scores, shown))
    norms = np.linalg.norm(a, axis=0)[:, None] * np.linalg.norm(b, axis=0)
    along = (a.T @ b) / np.maximum(norms, 1e-12)  # (component, shown)
    most = np.abs(along).argmax(axis=1)
    return np.where(along[np.arange(3), most] < 0, -1.0, 1.0)


def _range(
    scores: Float[np.ndarray, "patch 3"],
) -> tuple[Float[np.ndarray, " 3"], Float[np.ndarray, " 3"]]:
    low, high = np.percentile(scores, _RANGE, axis=0)
    return low, np.maximum(high, low + 1e-6)


def like(ours: Basis, other: Basis) -> Basis:
    """Return a basis whose colours are as near as possible to those of another.

    For the same weights it is the other one. For other weights the components are scaled to unit
    variance and rotated onto the other's, which needs the same patches (Procrustes).

    Args:
        ours: Fitted to the patches of this command.
        other: Of an earlier command.

    Raises:
        UserError: If the weights differ and the patches do too.
    """
    if ours.weights == other.weights:
        return replace(other, patches=ours.patches, scores=ours.scores)
    if ours.patches != other.patches or len(ours.scores) != len(other.scores):
        raise UserError(
            "--like compares other weights on the same slices, but that output is of other scans, "
            "slices or another --size: run it again with these."
        )
    centred = other.scores - other.scores.mean(0)
    spread, wanted = ours.scores.std(0), centred.std(0)
    whitened = ours.scores / np.maximum(spread, 1e-9)
    rotation, _ = orthogonal_procrustes(whitened, centred / np.maximum(wanted, 1e-9))
    axes = rotation.T @ (ours.axes / np.maximum(spread, 1e-9)[:, None])
    scores = whitened @ rotation
    low, high = _range(scores)
    return replace(ours, axes=axes, scores=scores, low=low, high=high)
