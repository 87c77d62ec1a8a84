"""What is shown of a run: its parts, how far each is, how it goes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

_LATE = 20  # times the usual interval between two lines, and at least
_LATE_S = 600.0


@dataclass(frozen=True)
class Curve:
    """A number over the steps or epochs of a part.

    Attributes:
        name: In words.
        values: In order, at least one; those that are not finite are left out.
    """

    name: str
    values: Sequence[float]


@dataclass(frozen=True)
class Part:
    """A stage of a pretraining, or a fold of a fine-tuning.

    Attributes:
        name: Such as ``stage 1``.
        state: In words, such as ``runs`` or ``stopped by a signal``.
        done: Units that are done.
        total: Units in all, None where no file says it.
        unit: What is counted, in the plural.
        spent: Seconds of the units that are done, None where unknown.
        left: Seconds of those that are not, None where nothing tells.
        is_guess: Whether ``left`` is computed from another part's speed.
        is_finished: Whether nothing is left to do.
        age: Seconds since the last line that it wrote, None before any.
        figures: Name -> value, of the last moment.
        curves: The most telling ones first.
        wrong: A sentence for each thing that is wrong.
        checked: What ``wrong`` is about, such as ``the check of step 200``; empty before any.
    """

    name: str
    state: str
    done: int
    total: int | None
    unit: str
    spent: float | None = None
    left: float | None = None
    is_guess: bool = False
    is_finished: bool = False
    age: float | None = None
    figures: dict[str, str] = field(default_factory=dict)
    curves: Sequence[Curve] = ()
    wrong: Sequence[str] = ()
    checked: str = ""


@dataclass(frozen=True)
class View:
    """A run at one moment.

    Attributes:
        title: What is run.
        folder: Where.
        parts: In their order, at least one.
        current: Index of the part that is shown in full.
        page: Report of the current part; None before it is written.
    """

    title: str
    folder: Path
    parts: Sequence[Part]
    current: int
    page: Path | None

    @property
    def is_over(self) -> bool:
        """Whether every part is finished."""
        return all(part.is_finished for part in self.parts)

    @property
    def left(self) -> float | None:
        """Seconds that all parts need, None where that of any is unknown."""
        each = [part.left for part in self.parts if not part.is_finished]
        known = [seconds for seconds in each if seconds is not None]
        return sum(known) if len(known) == len(each) else None


def age_of(path: Path) -> float | None:
    """Return the seconds since a file was written; clocks of other machines may run ahead."""
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return None


def is_late(age: float | None, interval: float | None) -> bool:
    """Return whether a file should have got a line long ago.

    Args:
        age: Seconds since its last line.
        interval: Usual seconds between two.
    """
    if age is None or interval is None:
        return False
    return age > max(_LATE_S, _LATE * interval)
