"""The one exception for mistakes a user can make."""


class UserError(SystemExit, ValueError):
    """A mistake the user can mend: what must hold, what came, what to do, in one sentence.

    As a ``SystemExit`` it leaves nnU-Net's own commands with the sentence alone on stderr and exit
    code 1, without a traceback; as a ``ValueError`` it can be caught in Python like any other.
    """
