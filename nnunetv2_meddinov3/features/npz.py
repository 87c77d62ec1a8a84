"""Arrays and a text of JSON in one .npz: written whole or not at all, read without running code."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2_meddinov3.errors import first_line
from nnunetv2_meddinov3.files import replacing

_FACTS = "facts"


class Damaged(ValueError):
    """A file that is not as it was written; the message is the reason, in a few words."""


def write_npz(
    path: Path, facts: dict[str, Any], arrays: dict[str, np.ndarray], compressed: bool = False
) -> None:
    """Write arrays and facts.

    Raises:
        UserError: If that cannot be written.
    """
    content: dict[str, Any] = {**arrays, _FACTS: np.array(json.dumps(facts))}
    with replacing(path) as part, part.open("wb") as file:
        (np.savez_compressed if compressed else np.savez)(file, **content)


def read_npz(path: Path, names: Iterable[str]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the facts of a file, and some of its arrays.

    Raises:
        Damaged: If it is missing or not as it was written.
    """
    try:
        # numpy leaves a file open that it opened itself and cannot read
        with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
            facts = json.loads(str(content[_FACTS]))
            if not isinstance(facts, dict):
                raise Damaged("its facts are none")
            return facts, {name: content[name] for name in names}
    except Damaged:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
        raise Damaged(first_line(error)) from error
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise Damaged(first_line(error)) from error
