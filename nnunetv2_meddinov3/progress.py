"""How far a long job is: a bar on a terminal, a line every N steps elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TextIO

from tqdm import tqdm


class Progress:
    """Follows a job over a number of units.

    Args:
        total: Units in all; None where that is not known.
        unit: What is counted, in the plural, such as ``"volumes"``.
        title: What is done; written before each line and the bar.
        every: Units between two lines where ``stream`` is not a terminal; the last always gets one.
        done: Units done in an earlier run.
        stream: Where to write; None writes nothing.
    """

    def __init__(
        self,
        total: int | None,
        unit: str,
        *,
        title: str = "",
        every: int = 1,
        done: int = 0,
        stream: TextIO | None = None,
    ) -> None:
        self.total, self.unit, self.title, self.every, self.done = total, unit, title, every, done
        self.stream = stream
        self._first, self._start = done, time.monotonic()
        self._bar: tqdm | None = None
        if stream is not None and stream.isatty():
            self._bar = tqdm(
                total=total,
                initial=done,
                unit=f" {unit}",
                file=stream,
                dynamic_ncols=True,
                desc=title or None,
            )

    def advance(self, facts: str = "", units: int = 1) -> None:
        """Count units that are done.

        Args:
            facts: What to say beside the count, such as ``"loss 3.21, 80 images/s"``; on a
                terminal the last facts stay until there are others.
            units: How many.
        """
        before, self.done = self.done, self.done + units
        if self._bar is not None:
            if facts:
                self._bar.set_postfix_str(facts, refresh=False)
            self._bar.update(units)
        elif self.done // self.every > before // self.every or self.done == self.total:
            self.say(self.line(facts))

    def line(self, facts: str = "") -> str:
        """Return how far the job is, in one line."""
        total = "" if self.total is None else f"/{self.total}"
        parts = [f"{self.done}{total} {self.unit}", facts, self._time_left()]
        return (f"{self.title}: " if self.title else "") + ", ".join(filter(None, parts))

    def say(self, text: str) -> None:
        """Write a line of its own."""
        if self._bar is not None:
            self._bar.write(text, file=self.stream)
        elif self.stream is not None:
            self.stream.write(f"{text}\n")
            self.stream.flush()

    def close(self) -> None:
        """Finish the bar, if there is one."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _time_left(self) -> str:
        """Return hours, minutes and seconds at the mean rate of this run, if a total is known."""
        if self.total is None:
            return ""
        rate = (self.done - self._first) / max(time.monotonic() - self._start, 1e-9)
        seconds = round((self.total - self.done) / rate) if rate else 0
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"


def in_words(seconds: float) -> str:
    """Return a duration in the unit in which it is a small number, such as ``11 min``."""
    for unit, length, up_to in (("s", 1, 90), ("min", 60, 90), ("h", 3600, 48)):
        if (value := seconds / length) < up_to:
            return f"{value:.2g} {unit}" if value < 10 else f"{value:.0f} {unit}"
    return f"{seconds / 86400:.1f} days"
