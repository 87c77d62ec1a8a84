"""Signals that ask a long job to stop: noted, so that the work in hand is finished and saved."""

from __future__ import annotations

import contextlib
import signal
from types import FrameType

# SLURM sends SIGUSR1 (if asked) and SIGTERM before it takes a node away; torchrun hands SIGTERM on.
_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")


class Stop:
    """Notes SIGINT, SIGTERM and SIGUSR1 while it is entered; a second Ctrl-C ends at once.

    Outside the main thread, which alone may handle signals, nothing is noted.

    Attributes:
        number: The first signal that came, None before it.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Stop:
        for number in _numbers():
            with contextlib.suppress(ValueError):  # not the main thread
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.number is None:
            self.number = int(number)


def leave_stopping_to_the_parent() -> None:
    """Let a worker process ignore these signals, which reach a whole group of processes at once."""
    for number in _numbers():
        signal.signal(number, signal.SIG_IGN)


def _numbers() -> list[int]:
    """Return those that this system has: Windows lacks SIGUSR1."""
    return [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
