"""The stages that a command asks for: read, checked and compared with the disk, without torch."""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.files import check_writable
from nnunetv2_meddinov3.locks import refuse_locked
from nnunetv2_meddinov3.pretrain.config import (
    StageConfig,
    available,
    check_world,
    differences,
    from_yaml,
    load_config,
)
from nnunetv2_meddinov3.pretrain.run_folder import CONFIG, EXPORT, stage_folder
from nnunetv2_meddinov3.store.reader import SliceStore

_PREFIXES = ("stage1.", "stage2.", "stage3.")


def stages_of(
    names: list[str],
    overrides: list[str],
    *,
    stage: str = "all",
    store: str | None = None,
    init: str | None = None,
) -> tuple[StageConfig, ...]:
    """Read and check the configs that a command asks for.

    Args:
        names: A family such as ``vitb16``, names of shipped configs, or YAML files.
        overrides: ``key=value``, or ``stageN.key=value`` for one stage.
        stage: ``"1"``, ``"2"``, ``"3"`` or ``"all"``.
        store: Slice store, over that of the configs.
        init: Where the first stage starts, over its config.

    Returns:
        Configs in the order of their stages.

    Raises:
        UserError: If a config, a key or a value is wrong, or a stage is named twice or not at all.
    """
    for override in overrides:
        head, _, rest = override.partition(".")
        if head.startswith("stage") and rest and f"{head}." not in _PREFIXES:
            raise UserError(
                f"a change to one stage must begin with stage1., stage2. or stage3., got "
                f"{override!r}."
            )
    if store is not None:
        overrides = [*overrides, f"data.store={json.dumps(store)}"]
    expanded = _expand(names)
    numbers = [load_config(name).stage for name in expanded]
    if sorted(set(numbers)) != numbers:
        raise UserError(
            f"the configs must be of different stages in their order, got stages {numbers}: "
            "give one config for each stage."
        )
    chosen = [
        (name, number)
        for name, number in zip(expanded, numbers, strict=True)
        if stage in ("all", str(number))
    ]
    if not chosen:
        raise UserError(
            f"--stage {stage} must be one of the stages of the configs, which are {numbers}."
        )
    if init is not None:
        overrides = [*overrides, f"stage{chosen[0][1]}.init.source={json.dumps(init)}"]
    return tuple(_load(name, number, overrides) for name, number in chosen)


def check(stages: tuple[StageConfig, ...], out: Path | None) -> None:
    """Compare configs with the number of processes, the stores and the folder of the run.

    Args:
        stages: In their order.
        out: Folder of the run; None for a dry run, which needs none.

    Raises:
        UserError: If a batch does not divide, a store is missing, the folder cannot be written to,
            holds other stages or is in use, or a stage lacks the one before it.
    """
    for config in stages:
        check_world(config, world_size())
    for store in dict.fromkeys(config.data.store for config in stages):
        if not store:
            raise UserError(
                "pretraining needs a slice store: give --store DIR (`meddinov3 curate`)."
            )
        SliceStore(store)
    if out is None:
        return
    for config in stages:
        _check_finished(stage_folder(out, config.stage), config)
    _check_chain(stages, out)
    if unfinished := [c for c in stages if not is_finished(out, c.stage)]:
        refuse_locked(out)
        for config in unfinished:
            check_writable(stage_folder(out, config.stage))


def is_finished(out: Path, stage: int) -> bool:
    """Return whether a stage of a run needs nothing more."""
    return (stage_folder(out, stage) / EXPORT).is_file()


def world_size() -> int:
    """Return the number of processes that torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _check_finished(folder: Path, config: StageConfig) -> None:
    """Refuse to take a finished stage for one with another config.

    Raises:
        UserError: If anything that changes results differs.
    """
    if not (folder / EXPORT).is_file() or not (folder / CONFIG).is_file():
        return
    before = from_yaml((folder / CONFIG).read_text(encoding="utf-8"))
    if changed := differences(before, config):
        raise UserError(
            f"{folder} is finished with another config ({'; '.join(changed[:3])}): give the same "
            "values, or another --out."
        )


def _check_chain(stages: tuple[StageConfig, ...], out: Path) -> None:
    """Refuse a stage whose predecessor neither exists nor runs before it.

    Raises:
        UserError: If the previous stage is missing.
    """
    running: dict[int, StageConfig] = {config.stage: config for config in stages}
    for config in stages:
        gram = config.losses.gram.teacher if config.losses.gram.weight else ""
        wants = (
            config.init.source == "previous" or gram == "retained" or gram.startswith("previous")
        )
        if wants and config.stage == 1:
            raise UserError("stage 1 has no previous stage: set init.source to none or to weights.")
        before, source = config.stage - 1, running.get(config.stage - 1)
        if wants and source is None and not (stage_folder(out, before) / EXPORT).is_file():
            raise UserError(
                f"stage {config.stage} starts from stage {before}, but {stage_folder(out, before)} "
                f"holds no {EXPORT}: run that stage first (--stage all runs them in order), or "
                "give --init."
            )
        if gram.startswith("previous@") and source is not None:
            step = int(gram.partition("@")[2])
            if step not in source.engine.export_at or step > source.optim.steps:
                raise UserError(
                    f"losses.gram.teacher={gram} needs the teacher of stage {before} at step "
                    f"{step}, but that stage exports at {list(source.engine.export_at)} of "
                    f"{source.optim.steps} steps: set stage{before}.engine.export_at=[{step}]."
                )


def _expand(names: list[str]) -> list[str]:
    """Replace a family by the names of its stages."""
    if not names:
        raise UserError(
            f"pretraining needs a config: give one of {', '.join(families())}, or a YAML."
        )
    shipped, out = available(), []
    for name in names:
        family = [other for other in shipped if other.startswith(f"{name}_stage")]
        if not family and name not in shipped and not Path(name).is_file():
            near = difflib.get_close_matches(name, [*families(), *shipped], n=1)
            hint = f"did you mean {near[0]}?" if near else "shipped: " + ", ".join(families()) + "."
            raise UserError(f"a config must be a shipped name or a YAML file, got {name!r}: {hint}")
        out += family or [name]
    return out


def families() -> list[str]:
    """Return the families of shipped configs, such as ``vitb16``."""
    return sorted({name.partition("_stage")[0] for name in available()})


def _load(name: str, number: int, overrides: list[str]) -> StageConfig:
    """Read a config with the changes that are meant for its stage."""
    own = f"stage{number}."
    mine = [
        override.removeprefix(own)
        for override in overrides
        if override.startswith(own) or not override.startswith(_PREFIXES)
    ]
    return load_config(name, mine)
