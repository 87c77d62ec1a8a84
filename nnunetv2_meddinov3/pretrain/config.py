"""Configs of stages: a stage file and a size's preset, ``key=value`` changes, mistakes in words."""

from __future__ import annotations

import difflib
import math
import re
import typing
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from nnunetv2_meddinov3.errors import UserError, first_line
from nnunetv2_meddinov3.invalid import first_sentence
from nnunetv2_meddinov3.pretrain.earlier_keys import (
    REMOVED,
    refuse_other_than,
    translate,
    translated,
)
from nnunetv2_meddinov3.pretrain.schema import (  # noqa: F401
    GLOBAL_CROPS,
    KINDS,
    Augment,
    Contract,
    Crops,
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
    Section,
    StageConfig,
    schedules_in,
)

_SHIPPED = Path(__file__).parent / "configs"
REFERENCE_BATCH = 512  # the batch at which the learning rates of configs hold
LEFT_TO_THE_WEIGHTS = ("qkv_bias", "norm_eps", "rope_dtype")  # keys of model that may be None


def available() -> list[str]:
    """Return the names of the shipped configs, such as ``vitb16_stage1``."""
    sizes, stages = (_SHIPPED / "sizes").glob("*.yaml"), list(_SHIPPED.glob("*.yaml"))
    return sorted(f"{size.stem}_{stage.stem}" for size in sizes for stage in stages)


def load_config(
    name_or_path: str,
    overrides: Sequence[str] = (),
    prepare: Callable[[StageConfig], StageConfig] | None = None,
) -> StageConfig:
    """Read a stage's config, apply changes and check the whole.

    Args:
        name_or_path: A shipped name such as ``vitb16_stage1``, or a YAML file; what it leaves out
            has the default of ``schema``.
        overrides: ``key=value``, such as ``optim.steps=500`` or ``data.modalities=[hu,windowed]``.
        prepare: Changes what the file says, before the overrides do.

    Raises:
        UserError: If it does not exist, or a key, a type or a value is wrong.
    """
    values = _completed(_find(name_or_path))
    if prepare is not None:
        values = prepare(_checked(values, str(name_or_path))).model_dump()
    for override in overrides:
        _change(values, override, str(name_or_path))
    return _checked(values, str(name_or_path))


def from_yaml(text: str) -> StageConfig:
    """Return the config that ``to_yaml`` wrote, also an earlier version's.

    One without ``data.near_excluded`` is of a time when flagged slices were trained on, one without
    ``intensity.normalised`` of a time when all stored numbers were taken for HU.
    """
    where = "the saved config"
    values = _completed(_sections(text, where), begun=True)
    return _checked(values, where)


def to_yaml(config: StageConfig) -> str:
    """Return a config as the YAML file that gives it back."""
    return yaml.dump(config.model_dump(), Dumper=_Dumper, sort_keys=False)


def differences(before: StageConfig, now: StageConfig) -> list[str]:
    """Return what differs and can change results, such as ``optim.steps is 5 instead of 4``."""
    a, b = flatten(before.model_dump()), flatten(now.model_dump())
    return [
        f"{key} is {b.get(key)} instead of {a.get(key)}"
        for key in sorted(a | b)
        if a.get(key) != b.get(key)
        and not _may_change(key)
        and not _left_open(key, b)
        and not key.endswith(".warmup_share")  # its steps are compared
    ]


def with_architecture(config: StageConfig, architecture: dict[str, Any]) -> StageConfig:
    """Return a config that states what was used where it left that to the weights.

    Args:
        config: Of a stage; it is left as it is.
        architecture: Fields of ``models.Architecture`` by name.
    """
    used = {name: architecture[name] for name in LEFT_TO_THE_WEIGHTS}
    model = config.model.model_copy(update=used)
    return config.model_copy(update={"model": model})


def _left_open(key: str, now: dict[str, Any]) -> bool:
    """Return whether a config leaves a key to the weights, which a run before already read."""
    section, _, name = key.partition(".")
    return section == "model" and name in LEFT_TO_THE_WEIGHTS and now[key] is None


def _may_change(key: str) -> bool:
    section, _, rest = key.partition(".")
    kind = StageConfig.model_fields[section].annotation
    return rest.partition(".")[0] in getattr(kind, "MAY_CHANGE", ())


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


def _find(name_or_path: str) -> dict[str, Any]:
    """Return what a file says, or a stage file with the preset of a size over it."""
    if name_or_path in available():
        size, _, stage = name_or_path.partition("_")
        preset = _read(_SHIPPED / "sizes" / f"{size}.yaml")
        values = _read(_SHIPPED / f"{stage}.yaml")
        for part in ("all_stages", stage.partition("_")[0]):
            _merge(values, preset.get(part, {}))
        return values
    path = Path(name_or_path)
    if path.is_file():
        return _read(path)
    near = difflib.get_close_matches(path.stem, available(), n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(available())}."
    raise UserError(f"a config must be a shipped name or a YAML file, got {name_or_path!r}: {hint}")


def _read(path: Path) -> dict[str, Any]:
    try:
        return _sections(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} must be a readable YAML file: {first_line(error)}.") from error


def _sections(text: str, where: str) -> dict[str, Any]:
    try:
        values = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{where} must be a readable YAML file: {first_line(error)}.") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"{where} must hold sections such as optim and data, but it holds none.")
    return values


def _completed(values: dict[str, Any], begun: bool = False) -> dict[str, Any]:
    """Return the defaults with a file's values over them, under today's keys.

    Args:
        values: Of the file.
        begun: Whether a run saved it: what it does not say is then as it was before the key.
    """
    translate(values)
    merged = StageConfig().model_dump()
    if begun:
        merged["data"] |= {"near_excluded": True, "modalities": ["hu"]}
        merged["intensity"]["normalised"] = None
    _merge(merged, values)
    return merged


def _merge(into: dict[str, Any], values: dict[str, Any]) -> None:
    """Write values over others, section by section; lists are replaced as a whole.

    A warm-up in steps takes the place of one that is a share.
    """
    if values.get("warmup_steps") is not None and "warmup_share" in into:
        values = {"warmup_share": None, **values}
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _change(values: dict[str, Any], override: str, where: str) -> None:
    """Apply one ``key=value`` in place."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"a change must be written key=value, got {override!r}.")
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is not one
        raise UserError(
            f"the value of {key} must be a number, a word or a list such as [1,2], got {text!r}."
        ) from error
    if key in REMOVED:
        return refuse_other_than(key, value, REMOVED[key])
    key, value = translated(key, value, values["intensity"]["hu"]["clip"])
    *parents, leaf = key.split(".")
    inner: Any = values
    for i, part in enumerate(parents):
        if isinstance(inner, list):
            inner = inner[_entry(inner, part, ".".join(parents[:i]))]
        elif isinstance(inner, dict):
            if inner.get(part) is None:
                inner[part] = {}
            inner = inner[part]
    if isinstance(inner, list):
        inner[_entry(inner, leaf, ".".join(parents))] = value
    elif isinstance(inner, dict):
        _merge(inner, {leaf: value})
    else:
        raise UserError(_unknown(key, where))
    return None


def _entry(entries: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(entries):
        raise UserError(f"{key} must have an entry {part}, but it has none.")
    return int(part)


def _checked(values: dict[str, Any], where: str) -> StageConfig:
    try:
        return StageConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(first_sentence(error, lambda key: _unknown(key, where))) from error


def _unknown(key: str, where: str) -> str:
    """Return the sentence on a key that is not known, with the nearest one that is."""
    parent, _, leaf = key.rpartition(".")
    fields = _fields_of(parent.split(".") if parent else [])
    elsewhere = [k for k in flatten(StageConfig().model_dump()) if k.endswith(f".{leaf}")]
    if near := difflib.get_close_matches(leaf, fields, n=1):
        hint = f"did you mean {f'{parent}.' if parent else ''}{near[0]}?"
    elif elsewhere:
        hint = f"did you mean {elsewhere[0]}?"
    else:
        hint = f"known here: {', '.join(fields) or 'no keys, as this is a value'}."
    return f"unknown key {key} in {where}: {hint}"


def _fields_of(parts: list[str]) -> list[str]:
    """Return the keys of a section, none for a value."""
    section: type[Section] | None = StageConfig
    for part in parts:
        if section is not None and not part.isdigit():  # a number is an entry of a list
            section = _section_in(section.model_fields[part].annotation)
    return [] if section is None else list(section.model_fields)


def _section_in(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    found = map(_section_in, typing.get_args(annotation))
    return next((section for section in found if section is not None), None)


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a section."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Return a section."""
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(problem=f"the key {key} stands twice in it")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Puts quotes around text that ``_Loader`` would read as a number."""


for _class in (_Loader, _Dumper):  # PyYAML takes 1e-4 for text, as YAML 1.1 had it
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
        [*"-+.0123456789"],
    )
