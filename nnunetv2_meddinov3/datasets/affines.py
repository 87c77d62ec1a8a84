"""Where an image and its label are in space, and what is done where they disagree.

The rule, in order; arrays of both have the same shape, or the case is refused:

1. Affines that agree within a hundredth of a voxel: both are kept.
2. One is an identity (voxels of 1 mm, axes as stored), which tools write that know no better: both
   get the other one. LiTS has such labels.
3. Both are an identity: the spacing is unknown. LiTS has 20 such cases; what becomes of them is the
   user's choice.
4. Axes point the same way and spacings agree within 1 %: the label gets the image's affine.
5. Anything else is refused: which of them is right cannot be told.
"""

from __future__ import annotations

import enum

import nibabel as nib
import numpy as np

_VOXEL_SHARE = 0.01
_SPACING_SHARE = 0.01


class Verdict(enum.Enum):
    """What is done with a case."""

    AGREE = "agree"
    USE_IMAGE = "the label got the affine of its image"
    USE_LABEL = "the image got the affine of its label"
    UNKNOWN_SPACING = "image and label state no spacing (identity affines)"
    REFUSED = "image and label lie in different places"


def judge(image: np.ndarray, label: np.ndarray) -> Verdict:
    """Compare the affines of an image and of its label.

    Args:
        image: (4, 4), voxels -> mm.
        label: Likewise.
    """
    identities = _is_identity(image), _is_identity(label)
    if all(identities):
        return Verdict.UNKNOWN_SPACING
    spacing = nib.affines.voxel_sizes(image)
    if np.abs(image - label).max() <= _VOXEL_SHARE * spacing.min():
        return Verdict.AGREE
    if identities[1]:
        return Verdict.USE_IMAGE
    if identities[0]:
        return Verdict.USE_LABEL
    same_axes = nib.aff2axcodes(image) == nib.aff2axcodes(label)
    if same_axes and np.allclose(spacing, nib.affines.voxel_sizes(label), rtol=_SPACING_SHARE):
        return Verdict.USE_IMAGE
    return Verdict.REFUSED


def _is_identity(affine: np.ndarray) -> bool:
    """Return whether an affine has axes as stored and voxels of 1 mm, wherever its origin is."""
    return bool(np.allclose(np.abs(affine[:3, :3]), np.eye(3), atol=1e-4))
