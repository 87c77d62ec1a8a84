"""The stages of a run in their order: their configs, their folders, what one leaves to the next."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
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
from nnunetv2_meddinov3.pretrain.loader import open_store
from nnunetv2_meddinov3.pretrain.provenance import write_provenance
from nnunetv2_meddinov3.pretrain.train import Stage
from nnunetv2_meddinov3.signals import Stop

_PREFIXES = ("stage1.", "stage2.", "stage3.")


@dataclass(frozen=True)
class Plan:
    """What a command asks for.

    Attributes:
        stages: Configs in the order of their stages.
        out: Folder of the run; stage N writes to ``out/stageN``.
    """

    stages: tuple[StageConfig, ...]
    out: Path | None

    @classmethod
    def of(
        cls,
        names: list[str],
        overrides: list[str],
        *,
        stage: str = "all",
        store: str | None = None,
        out: Path | None = None,
        init: str | None = None,
    ) -> Plan:
        """Read and check the configs.

        Args:
            names: A family such as ``vitb16``, names of shipped configs, or YAML files.
            overrides: ``key=value``, or ``stageN.key=value`` for one stage.
            stage: ``"1"``, ``"2"``, ``"3"`` or ``"all"``.
            store: Slice store, over that of the configs.
            out: Folder of the run.
            init: Where the first stage starts, over its config.

        Raises:
            UserError: If a config, a key or a value is wrong, or a stage is there twice or not.
        """
        for override in overrides:
            head, _, rest = override.partition(".")
            if head.startswith("stage") and rest and f"{head}." not in _PREFIXES:
                raise UserError(
                    f"a change to one stage must begin with stage1., stage2. or stage3., got "
                    f"{override!r}."
                )
        if store is not None:
            overrides = [*overrides, f"data.store={store}"]
        expanded = _expand(names)
        numbers = [load_config(name).stage for name in expanded]
        if sorted(set(numbers)) != numbers:
            raise UserError(
                f"the configs must be of different stages in their order, got stages {numbers}: "
                "give one config for each stage."
            )
        chosen = [
            _load(name, number, overrides)
            for name, number in zip(expanded, numbers, strict=True)
            if stage in ("all", str(number))
        ]
        if not chosen:
            raise UserError(
                f"--stage {stage} must be one of the stages of the configs, which are {numbers}."
            )
        if init is not None:
            chosen[0].init.source = init
        return cls(tuple(chosen), out)

    def folder(self, config: StageConfig) -> Path:
        """Return where a stage writes."""
        return (self.out or Path()) / f"stage{config.stage}"

    def previous(self, config: StageConfig) -> Path | None:
        """Return the folder of the stage before one, None for the first."""
        return None if config.stage == 1 else (self.out or Path()) / f"stage{config.stage - 1}"


def run(plan: Plan, stream: TextIO) -> int:
    """Run every stage of a plan that is not finished yet.

    Returns:
        The exit code.

    Raises:
        UserError: If a stage cannot start or go on.
    """
    # all stages before the first starts, and before processes wait for each other
    for config in plan.stages:
        check_world(config, world_size())
        open_store(config)
        _check_finished(plan.folder(config), config)
    _check_chain(plan)
    with started(plan.stages[0].engine) as runtime, Stop() as stop:
        marker = plan.out / INTERRUPTED
        if runtime.is_main:
            plan.out.mkdir(parents=True, exist_ok=True)
            marker.unlink(missing_ok=True)
        for config in plan.stages:
            folder = plan.folder(config)
            if (folder / EXPORT).is_file():
                _say(runtime, stream, f"stage {config.stage} is finished: {folder / EXPORT}")
                continue
            stage = Stage(config, folder, runtime, previous=plan.previous(config), stream=stream)
            if runtime.is_main:
                write_provenance(folder, to_yaml(config), runtime)
            if not stage.run(stop):
                if runtime.is_main:
                    marker.touch()
                _say(
                    runtime, stream, f"stopped by a signal; the same command goes on from {folder}"
                )
                return 128 + (stop.number or 15)
    return 0


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


def _check_chain(plan: Plan) -> None:
    """Refuse a stage whose predecessor neither exists nor runs before it.

    Raises:
        UserError: If the previous stage is missing.
    """
    running = {config.stage for config in plan.stages}
    for config in plan.stages:
        gram = config.losses.gram.teacher if config.losses.gram.weight else ""
        wants = (
            config.init.source == "previous" or gram == "retained" or gram.startswith("previous")
        )
        before = plan.previous(config)
        if wants and before is None:
            raise UserError("stage 1 has no previous stage: set init.source to none or to weights.")
        if wants and config.stage - 1 not in running and not (before / EXPORT).is_file():
            raise UserError(
                f"stage {config.stage} starts from stage {config.stage - 1}, but {before} holds no "
                f"{EXPORT}: run that stage first (--stage all runs them in order), or give --init."
            )
        if gram.startswith("previous@") and config.stage - 1 in running:
            step = int(gram.partition("@")[2])
            source = next(c for c in plan.stages if c.stage == config.stage - 1)
            if step not in source.engine.export_at or step > source.optim.steps:
                raise UserError(
                    f"losses.gram.teacher={gram} needs the teacher of stage {source.stage} at "
                    f"step {step}, but that stage exports at {list(source.engine.export_at)} of "
                    f"{source.optim.steps} steps: set "
                    f"stage{source.stage}.engine.export_at=[{step}]."
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
