"""The stages of a run, in order: their configs, their folders, what each takes from the last."""

from __future__ import annotations

import difflib
import json
import signal
from pathlib import Path
from typing import TextIO

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.pretrain.checkpoints import CONFIG, EXPORT, INTERRUPTED
from nnunetv2_meddinov3.pretrain.config import (
    StageConfig,
    available,
    check_world,
    differences,
    from_yaml,
    load_config,
    to_yaml,
)
from nnunetv2_meddinov3.pretrain.distributed import Runtime, started, world_size
from nnunetv2_meddinov3.pretrain.loader import open_store, said_of_near_excluded
from nnunetv2_meddinov3.pretrain.provenance import write_provenance
from nnunetv2_meddinov3.pretrain.train import Stage
from nnunetv2_meddinov3.signals import Stop

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


def run(stages: tuple[StageConfig, ...], out: Path, stream: TextIO) -> int:
    """Run every stage that is not finished yet.

    Args:
        stages: Configs in the order of their stages.
        out: Folder of the run; stage N writes to ``out/stageN``.
        stream: Where the main process says how far it is.

    Returns:
        The exit code.

    Raises:
        UserError: If a stage cannot start or go on.
    """
    # all stages before the first starts, and before processes wait for each other
    stages = tuple(_as_begun(config, _folder(out, config.stage)) for config in stages)
    for config in stages:
        check_world(config, world_size())
        open_store(config)
        _check_finished(_folder(out, config.stage), config)
    _check_chain(stages, out)
    with started(stages[0].engine) as runtime, Stop() as stop:
        if runtime.is_main:
            out.mkdir(parents=True, exist_ok=True)
            (out / INTERRUPTED).unlink(missing_ok=True)
        for config in stages:
            folder = _folder(out, config.stage)
            if (folder / EXPORT).is_file():
                _say(runtime, stream, f"stage {config.stage} is finished: {folder / EXPORT}")
                continue
            if said := said_of_near_excluded(config):
                _say(runtime, stream, said)
            previous = None if config.stage == 1 else _folder(out, config.stage - 1)
            stage = Stage(config, folder, runtime, previous=previous, stream=stream)
            if runtime.is_main:
                write_provenance(folder, to_yaml(config), runtime)
            if not stage.run(stop):
                if runtime.is_main:
                    (out / INTERRUPTED).touch()
                _say(
                    runtime, stream, f"stopped by a signal; the same command goes on from {folder}"
                )
                return 128 + (stop.number or signal.SIGTERM)
    return 0


def _folder(out: Path, stage: int) -> Path:
    return out / f"stage{stage}"


def _as_begun(config: StageConfig, folder: Path) -> StageConfig:
    """Decide ``data.near_excluded`` where it is not said: a stage that was begun keeps its slices.

    Raises:
        UserError: If the config that the stage was begun with cannot be read.
    """
    if config.data.near_excluded is not None:
        return config
    near = False
    if (folder / CONFIG).is_file():
        before = from_yaml((folder / CONFIG).read_text(encoding="utf-8"))
        near = bool(before.data.near_excluded)
    data = config.data.model_copy(update={"near_excluded": near})
    return config.model_copy(update={"data": data})


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
        if wants and source is None and not (_folder(out, before) / EXPORT).is_file():
            raise UserError(
                f"stage {config.stage} starts from stage {before}, but {_folder(out, before)} "
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


def _say(runtime: Runtime, stream: TextIO, line: str) -> None:
    if runtime.is_main:
        stream.write(f"{line}\n")
        stream.flush()
