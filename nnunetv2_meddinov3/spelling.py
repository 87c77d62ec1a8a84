"""What to say to a misspelt name of one of our trainers or planners."""

import difflib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from nnunetv2_meddinov3.errors import UserError

# of our names, in lower case
_BEGINNINGS = (
    "meddino",
    "dinov3trainer",
    "segformertrainer",
    "dinounettrainer",
    "segdinotrainer",
)


def is_like(name: str, names: Iterable[str]) -> bool:
    """Return whether a name that is not ours looks like one of ours with a typing mistake.

    Somebody's own ``MyMedDINOv3Trainer`` does not.

    Args:
        name: What was asked for.
        names: Ours.
    """
    lower = name.lower()
    if lower.startswith(_BEGINNINGS):
        return True
    known = [each.lower() for each in names]
    if not any(word in lower for word in ("v3trainer", "v3planner")):
        return False
    near = difflib.get_close_matches(lower, known, 1, 0.85)
    return bool(near) and near[0] not in lower


def refuse_misspelt(name: str, names: Sequence[str], host: str | None) -> None:
    """Raise UserError with the nearest of our names, unless somebody else has such a class.

    nnU-Net asks for every name here first and goes on to other files; what it would say in the end
    does not mention what this package has.

    Args:
        name: What was asked for.
        names: Ours.
        host: File of the module of nnU-Net that was asked.
    """
    folders = [Path(host).resolve().parents[1]] if host else []
    folders += [Path(f) for f in os.environ.get("nnUNet_extTrainer", "").split(os.pathsep) if f]
    if any(_mentions(folder, name) for folder in folders):
        return
    epochs = re.search(r"_?([1-9][0-9]*)_?epochs?", name, re.IGNORECASE)
    asked = name if epochs is None else name.replace(epochs[0], "")
    by_lower = {known.lower(): known for known in names}
    near = by_lower[difflib.get_close_matches(asked.lower(), by_lower, 1, 0)[0]]
    advice = f"did you mean {near}?"
    if epochs is not None:
        advice = f"take {near} and export MEDDINOV3_EPOCHS={epochs[1]}, which sets any number."
    raise UserError(
        f"{name} must be one of the names of nnunetv2_meddinov3, but these are "
        f"{', '.join(names)}: {advice}"
    )


def _mentions(folder: Path, name: str) -> bool:
    """Return whether a source file that nnU-Net's search would import has this word."""
    word = re.compile(rb"\b" + re.escape(name).encode() + rb"\b")
    for path in folder.rglob("*.py"):
        try:
            if word.search(path.read_bytes()):
                return True
        except OSError:
            continue  # nnU-Net says so, when it comes to it
    return False
