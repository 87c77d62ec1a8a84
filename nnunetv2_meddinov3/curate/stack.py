"""Every slice of an opened volume as int16, and which of them cannot enter or show nothing."""

import math
from dataclasses import dataclass

import numpy as np

from nnunetv2_meddinov3.curate.volume import Unreadable, Volume

INT16 = np.iinfo(np.int16)
BODY_ABOVE_HU = -500  # fat is about -100, aerated lung about -850, air -1000
BODY_ABOVE = 0.1  # of the way from low to high, for values that are not HU
AIR_ONLY_BELOW = 0.005  # of the pixels: 1300 of 512 x 512, about what a bare table covers
TOP_OF_12_BITS_HU = 3071  # 4095 - 1024: where a 12-bit scanner stops
HASH_WINDOW_HU = (-500.0, 500.0)
STORED_HIGH = 16384  # of int16 for the 99.5th percentile of MR: room for as much again above it


@dataclass(frozen=True)
class Scale:
    """What the numbers of a volume mean.

    Attributes:
        body_above: values above it are body.
        top: values from here on are saturated; infinite where the end of the range is unknown.
        window: low and high of the window of the perceptual hash.
        unit: of the numbers, for the reader of a reason.
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
        broken: index of a slice that int16 cannot hold -> reason.
        empty: index of a slice that shows nothing -> reason.
        scale: what the numbers mean.
        intensity: contract of numbers that are not HU, completed by ``stored_low`` and
            ``stored_high``, the two percentiles in the numbers of the array; None for HU.
        notes: remarks for the record.
    """

    array: np.ndarray
    broken: dict[int, str]
    empty: dict[int, str]
    scale: Scale
    intensity: dict[str, float] | None
    notes: tuple[str, ...]

    def telling(self) -> list[int]:
        """Indices of the slices by which a volume can be recognised."""
        return [z for z in range(len(self.array)) if z not in self.broken | self.empty]


def stack_slices(volume: Volume) -> Stack:
    """Convert a volume to int16 and find the slices that cannot enter or show nothing.

    HU are rounded to whole numbers and never clipped: a slice that holds NaN, infinity or a number
    beyond int16 is broken. Numbers that are not HU stay as they are if they are whole and fit;
    otherwise the volume is mapped linearly so that its 0.5th percentile becomes 0 and its 99.5th
    16384, and clipped to int16.

    Raises:
        Unreadable: If a volume that must be mapped has no contrast between its percentiles.
    """
    array, broken, fractional = _rounded(volume.array)
    intensity, notes = volume.intensity, volume.notes
    if intensity is None:
        if fractional:
            notes = (*notes, "values rounded to whole numbers")
    else:
        low, high = intensity["low"], intensity["high"]
        if fractional or any(reason.startswith("outside") for reason in broken.values()):
            array, broken = _mapped(volume.array, low, high)
            notes = (*notes, f"values from {low:g} to {high:g} mapped to 0 to {STORED_HIGH}")
            stored_low, stored_high = 0.0, float(STORED_HIGH)
        else:
            stored_low, stored_high = float(low), float(high)
        intensity = {**intensity, "stored_low": stored_low, "stored_high": stored_high}
    scale = _scale(volume.windowed, intensity)
    empty = {}
    for z, image in enumerate(array):
        if z not in broken and (reason := _emptiness(image, scale)):
            empty[z] = reason
    return Stack(array, broken, empty, scale, intensity, notes)


def _rounded(values: np.ndarray) -> tuple[np.ndarray, dict[int, str], bool]:
    """int16 slices (S, H, W), those int16 cannot hold, and whether anything had to be rounded."""
    if values.dtype == np.int16:
        return np.ascontiguousarray(values), {}, False
    array = np.zeros(values.shape, dtype=np.int16)
    broken, fractional = {}, False
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


def _mapped(values: np.ndarray, low: float, high: float) -> tuple[np.ndarray, dict[int, str]]:
    """Slices with low..high mapped to 0..STORED_HIGH, and those that are not finite."""
    if not high > low:
        raise Unreadable(
            f"shows no contrast: its 0.5th and 99.5th percentiles are {low:g} and {high:g}"
        )
    array = np.zeros(values.shape, dtype=np.int16)
    broken = {}
    for z, image in enumerate(values):
        if reason := _not_finite(image):
            broken[z] = reason
            continue
        scaled = (image.astype(np.float64) - low) * (STORED_HIGH / (high - low))
        array[z] = np.clip(np.rint(scaled), INT16.min, INT16.max)
    return array, broken


def _not_finite(image: np.ndarray) -> str | None:
    if image.dtype.kind != "f":
        return None
    number = image.size - int(np.count_nonzero(np.isfinite(image)))
    return f"NaN or infinity ({number} pixels)" if number else None


def _scale(windowed: bool, intensity: dict[str, float] | None) -> Scale:
    if windowed:
        return Scale(BODY_ABOVE * 255, math.inf, (0.0, 255.0), "of 255")
    if intensity is None:
        return Scale(BODY_ABOVE_HU, TOP_OF_12_BITS_HU, HASH_WINDOW_HU, "HU")
    low, high = intensity["stored_low"], intensity["stored_high"]
    window = (low, max(high, low + 1))
    return Scale(low + BODY_ABOVE * (high - low), INT16.max, window, "as stored")


def _emptiness(image: np.ndarray, scale: Scale) -> str | None:
    """Why a slice shows nothing, None if it shows something."""
    if image.min() == image.max():
        return f"constant (every pixel is {image[0, 0]})"
    body = fraction(image > scale.body_above)
    if body < AIR_ONLY_BELOW:
        return f"air only ({body:.2%} of the pixels above {scale.body_above:g} {scale.unit})"
    return None


def fraction(mask: np.ndarray) -> float:
    """Share of True, from 0 to 1."""
    return float(np.count_nonzero(mask) / mask.size)
