"""The stages that a command asks for: read, checked and compared with the disk, without torch."""

from __future__ import annotations

import difflib
import json
import os
import shlex
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
    schedules_in,
)
from nnunetv2_meddinov3.pretrain.run_folder import (
    CHECKPOINTS,
    CONFIG,
    EXPORT,
    export_path,
    stage_folder,
)
from nnunetv2_meddinov3.pretrain.shortened import with_steps
from nnunetv2_meddinov3.store.reader import SliceStore

_PREFIXES = ("stage1.", "stage2.", "stage3.")


def stages_of(
    names: list[str],
    overrides: list[str],
    *,
    stage: str = "all",
    store: str | None = None,
    init: str | None = None,
    steps: int | None = None,
) -> tuple[StageConfig, ...]:
    """Read and check the configs that a command asks for.

    Args:
        names: A family such as ``vitb16``, names of shipped configs, or YAML files.
        overrides: ``key=value``, or ``stageN.key=value`` for one stage.
        stage: ``"1"``, ``"2"``, ``"3"`` or ``"all"``.
        store: Slice store, over that of the configs.
        init: Where the first stage starts, over its config.
        steps: Of each stage; what else counts steps in the configs follows. None: as they say.

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
    if steps is not None and steps < 1:
        raise UserError(f"--steps must be at least 1, got {steps}.")
    expanded = _expand(names)
    as_they_are = [load_config(name) for name in expanded]
    numbers = [config.stage for config in as_they_are]
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
    before = {config.stage + 1: config for config in as_they_are}
    return tuple(
        _load(name, number, overrides, steps, before.get(number) or _shipped_before(name))
        for name, number in chosen
    )


def settled(stages: tuple[StageConfig, ...], out: Path | None) -> tuple[StageConfig, ...]:
    """Decide what no config says where a run was begun: it goes on as it began.

    That are ``data.near_excluded``, ``data.modalities``, whether values that are not HU are
    normalised, which runs of before did not do, and the warm-ups of configs that were saved before
    these were a share of the stage.

    Args:
        stages: In their order.
        out: Folder of the run, None for a dry run.

    Raises:
        UserError: If the config that a stage was begun with cannot be read.
    """
    begun: dict[int, StageConfig] = {}
    for stage in (1, 2, 3):
        if out is not None and (before := _begun(out, stage)) is not None:
            begun[stage] = before
    as_hu = any(config.intensity.normalised is None for config in begun.values())
    return tuple(_settled(config, begun.get(config.stage), as_hu) for config in stages)


def _settled(config: StageConfig, begun: StageConfig | None, as_hu: bool) -> StageConfig:
    values = config.model_dump()
    if config.data.near_excluded is None:
        values["data"]["near_excluded"] = bool(begun is not None and begun.data.near_excluded)
    if as_hu:
        values["intensity"]["normalised"] = None
    if begun is not None:
        if config.data.modalities is None:
            values["data"]["modalities"] = begun.data.modalities
        theirs, ours = schedules_in(begun), schedules_in(config)
        for key in theirs.keys() & ours.keys():
            if ours[key].warmup_share is not None and theirs[key].warmup_share is None:
                section, _, name = key.partition(".")
                values[section][name] |= {
                    "warmup_share": None,
                    "warmup_steps": theirs[key].warmup_steps,
                }
    return StageConfig.model_validate(values)


def _begun(out: Path, stage: int) -> StageConfig | None:
    """Return the config that a stage was begun with, None if it was not."""
    path = stage_folder(out, stage) / CONFIG
    return from_yaml(path.read_text(encoding="utf-8")) if path.is_file() else None


def gram_teachers_in_warm_up(stages: tuple[StageConfig, ...], out: Path | None) -> list[str]:
    """Say of every Gram teacher ``previous@STEP`` that it is taken inside a warm-up.

    Args:
        stages: In their order.
        out: Folder of the run, None for a dry run.
    """
    running: dict[int, StageConfig] = {config.stage: config for config in stages}
    said = []
    for config in stages:
        gram, before = config.losses.gram, config.stage - 1
        source = running.get(before) or (None if out is None else _begun(out, before))
        if source is None or not gram.weight or not gram.teacher.startswith("previous@"):
            continue
        step = int(gram.teacher.partition("@")[2])
        schedules = schedules_in(source)
        for key in ("optim.lr", "losses.teacher_temp"):
            schedule = schedules[key]
            if step < schedule.warmup_steps and schedule.start != schedule.peak:
                said.append(
                    f"the Gram teacher of stage {config.stage} is taken at step {step} of stage "
                    f"{before}, inside the warm-up of {key} ({schedule.warmup_steps} steps): set "
                    f"stage{before}.{key}.warmup_share=0.1 or take a later step "
                    f"(stage{before}.engine.export_at and stage{config.stage}.losses.gram.teacher)."
                )
    return said


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
        if gram.startswith("previous@"):
            _check_export(stage_folder(out, before), int(gram.partition("@")[2]), config, source)


def _check_export(folder: Path, step: int, config: StageConfig, source: StageConfig | None) -> None:
    """Refuse a Gram teacher that the stage before neither exported nor will.

    Args:
        folder: Of the stage before.
        step: At which its teacher is wanted.
        config: Of the stage that wants it.
        source: Of the stage before, None if it is not run now.

    Raises:
        UserError: With what can be set, and where, to go on.
    """
    if export_path(folder, step).is_file():
        return
    before, key = config.stage - 1, f"stage{config.stage}.losses.gram.teacher"
    needs = f"{key}=previous@{step} needs the teacher of stage {before} at step {step}, but"
    done = _steps_done(folder)
    if source is None or (folder / EXPORT).is_file() or done >= step:
        found = sorted(
            int(path.stem.rpartition("_")[2])
            for path in export_path(folder, 0).parent.glob("teacher_step_*")
        )
        there = f"it exported those of steps {found}" if found else "it exported none"
        choices = [*(f"previous@{n}" for n in found), "previous (that of its end)"]
        raise UserError(
            f"{needs} it is past that step and {there}: set {key} to {' or '.join(choices)}."
        )
    steps, exports = source.optim.steps, source.engine.export_at
    says = f"{needs} that stage exports at {list(exports)} of {steps} steps:"
    if step > steps:
        possible = [n for n in exports if done < n <= steps] or [max(done + 1, steps // 5)]
        raise UserError(
            f"{says} set stage{before}.engine.export_at=[{possible[0]}] and "
            f"{key}=previous@{possible[0]}, or give --steps {steps} instead of optim.steps."
        )
    if step not in exports:
        both = sorted({*(n for n in exports if n <= steps), step})
        listed = ",".join(map(str, both))
        raise UserError(f"{says} set stage{before}.engine.export_at=[{listed}].")


def _steps_done(folder: Path) -> int:
    """Return the step of the last checkpoint of a stage, 0 without one."""
    names = (path.name for path in (folder / CHECKPOINTS).glob("step_*"))
    return max((int(n) for name in names if (n := name.partition("_")[2]).isdigit()), default=0)


def next_command(
    names: list[str], changes: list[str], last: StageConfig, out: Path, steps: int | None
) -> str | None:
    """Return the command for the stage after the last of a run.

    Args:
        names: The configs as they were given.
        changes: ``key=value`` as given.
        last: Config of the last stage that ran.
        out: Folder of the run.
        steps: ``--steps`` as given.

    Returns:
        None after stage 3, and where the configs are the user's own files.
    """
    sizes = {name.partition("_stage")[0] for name in names}
    if last.stage == 3 or len(sizes) != 1 or not sizes <= set(families()):
        return None
    local = os.environ.get("LOCAL_WORLD_SIZE", "1")
    launcher = (
        f"torchrun --nproc-per-node {local} -m nnunetv2_meddinov3" if world_size() > 1 else ""
    )
    words = [*(launcher or "meddinov3").split(), "pretrain", *sizes, "--stage", str(last.stage + 1)]
    words += ["--store", str(last.data.store), "--out", str(out)]
    words += ["--steps", str(steps)] if steps is not None else []
    return shlex.join([*words, *changes])


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


def _shipped_before(name: str) -> StageConfig | None:
    """Return the config before a shipped one, None for the first of a size and for a file."""
    shipped = available()  # sorted, so that the stages of a size are in order
    place = shipped.index(name) if name in shipped else 0
    size = name.partition("_stage")[0]
    if place == 0 or not shipped[place - 1].startswith(f"{size}_stage"):
        return None
    return load_config(shipped[place - 1])


def _load(
    name: str, number: int, overrides: list[str], steps: int | None, before: StageConfig | None
) -> StageConfig:
    """Read a config with the changes that are meant for its stage."""
    own = f"stage{number}."
    mine = [
        override.removeprefix(own)
        for override in overrides
        if override.startswith(own) or not override.startswith(_PREFIXES)
    ]
    if steps is None:
        return load_config(name, mine)
    return load_config(name, mine, lambda config: with_steps(config, steps, before))
