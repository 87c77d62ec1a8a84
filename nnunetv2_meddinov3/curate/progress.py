"""How far a curation is: a bar on a terminal, a line now and then elsewhere."""

import time
from typing import TextIO

from tqdm import tqdm

from nnunetv2_meddinov3.curate.ingest import Outcome

DEFAULT_EVERY = 50  # volumes between two lines where there is no terminal


class Progress:
    """Follows a run and says how far it is, with slices per second and the time left.

    Args:
        stream: where to write; None writes nothing.
        every: volumes between two lines where ``stream`` is no terminal.
    """

    def __init__(self, stream: TextIO | None = None, every: int = DEFAULT_EVERY) -> None:
        self._stream = stream
        self._every = every
        self._bar: tqdm | None = None
        self._total = self._done = self._slices = self._skipped = 0
        self._start = time.monotonic()

    def say(self, line: str) -> None:
        """Write a line of its own."""
        if self._stream is not None:
            self._stream.write(f"{line}\n")
            self._stream.flush()

    def start(self, total: int) -> None:
        """Begin to count towards a number of volumes."""
        self._total, self._start = total, time.monotonic()
        if self._stream is not None and self._stream.isatty():
            self._bar = tqdm(total=total, unit="volume", file=self._stream, dynamic_ncols=True)

    def update(self, outcome: Outcome) -> None:
        """Count one more volume."""
        self._done += 1
        self._slices += outcome.slices
        self._skipped += outcome.state == "skipped"
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self._rate():.0f} slices/s, {self._skipped} skipped")
            self._bar.update()
        elif self._done % self._every == 0 or self._done == self._total:
            self.say(self.line())

    def line(self) -> str:
        """How far the run is, in one line."""
        elapsed = time.monotonic() - self._start
        left = elapsed / self._done * (self._total - self._done) if self._done else 0.0
        hours, seconds = divmod(round(left), 3600)
        return (
            f"{self._done}/{self._total} volumes, {self._slices} slices, "
            f"{self._rate():.0f} slices/s, {self._skipped} skipped, "
            f"{hours}:{seconds // 60:02}:{seconds % 60:02} left"
        )

    def close(self) -> None:
        """Finish the bar, if there is one."""
        if self._bar is not None:
            self._bar.close()

    def _rate(self) -> float:
        """Slices per second since the start."""
        return self._slices / max(time.monotonic() - self._start, 1e-9)
