"""Values that are not HU: one linear mapping per volume, by its percentiles, onto int16.

Values of MR, PET and the like mean nothing across volumes but their order, so each volume is mapped
so that its 0.5th percentile becomes 0 and its 99.5th ``STORED_HIGH``. Stored / ``STORED_HIGH`` is
the *normalised* value: 0 to 1 for 99 % of the foreground.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

STORED_HIGH = 16384  # of int16: room for as much again above, and for twice as much below 0
PERCENTILES = (0.5, 99.5)
INT16 = np.iinfo(np.int16)
_MAX_SAMPLE = 4_000_000  # values that percentiles are taken of


@dataclass(frozen=True)
class Mapping:
    """How the values of a volume become stored numbers.

    Attributes:
        low: Value that becomes 0.
        high: Value that becomes ``STORED_HIGH``.
        percentiles: Which of the foreground they are; 0 and 100 are its ends.
    """

    low: float
    high: float
    percentiles: tuple[float, float] = PERCENTILES

    @property
    def has_contrast(self) -> bool:
        """Whether the two values differ, without which nothing can be mapped."""
        return self.high > self.low

    def stored(self, values: np.ndarray) -> np.ndarray:
        """Return finite values as int16, rounded and, far beyond the percentiles, clipped."""
        scaled = (values.astype(np.float64) - self.low) * (STORED_HIGH / (self.high - self.low))
        return np.clip(np.rint(scaled), INT16.min, INT16.max).astype(np.int16)

    def normalised(self, values: np.ndarray) -> np.ndarray:
        """Return values as float64 in which ``low`` is 0 and ``high`` is 1."""
        return (values.astype(np.float64) - self.low) / (self.high - self.low)

    def facts(self) -> dict[str, float]:
        """Return what a record says: a value is ``slope`` times the stored number + ``intercept``.

        That recovers a value to half a ``slope``, unless it was clipped.
        """
        low_percentile, high_percentile = self.percentiles
        return {
            "low": self.low,
            "high": self.high,
            "low_percentile": low_percentile,
            "high_percentile": high_percentile,
            "stored_low": 0.0,
            "stored_high": float(STORED_HIGH),
            "slope": (self.high - self.low) / STORED_HIGH,
            "intercept": self.low,
        }


def mapping_of(array: np.ndarray) -> Mapping:
    """Return the mapping of a volume by the percentiles of its foreground.

    That is every value above the minimum: where air was set to 0, it fills half of one volume and
    nine tenths of another, and percentiles of all voxels would follow the field of view. Where they
    coincide, the ends of the range take their place. Without any contrast the ends are equal.
    """
    values = array.reshape(-1)
    values = values[:: max(1, len(values) // _MAX_SAMPLE)]
    values = values[np.isfinite(values)]
    foreground = values[values > values.min()] if values.size else values
    if not foreground.size:
        only = float(values[0]) if values.size else 0.0
        return Mapping(only, only)
    low, high = np.percentile(foreground.astype(np.float64), PERCENTILES)
    if high > low:
        return Mapping(float(low), float(high))
    return Mapping(float(values.min()), float(values.max()), (0.0, 100.0))
