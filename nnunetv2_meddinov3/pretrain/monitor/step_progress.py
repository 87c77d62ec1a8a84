"""How far a stage is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from typing import TextIO

from tqdm import tqdm


class StepProgress:
    """Follows the steps of a stage.

    Args:
        total: Steps of the stage.
        done: Steps done before.
        every: Steps between two lines where ``stream`` is no terminal.
        stream: Where to write; None writes nothing.
        title: What is run.
    """

    def __init__(
        self, total: int, done: int, every: int, stream: TextIO | None, title: str
    ) -> None:
        self.total, self.every, self.stream, self.title = total, every, stream, title
        self._first, self._start = done, time.monotonic()
        self._bar = None
        if stream is not None and stream.isatty():
            self._bar = tqdm(
                total=total, initial=done, unit="step", file=stream, dynamic_ncols=True, desc=title
            )

    def update(self, step: int, loss: float | None, images_per_second: float | None) -> None:
        """Say that ``step`` steps are done.

        Args:
            step: Number of steps done.
            loss: Total loss of a logged step, None between them.
            images_per_second: Of all ranks, since the last logged step.
        """
        if self._bar is not None:
            if loss is not None:
                self._bar.set_postfix_str(f"loss {loss:.3f}, {images_per_second:.0f} images/s")
            self._bar.update(step - self._bar.n)
        elif self.stream is not None and loss is not None:
            left = (
                (time.monotonic() - self._start) / max(step - self._first, 1) * (self.total - step)
            )
            hours, seconds = divmod(round(left), 3600)
            self.say(
                f"{self.title}: step {step}/{self.total}, loss {loss:.4f}, "
                f"{images_per_second:.1f} images/s, {hours}:{seconds // 60:02}:{seconds % 60:02} "
                f"left"
            )

    def say(self, line: str) -> None:
        """Write a line of its own."""
        if self._bar is not None:
            self._bar.write(line, file=self.stream)
        elif self.stream is not None:
            self.stream.write(f"{line}\n")
            self.stream.flush()

    def close(self) -> None:
        """Finish the bar, if there is one."""
        if self._bar is not None:
            self._bar.close()
