"""The one exception for mistakes a user can make, and the first line of anybody else's."""

import sys
from types import TracebackType


class UserError(ValueError):
    """A mistake the user can fix: what must hold, what came, what to do, in one sentence.

    Where nobody catches it, also in nnU-Net's own commands, the sentence alone goes to stderr and
    the exit code is 1; there is no traceback.
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


def _show_sentences_alone() -> None:
    """Let uncaught ``UserError``s end the process with their sentence, and leave others as is."""
    show_others = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, UserError):
            sys.stderr.write(f"{error}\n")
        else:
            show_others(kind, error, trace)

    sys.excepthook = show


_show_sentences_alone()
