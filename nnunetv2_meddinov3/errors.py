"""The one exception for mistakes a user can make, and the first line of anybody else's."""

import sys
import threading
from types import TracebackType


class UserError(ValueError):
    """A mistake the user can fix: what must hold, what came, what to do, in one sentence.

    Where nobody catches it, also in nnU-Net's own commands, in a thread or in a process that
    ``torch.multiprocessing.spawn`` started, the sentence alone goes to stderr and there is no
    traceback; a command ends with exit code 1.
    """


def first_line(error: BaseException, limit: int = 200) -> str:
    """Return what an error of another library says, short enough to be quoted in a sentence.

    Args:
        error: An ``OSError`` gives the system's words, SimpleITK's its last line (the first is a
            place in its source), any other its first line, or its class where it says nothing.
        limit: Characters at most.
    """
    said = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    lines = str(said).strip().splitlines()
    told = lines[-1] if lines[0].startswith("Exception thrown in SimpleITK") else lines[0]
    return told.removeprefix("sitk::ERROR: ").rstrip(".")[:limit]


def _sentence(error: BaseException | None) -> str | None:
    """Return the sentence of a ``UserError``, also where torch passes on a child's traceback."""
    if isinstance(error, UserError):
        return str(error)
    *_, last = str(error).rstrip().splitlines() or [""]
    name = f"{UserError.__module__}.{UserError.__qualname__}: "
    return last.removeprefix(name) if last.startswith(name) else None


def _show_sentences_alone() -> None:
    """Show uncaught ``UserError``s as their sentence, in any thread, and leave others as is."""
    show_others, show_others_in_threads = sys.excepthook, threading.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sentence = _sentence(error)
        if sentence is None:
            show_others(kind, error, trace)
        else:
            sys.stderr.write(f"{sentence}\n")

    def show_in_thread(uncaught: threading.ExceptHookArgs) -> None:
        sentence = _sentence(uncaught.exc_value)
        if sentence is None:
            show_others_in_threads(uncaught)
        else:
            sys.stderr.write(f"{sentence}\n")

    sys.excepthook, threading.excepthook = show, show_in_thread


_show_sentences_alone()
