"""Keys of configs written before: what they are called and measured in now."""

from __future__ import annotations

from typing import Any

import yaml

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.pretrain.schema import GLOBAL_CROPS, Intensity

RENAMED = {
    "data.values": "data.modalities",
    "data.part": "data.split",
    "intensity.clip_hu": "intensity.hu.clip",
    "intensity.mean_hu": "intensity.hu.mean",
    "intensity.std_hu": "intensity.hu.std",
}
# Ranges in HU that are now shares of the contract's clip range, counted from its lower end or not.
IN_HU = {
    "augment.window_level_hu": ("augment.window_level", True),
    "augment.window_width_hu": ("augment.window_width", False),
    "augment.brightness_hu": ("augment.brightness", False),
    "augment.noise_sd_hu": ("augment.noise_sd", False),
}
REMOVED = {"crops.global_crops": GLOBAL_CROPS, "losses.gram.remove_negatives": False}


def translate(values: dict[str, Any]) -> None:
    """Put the values of a file under today's keys, in place; a key of today outranks its old one.

    Raises:
        UserError: If a removed key has another value than the one that is left.
    """
    for old in RENAMED:
        _move(values, old, None)
    clip = Intensity().hu.clip
    if isinstance(intensity := values.get("intensity"), dict):
        hu = intensity.get("hu")
        clip = hu.get("clip", clip) if isinstance(hu, dict) else clip
    for old in IN_HU:
        _move(values, old, clip)
    for key, only in REMOVED.items():
        *parents, name = key.split(".")
        inner: Any = values
        for parent in parents:
            inner = inner.get(parent) if isinstance(inner, dict) else None
        if isinstance(inner, dict) and name in inner:
            refuse_other_than(key, inner.pop(name), only)


def _move(values: dict[str, Any], old: str, clip: Any) -> None:
    section, _, name = old.partition(".")
    if not isinstance(inner := values.get(section), dict) or name not in inner:
        return
    key, value = translated(old, inner.pop(name), clip)
    *parents, leaf = key.split(".")[1:]
    for parent in parents:
        inner = inner.setdefault(parent, {})
    if isinstance(inner, dict):  # else it is refused later
        inner.setdefault(leaf, value)


def translated(key: str, value: Any, clip: Any) -> tuple[str, Any]:
    """Return today's key and value for one of any time.

    Args:
        key: Of a config.
        value: Its value; what is no range of numbers stays as it is, and is refused later.
        clip: Range of HU that the config keeps.
    """
    if key not in IN_HU:
        return RENAMED.get(key, key), value
    name, from_low = IN_HU[key]
    if _is_range(value) and _is_range(clip) and clip[0] != clip[1]:
        start = clip[0] if from_low else 0
        value = [(each - start) / (clip[1] - clip[0]) for each in value]
    return name, value


def _is_range(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(each) in (int, float) for each in value)
    )


def refuse_other_than(key: str, value: Any, only: Any) -> None:
    """Refuse a key that chooses nothing any more, unless it says what is done anyway.

    Raises:
        UserError: With the value that is left.
    """
    if value != only:
        said = yaml.safe_dump(only).split("\n")[0]
        raise UserError(f"{key} is no longer an option and must be {said}, got {value!r}.")
