"""Configs of stages: complete YAML files, ``key=value`` changes, every mistake in a sentence."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.pretrain.rules import check
from nnunetv2_meddinov3.pretrain.schema import (  # noqa: F401
    KINDS,
    Augment,
    Data,
    Engine,
    Gram,
    Head,
    Heads,
    Init,
    Intensity,
    Losses,
    Masks,
    Model,
    Optim,
    Resolution,
    Schedule,
    StageConfig,
)

_SHIPPED = Path(__file__).parent / "configs"
# sections and keys that say where things lie and how fast they go
_WITHOUT_EFFECT = ("data.store", "data.workers", "data.prefetch", "data.views_on", "engine.")
REFERENCE_BATCH = 512  # the batch at which the learning rates of configs hold


def available() -> list[str]:
    """Return the names of the shipped configs."""
    return sorted(path.stem for path in _SHIPPED.glob("*.yaml"))


def load_config(name_or_path: str, overrides: Sequence[str] = ()) -> StageConfig:
    """Read a stage's config, apply changes and check the whole.

    Args:
        name_or_path: A shipped name such as ``vitb16_stage1``, or a YAML file; what it leaves out
            has the default of ``schema``.
        overrides: ``key=value``, such as ``optim.steps=500`` or ``data.values=[hu,windowed]``.

    Raises:
        UserError: If it does not exist, or a key, a type or a value is wrong.
    """
    path = _find(name_or_path)
    try:
        loaded = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path} must be a readable YAML file: {_first_line(error)}.") from error
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{path} must hold sections such as optim and data, but it holds none.")
    changes = OmegaConf.create()
    for override in overrides:
        _apply(changes, loaded, override)
    return _structured([loaded, changes], str(name_or_path))


def from_yaml(text: str) -> StageConfig:
    """Return the config that ``to_yaml`` wrote."""
    return _structured([OmegaConf.create(text)], "the saved config")


def to_yaml(config: StageConfig) -> str:
    """Return a config as the YAML file that gives it back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def differences(before: StageConfig, now: StageConfig) -> list[str]:
    """Return what differs and can change results, such as ``optim.steps is 5 instead of 4``."""
    a, b = (flatten(dataclasses.asdict(config)) for config in (before, now))
    return [
        f"{key} is {b.get(key)} instead of {a.get(key)}"
        for key in sorted(a | b)
        if a.get(key) != b.get(key) and not key.startswith(_WITHOUT_EFFECT)
    ]


def effective_lr_factor(config: StageConfig) -> float:
    """Return by what the learning rates of the config are multiplied: sqrt(batch / 512)."""
    return math.sqrt(config.optim.batch_size / REFERENCE_BATCH)


def check_world(config: StageConfig, world_size: int) -> None:
    """Refuse a batch that does not divide among the processes and their micro-batches.

    Raises:
        UserError: With numbers that would do.
    """
    batch, group = config.optim.batch_size, config.losses.koleo_group
    micro = config.engine.micro_batch
    if batch % (world_size * group):
        unit = world_size * group
        near = sorted({max(1, batch // unit) * unit, math.ceil(batch / unit) * unit})
        raise UserError(
            "optim.batch_size must be a multiple of processes times losses.koleo_group = "
            f"{world_size} x {group} = {unit}, got {batch}: take {' or '.join(map(str, near))}, "
            "or another number of processes."
        )
    per_rank = batch // world_size
    if micro is not None and (micro % group or per_rank % micro):
        fits = [n for n in range(group, per_rank + 1, group) if per_rank % n == 0]
        raise UserError(
            f"engine.micro_batch must be a multiple of losses.koleo_group={group} that divides the "
            f"{per_rank} images of each process, got {micro}: take one of "
            f"{', '.join(map(str, fits))}."
        )


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries and lists of them with dotted keys."""
    if isinstance(values, dict):
        items: Any = values.items()
    elif isinstance(values, list) and values and isinstance(values[0], dict):
        items = enumerate(values)
    else:
        return {prefix.rstrip("."): values}
    out: dict[str, Any] = {}
    for key, value in items:
        out |= flatten(value, f"{prefix}{key}.")
    return out


def _find(name_or_path: str) -> Path:
    shipped = _SHIPPED / f"{name_or_path}.yaml"
    if name_or_path in available():
        return shipped
    path = Path(name_or_path)
    if path.is_file():
        return path
    near = difflib.get_close_matches(path.stem, available(), n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(available())}."
    raise UserError(f"a config must be a shipped name or a YAML file, got {name_or_path!r}: {hint}")


def _apply(changes: DictConfig, loaded: DictConfig, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"a change must be written key=value, got {override!r}.")
    try:
        value = yaml.safe_load(text) if text else None
        if isinstance(value, str):  # YAML 1.1 takes 1e-4 for text
            value = _number(value)
    except yaml.YAMLError as error:
        raise UserError(
            f"the value of {key} must be a number, a word or a list such as [1,2], got {text!r}."
        ) from error
    parts = key.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():  # an entry of a list: the whole list is given
            parent = ".".join(parts[:i])
            if OmegaConf.select(changes, parent) is None:
                entries = OmegaConf.select(loaded, parent)
                if entries is None or not int(part) < len(entries):
                    raise UserError(f"{parent} must have an entry {part}, but it has none.")
                OmegaConf.update(changes, parent, OmegaConf.to_container(entries))
    OmegaConf.update(changes, key, value, force_add=True)


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def _structured(parts: list[DictConfig], where: str) -> StageConfig:
    for part in parts:
        _check_keys(OmegaConf.to_container(part), StageConfig, "", where)
    merged = OmegaConf.structured(StageConfig)
    try:
        for part in parts:
            merged = OmegaConf.merge(merged, part)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "a value"
        raise UserError(f"{key} in {where} is wrong: {_first_line(error)}.") from error
    check(config)
    return config


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")


def _check_keys(values: Any, kind: Any, prefix: str, where: str) -> None:
    """Refuse unknown keys, with the nearest known one.

    Raises:
        UserError: At the first of them.
    """
    arguments = [a for a in typing.get_args(kind) if a is not types.NoneType]
    if isinstance(values, list):
        for i, value in enumerate(values):
            _check_keys(value, arguments[0] if arguments else None, f"{prefix}{i}.", where)
        return
    if not dataclasses.is_dataclass(kind):
        kind = next((a for a in arguments if dataclasses.is_dataclass(a)), None)
    if kind is None or not isinstance(values, dict):
        return
    fields = typing.get_type_hints(kind)
    for key, value in values.items():
        if key not in fields:
            raise UserError(_unknown(f"{prefix}{key}", prefix, fields, where))
        _check_keys(value, fields[key], f"{prefix}{key}.", where)


def _unknown(key: str, prefix: str, fields: dict[str, Any], where: str) -> str:
    leaf = key.rpartition(".")[2]
    near = difflib.get_close_matches(leaf, fields, n=1)
    known = [k for k in flatten(dataclasses.asdict(StageConfig())) if k.endswith(f".{leaf}")]
    if near:
        hint = f"did you mean {prefix}{near[0]}?"
    elif known:
        hint = f"did you mean {known[0]}?"
    else:
        hint = f"known here: {', '.join(fields)}."
    return f"unknown key {key} in {where}: {hint}"
