"""Folders of preprocessed data: which plans of a dataset may share one.

nnU-Net writes the data of a configuration into the folder ``data_identifier`` and asks nobody whose
data are there. Two plans that name one folder must therefore preprocess in the same way.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

# What nnU-Net's preprocessing reads of a configuration, and of the plans that it is in.
_OF_CONFIGURATION = (
    "preprocessor_name",
    "spacing",
    "normalization_schemes",
    "use_mask_for_norm",
    "resampling_fn_data",
    "resampling_fn_data_kwargs",
    "resampling_fn_seg",
    "resampling_fn_seg_kwargs",
)
_OF_PLANS = (
    "transpose_forward",
    "image_reader_writer",
    "foreground_intensity_properties_per_channel",
)


def preprocessing(plans: dict[str, Any], configuration: str) -> dict[str, Any]:
    """Return all that decides the preprocessed data of a configuration, to be compared with ``==``.

    Numbers are rounded to nine digits, as they come from a file or from another version of NumPy.
    """
    resolved = _resolved(plans, configuration)
    chosen = {key: resolved.get(key) for key in _OF_CONFIGURATION}
    return _rounded(chosen | {key: plans.get(key) for key in _OF_PLANS})


def other_plans(folder: Path, own: str) -> list[dict[str, Any]]:
    """Return the plans in a dataset's preprocessed folder other than ``own``.json."""
    found = []
    for path in sorted(folder.glob("*.json")):
        if path.stem == own:
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # whatever it is, nnU-Net cannot have preprocessed by it
        if isinstance(content, dict) and isinstance(content.get("configurations"), dict):
            found.append(content)
    return found


def users_of(identifier: str, others: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the preprocessing of each configuration whose data are in a folder of that name."""
    for plans in others:
        for name in plans["configurations"]:
            if _resolved(plans, name).get("data_identifier") == identifier:
                yield preprocessing(plans, name)


def free_identifier(
    wanted: dict[str, Any], candidates: Sequence[str], others: list[dict[str, Any]]
) -> str:
    """Return the first folder that no other plans fill with different data.

    Args:
        wanted: What ``preprocessing`` says of the configuration that needs a folder.
        candidates: Names in order of preference; the last is numbered where none is free.
        others: What ``other_plans`` found.
    """
    numbered = (f"{candidates[-1]}-{n}" for n in itertools.count(2))
    return next(
        identifier
        for identifier in itertools.chain(candidates, numbered)
        if all(theirs == wanted for theirs in users_of(identifier, others))
    )


def _resolved(plans: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a configuration with what it inherits, as nnU-Net's PlansManager does."""
    resolved: dict[str, Any] = {}
    visited: set[str] = set()
    link: Any = name
    while isinstance(link, str) and link not in visited:
        visited.add(link)
        configuration = plans["configurations"].get(link)
        if not isinstance(configuration, dict):
            break
        resolved = {**configuration, **resolved}
        link = configuration.get("inherits_from")
    return resolved


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value
