"""The rules that turn an opened volume into the int16 slices of a store."""

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from nnunetv2_meddinov3.curate.resample import resample_slices
from nnunetv2_meddinov3.curate.stack import Scale, Stack, fraction
from nnunetv2_meddinov3.curate.volume import Unreadable, Volume
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.store.fingerprints import perceptual_hash, slice_sha256
from nnunetv2_meddinov3.store.records import SliceRecord

PADDING_BELOW_HU = -1024  # no reconstruction gives less: it was filled in
PADDING_FROM = 0.01  # of the pixels
_POSITION_TOLERANCE_MM = 1e-3


@dataclass(frozen=True)
class SliceRules:
    """Which slices of a volume enter, and in what geometry.

    Attributes:
        pixel_spacing_mm: in-plane spacing to resample to; None keeps the native one.
        size: pixels per side to resize to afterwards; None keeps what is.
        min_gap_mm: smallest distance between slices of one volume that enter; 0 keeps all.
        keep_flagged: let air-only and constant slices enter, flagged.

    Raises:
        UserError: If a number is not one that can be used.
    """

    pixel_spacing_mm: float | None = None
    size: int | None = None
    min_gap_mm: float = 0.0
    keep_flagged: bool = False

    def __post_init__(self):
        spacing, size, gap = self.pixel_spacing_mm, self.size, self.min_gap_mm
        if spacing is not None and not 0.05 <= spacing <= 20:
            raise UserError(
                f"The pixel spacing must be from 0.05 to 20 mm, but is {spacing}: the paper's is "
                "0.45."
            )
        if size is not None and not 16 <= size <= 4096:
            raise UserError(
                f"The size must be from 16 to 4096 pixels, but is {size}: the paper's is 256."
            )
        if not (math.isfinite(gap) and gap >= 0):
            raise UserError(
                f"The smallest gap must be a number of mm from 0 on, but is {gap}: 0 keeps all "
                "slices."
            )

    def options(self) -> dict[str, Any]:
        """What the store records, and by which it refuses to be continued differently."""
        return asdict(self)


@dataclass
class CutVolume:
    """What of a volume enters the store.

    Attributes:
        array: (S', H', W') int16, the slices kept.
        spacing: (z, y, x) of ``array`` in mm, None where unknown.
        records: one for each slice of ``array``.
        left_out: (index in the volume, reason) of every other slice; what stands in parentheses
            differs from slice to slice.
    """

    array: np.ndarray
    spacing: tuple[float, float, float] | None
    records: list[SliceRecord]
    left_out: list[tuple[int, str]] = field(default_factory=list)


def cut_volume(
    volume: Volume, stack: Stack, rules: SliceRules, near_excluded: Collection[int] = ()
) -> CutVolume:
    """Choose the slices of a volume, bring them into the geometry asked for and describe them.

    Args:
        volume: the volume, for spacing and positions.
        stack: its slices.
        rules: which to keep.
        near_excluded: indices of slices to be flagged as looking like an excluded one.

    Raises:
        Unreadable: If the rules need a pixel spacing and the volume has none.
    """
    if rules.pixel_spacing_mm is not None and volume.spacing is None:
        raise Unreadable(
            f"has no known pixel spacing, which resampling to {rules.pixel_spacing_mm} mm needs"
        )
    left_out = dict(stack.broken) if rules.keep_flagged else stack.broken | stack.empty
    kept = [z for z in range(len(stack.array)) if z not in left_out]
    if rules.min_gap_mm > 0 and volume.positions_mm is not None:
        kept, crowded = _thinned(kept, volume.positions_mm, rules.min_gap_mm)
        left_out |= crowded
    array, spacing = stack.array[kept], volume.spacing
    if kept and (rules.pixel_spacing_mm is not None or rules.size is not None):
        array, spacing = resample_slices(array, spacing, rules.pixel_spacing_mm, rules.size)
    records = []
    for index, z in enumerate(kept):
        flags = [stack.empty[z].split(" (")[0].replace(" ", "_")] if z in stack.empty else []
        flags += ["near_excluded"] if z in near_excluded else []
        position = None if volume.positions_mm is None else float(volume.positions_mm[z])
        records.append(_describe(array[index], stack.scale, index, z, position, flags))
    return CutVolume(array, spacing, records, sorted(left_out.items()))


def _thinned(
    kept: list[int], positions_mm: np.ndarray, gap_mm: float
) -> tuple[list[int], dict[int, str]]:
    """From the lowest slice up, keep each that lies far enough from the one kept before."""
    far, crowded, last = [], {}, -math.inf
    for z in sorted(kept, key=lambda z: positions_mm[z]):
        distance = positions_mm[z] - last
        if distance < gap_mm - _POSITION_TOLERANCE_MM:
            crowded[z] = f"nearer than {gap_mm:g} mm to a slice kept ({distance:.2f} mm)"
        else:
            far.append(z)
            last = positions_mm[z]
    return sorted(far), crowded


def _describe(
    image: np.ndarray,
    scale: Scale,
    index: int,
    z: int,
    position_mm: float | None,
    flags: list[str],
) -> SliceRecord:
    low, high = int(image.min()), int(image.max())
    saturated = fraction(image >= scale.top) if high >= scale.top else 0.0
    padding = 0.0
    if scale.unit == "HU" and low < PADDING_BELOW_HU:
        filled = fraction(image == low)
        padding = filled if filled >= PADDING_FROM else 0.0
    flags = [*flags, *(["saturated"] if saturated else []), *(["padded"] if padding else [])]
    return SliceRecord(
        index=index,
        z=z,
        position_mm=position_mm,
        sha256=slice_sha256(image),
        phash=perceptual_hash(image, *scale.window),
        body_fraction=fraction(image > scale.body_above),
        saturated_fraction=saturated,
        padding_fraction=padding,
        hu_min=low,
        hu_max=high,
        hu_mean=float(image.mean(dtype=np.float64)),
        flags=flags,
    )
