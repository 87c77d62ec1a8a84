"""From an opened volume to the int16 slices of a store: converted, judged, chosen, resampled."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from nnunetv2_meddinov3.curate.resampling import resample_slices
from nnunetv2_meddinov3.curate.volume import Unreadable, Volume, counted
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.store.fingerprints import perceptual_hash, slice_sha256
from nnunetv2_meddinov3.store.mapping import INT16, STORED_HIGH, Mapping, mapping_of
from nnunetv2_meddinov3.store.records import NEAR_EXCLUDED, SliceRecord

BODY_ABOVE_HU = -500  # fat is about -100, aerated lung about -850, air -1000
BODY_ABOVE = 0.1  # of the way from low to high, for values that are not HU
AIR_ONLY_BELOW = 0.005  # of the pixels: 1300 of 512 x 512, about what a bare table covers
TOP_OF_12_BITS_HU = 3071  # 4095 - 1024: where a 12-bit scanner stops
HASH_WINDOW_HU = (-500.0, 500.0)
MIN_SIDE = 16  # pixels: one patch of the network
PADDING_BELOW_HU = -1024  # no reconstruction gives less: it was filled in
PADDING_FROM = 0.01  # of the pixels
POSITION_TOLERANCE_MM = 1e-3


@dataclass(frozen=True)
class SliceRules:
    """Which slices of a volume enter, and in what geometry.

    Attributes:
        pixel_spacing_mm: In-plane spacing to resample to; None keeps the native one.
        size: Pixels per side to resize to afterwards; None keeps the size.
        min_gap_mm: Smallest distance between slices of one volume that enter; 0 keeps all.
        keep_flagged: Let air-only and constant slices enter, flagged.

    Raises:
        UserError: If a number cannot be used.
    """

    pixel_spacing_mm: float | None = None
    size: int | None = None
    min_gap_mm: float = 0.0
    keep_flagged: bool = False

    def __post_init__(self) -> None:
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
                f"The smallest gap must be at least 0 mm, but is {gap}: 0 keeps all slices."
            )

    def options(self) -> dict[str, Any]:
        """Return what the store records; it cannot be continued with other options."""
        return asdict(self)


@dataclass(frozen=True)
class Scale:
    """What the numbers of a volume mean.

    Attributes:
        body_above: Values above it are body.
        top: Values from here on are saturated; infinite where the end of the range is unknown.
        window: Low and high of the window of the perceptual hash.
        unit: Of the numbers, for the reader of a reason.
    """

    body_above: float
    top: float
    window: tuple[float, float]
    unit: str


@dataclass
class Stack:
    """All slices of a volume as int16, in its own geometry.

    Attributes:
        array: (S, H, W) int16; slices in ``broken`` are meaningless.
        broken: Index of a slice that int16 cannot hold -> reason.
        empty: Index of a slice that shows nothing -> reason.
        scale: What the numbers mean.
        intensity: Contract of numbers that are not HU, completed by ``stored_low`` and
            ``stored_high``, the two percentiles in the numbers of the array; None for HU.
        notes: Remarks for the record.
    """

    array: np.ndarray
    broken: dict[int, str]
    empty: dict[int, str]
    scale: Scale
    intensity: dict[str, float] | None
    notes: tuple[str, ...]

    def informative(self) -> list[int]:
        """Return the indices of the slices by which a volume can be recognised."""
        return [z for z in range(len(self.array)) if z not in self.broken | self.empty]


def stack_slices(volume: Volume) -> Stack:
    """Convert a volume to int16 and find the slices that cannot enter or show nothing.

    HU and 8-bit pictures are rounded to whole numbers and never clipped: a slice that holds NaN,
    infinity or a number beyond int16 is broken. All other volumes, of whatever numbers, are mapped
    linearly by their percentiles, see ``store.mapping``.

    Raises:
        Unreadable: If a volume that must be mapped has no contrast.
    """
    intensity, notes = volume.intensity, volume.notes
    if intensity is None or volume.windowed:
        array, broken, fractional = _rounded(volume.array)
        if intensity is not None:
            ends = {"stored_low": intensity["low"], "stored_high": intensity["high"]}
            intensity = {**intensity, **ends}
        elif fractional:
            notes = (*notes, "values rounded to whole numbers")
    else:
        mapping = Mapping(intensity["low"], intensity["high"])
        array, broken = _mapped(volume.array, mapping)
        notes = (*notes, *_told(array, broken, mapping))
        intensity = {**mapping.facts(), **intensity}
    return _stack(array, broken, volume.windowed, intensity, notes)


def stack_of_stored(array: np.ndarray, windowed: bool, intensity: dict[str, float] | None) -> Stack:
    """Return slices that a store holds as they were before they entered it.

    Args:
        array: (S, H, W) int16.
        windowed: As in the record of the volume, and so is ``intensity``.
        intensity: Contract of numbers that are not HU.
    """
    return _stack(array, {}, windowed, intensity, ())


def _stack(
    array: np.ndarray,
    broken: dict[int, str],
    windowed: bool,
    intensity: dict[str, float] | None,
    notes: tuple[str, ...],
) -> Stack:
    scale = _scale(windowed, intensity)
    empty = {}
    for z, image in enumerate(array):
        if z not in broken and (reason := _emptiness(image, scale)):
            empty[z] = reason
    return Stack(array, broken, empty, scale, intensity, notes)


def in_another_way(volume: Volume) -> np.ndarray | None:
    """Return the slices of values that are not HU as another store may hold them.

    They are mapped where they were an 8-bit picture, which a copy that says its modality is not,
    else as whole numbers, as in stores of before. None for HU, and where there is no other way.
    """
    if volume.intensity is None:
        return None
    if volume.windowed:
        mapping = mapping_of(volume.array)
        return _mapped(volume.array, mapping)[0] if mapping.has_contrast else None
    array, broken, fractional = _rounded(volume.array)
    return None if fractional or broken else array


def _told(array: np.ndarray, broken: dict[int, str], mapping: Mapping) -> list[str]:
    """Return remarks on what was mapped to what, and on what was clipped."""
    told = [f"values from {mapping.low:g} to {mapping.high:g} mapped to 0 to {STORED_HIGH}"]
    good = array[[z for z in range(len(array)) if z not in broken]]
    if share := fraction((good == INT16.min) | (good == INT16.max)) if good.size else 0.0:
        told.append(f"values far beyond them clipped ({share:.2%} of the voxels)")
    return told


def _rounded(values: np.ndarray) -> tuple[np.ndarray, dict[int, str], bool]:
    """Return int16 slices, reasons of those int16 cannot hold, and whether any was rounded."""
    if values.dtype == np.int16:
        return np.ascontiguousarray(values), {}, False
    array = np.zeros(values.shape, dtype=np.int16)
    broken: dict[int, str] = {}
    fractional = False
    for z, image in enumerate(values):
        if reason := _not_finite(image):
            broken[z] = reason
            continue
        whole = np.rint(image) if image.dtype.kind == "f" else image
        low, high = whole.min(), whole.max()
        if low < INT16.min or high > INT16.max:
            broken[z] = f"outside int16 (values from {low:g} to {high:g})"
            continue
        fractional = fractional or bool((whole != image).any())
        array[z] = whole
    return array, broken, fractional


def _mapped(values: np.ndarray, mapping: Mapping) -> tuple[np.ndarray, dict[int, str]]:
    """Return mapped slices, and those that are not finite."""
    broken = {z: reason for z, image in enumerate(values) if (reason := _not_finite(image))}
    array = np.zeros(values.shape, dtype=np.int16)
    good = [z for z in range(len(values)) if z not in broken]
    if good and not mapping.has_contrast:
        raise Unreadable(
            f"shows no contrast: its 0.5th and 99.5th percentiles are {mapping.low:g} and "
            f"{mapping.high:g}"
        )
    for z in good:
        array[z] = mapping.stored(values[z])
    return array, broken


def _not_finite(image: np.ndarray) -> str | None:
    if image.dtype.kind != "f":
        return None
    number = image.size - int(np.count_nonzero(np.isfinite(image)))
    return f"NaN or infinity ({counted(number, 'pixel')})" if number else None


def _scale(windowed: bool, intensity: dict[str, float] | None) -> Scale:
    if windowed:
        return Scale(BODY_ABOVE * 255, math.inf, (0.0, 255.0), "of 255")
    if intensity is None:
        return Scale(BODY_ABOVE_HU, TOP_OF_12_BITS_HU, HASH_WINDOW_HU, "HU")
    low, high = intensity["stored_low"], intensity["stored_high"]
    window = (low, max(high, low + 1))
    return Scale(low + BODY_ABOVE * (high - low), INT16.max, window, "as stored")


def _emptiness(image: np.ndarray, scale: Scale) -> str | None:
    """Return why a slice shows nothing, None if it shows something."""
    if image.min() == image.max():
        return f"constant (every pixel is {image[0, 0]})"
    body = fraction(image > scale.body_above)
    if body < AIR_ONLY_BELOW:
        return f"air only ({body:.2%} of the pixels above {scale.body_above:g} {scale.unit})"
    return None


def fraction(mask: np.ndarray) -> float:
    """Return the share of True, from 0 to 1."""
    return float(np.count_nonzero(mask) / mask.size)


def without_details(reason: str) -> str:
    """Return a reason without what differs from slice to slice, which is in parentheses."""
    return reason.split(" (")[0]


def count_reasons(left_out: Iterable[tuple[int, str]]) -> dict[str, int]:
    """Return reason without details -> number of slices left out for it."""
    return dict(Counter(without_details(reason) for _, reason in left_out))


@dataclass
class CutVolume:
    """What of a volume enters the store.

    Attributes:
        array: (S', H', W') int16, the slices kept.
        spacing: (z, y, x) of ``array`` in mm, None where unknown.
        records: One for each slice of ``array``.
        left_out: (index in the volume, reason) of every other slice, see ``without_details``.
    """

    array: np.ndarray
    spacing: tuple[float, float, float] | None
    records: list[SliceRecord]
    left_out: list[tuple[int, str]] = field(default_factory=list)


def cut_volume(
    volume: Volume, stack: Stack, rules: SliceRules, near_excluded: Collection[int] = ()
) -> CutVolume:
    """Choose the slices of a volume, resample them as asked and describe them.

    Args:
        volume: The volume, for spacing and positions.
        stack: Its slices.
        rules: Which to keep.
        near_excluded: Indices of slices to be flagged as looking like an excluded one.

    Raises:
        Unreadable: If no slice of ``MIN_SIDE`` is left, or a spacing is needed and not known.
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
    if not kept:
        counts = count_reasons(left_out.items()).items()
        reasons = ", ".join(f"{number} {reason}" for reason, number in counts)
        raise Unreadable(f"no slice is left ({reasons})")
    height, width = stack.array.shape[1:]
    if min(height, width) < MIN_SIDE:
        raise Unreadable(f"slices of {width}x{height} pixels, narrower than {MIN_SIDE} (a scout?)")
    array, spacing = stack.array[kept], volume.spacing
    if rules.pixel_spacing_mm is not None or rules.size is not None:
        array, spacing = resample_slices(array, spacing, rules.pixel_spacing_mm, rules.size)
    records = []
    for index, z in enumerate(kept):
        flags = [without_details(stack.empty[z]).replace(" ", "_")] if z in stack.empty else []
        flags += [NEAR_EXCLUDED] if z in near_excluded else []
        position = None if volume.positions_mm is None else float(volume.positions_mm[z])
        records.append(_describe(array[index], stack.scale, index, z, position, flags))
    return CutVolume(array, spacing, records, sorted(left_out.items()))


def _thinned(
    kept: list[int], positions_mm: np.ndarray, gap_mm: float
) -> tuple[list[int], dict[int, str]]:
    """Keep, from the lowest slice up, each that is far enough from the one kept before."""
    far: list[int] = []
    crowded: dict[int, str] = {}
    last = -math.inf
    for z in sorted(kept, key=lambda z: positions_mm[z]):
        distance = positions_mm[z] - last
        if distance < gap_mm - POSITION_TOLERANCE_MM:
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
