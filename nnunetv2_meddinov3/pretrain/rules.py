"""What must hold between the values of a config."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.models.architecture import ROPE_PRECISIONS, SIZES
from nnunetv2_meddinov3.pretrain.schema import KINDS, Head, Schedule, StageConfig

Broken = tuple[str, object, str]  # key, what came, what must hold


def check(config: StageConfig) -> None:
    """Refuse a config that cannot be run.

    Raises:
        UserError: With the first rule that is broken.
    """
    for rules in _RULES:
        for key, value, wanted in rules(config):
            raise UserError(f"{key} must be {wanted}, got {value}.")


def _choices(c: StageConfig) -> Iterator[Broken]:
    allowed = {
        "stage": (c.stage, (1, 2, 3)),
        "init.student": (c.init.student, ("student", "teacher")),
        "model.size": (c.model.size, tuple(SIZES)),
        "model.input_channels": (c.model.input_channels, (1, 3)),
        "model.rope_dtype": (c.model.rope_dtype, ROPE_PRECISIONS),
        "data.views_on": (c.data.views_on, ("auto", "device", "workers")),
        "engine.device": (c.engine.device, ("auto", "cpu", "cuda")),
        "engine.precision": (c.engine.precision, ("auto", "bf16", "fp32")),
        "engine.parallel": (c.engine.parallel, ("ddp", "fsdp2")),
        "engine.compile": (c.engine.compile, ("auto", "always", "never")),
    }
    for key, (value, choices) in allowed.items():
        if value not in choices:
            yield key, repr(value), f"one of {', '.join(map(str, choices))}"
    gram = c.losses.gram.teacher
    if gram.startswith("previous") and not re.fullmatch(r"previous(@\d+)?", gram):
        yield "losses.gram.teacher", repr(gram), "previous or previous@STEP, with a whole number"
    for kind in c.data.values:
        if kind not in KINDS:
            yield "data.values", repr(kind), f"a list of some of {', '.join(KINDS)}"
    if not c.data.values:
        yield "data.values", "none", "at least one kind"


def _numbers(c: StageConfig) -> Iterator[Broken]:
    least = {
        "optim.steps": (c.optim.steps, 1),
        "optim.batch_size": (c.optim.batch_size, 2),
        "optim.freeze_last_layer_steps": (c.optim.freeze_last_layer_steps, 0),
        "losses.koleo_group": (c.losses.koleo_group, 2),
        "crops.global_crops": (c.crops.global_crops, 2),
        "crops.local_crops": (c.crops.local_crops, 1),
        "data.workers": (c.data.workers, 0),
        "data.prefetch": (c.data.prefetch, 1),
        "engine.save_every": (c.engine.save_every, 1),
        "engine.keep_last": (c.engine.keep_last, 1),
        "engine.log_every": (c.engine.log_every, 1),
        "engine.health_every": (c.engine.health_every, 1),
        "engine.max_bad_steps": (c.engine.max_bad_steps, 1),
        "losses.gram.refresh_from": (c.losses.gram.refresh_from, 0),
    }
    optional = {
        "engine.micro_batch": c.engine.micro_batch,
        "engine.keep_every": c.engine.keep_every,
        "engine.report_every": c.engine.report_every,
        "engine.probe_every": c.engine.probe_every,
        "losses.gram.refresh_every": c.losses.gram.refresh_every,
        "losses.gram.max_refreshes": c.losses.gram.max_refreshes,
    }
    least |= {key: (value, 1) for key, value in optional.items() if value is not None}
    for key, (value, lowest) in least.items():
        if value < lowest:
            yield key, value, f"at least {lowest}"
    if c.crops.global_crops != 2:
        yield "crops.global_crops", c.crops.global_crops, "2"
    if c.engine.probe_every and not c.engine.probe_dataset:
        yield (
            "engine.probe_dataset",
            "none",
            "a labelled nnU-Net raw dataset where probe_every is set",
        )


def _shares(c: StageConfig) -> Iterator[Broken]:
    shares = {
        "model.drop_path": c.model.drop_path,
        "masks.probability": c.masks.probability,
        "crops.horizontal_flip": c.crops.horizontal_flip,
        **{
            f"augment.{name}": getattr(c.augment, name)
            for name in vars(c.augment)
            if name.endswith("_probability") and name != "blur_probability"
        },
        **{f"augment.blur_probability.{i}": v for i, v in enumerate(c.augment.blur_probability)},
    }
    for key, value in shares.items():
        if not 0 <= value <= 1:
            yield key, value, "between 0 and 1"
    if c.model.drop_path == 1:
        yield "model.drop_path", 1, "below 1"
    if len(c.augment.blur_probability) != 3:
        yield (
            "augment.blur_probability",
            c.augment.blur_probability,
            "three numbers: first global, second global, local crops",
        )


def _ranges(c: StageConfig) -> Iterator[Broken]:
    positive = (0.0, math.inf)
    anything = (-math.inf, math.inf)
    ranges = {
        "masks.ratio": (c.masks.ratio, (0.0, 0.5)),
        "crops.global_scale": (c.crops.global_scale, (1e-3, 1.0)),
        "crops.local_scale": (c.crops.local_scale, (1e-3, 1.0)),
        "crops.aspect_ratio": (c.crops.aspect_ratio, (0.1, 10.0)),
        "intensity.clip_hu": (c.intensity.clip_hu, anything),
        "augment.window_level_hu": (c.augment.window_level_hu, anything),
        "augment.window_width_hu": (c.augment.window_width_hu, (1.0, math.inf)),
        "augment.contrast": (c.augment.contrast, positive),
        "augment.brightness_hu": (c.augment.brightness_hu, anything),
        "augment.gamma": (c.augment.gamma, (1e-2, math.inf)),
        "augment.blur_sigma_pixels": (c.augment.blur_sigma_pixels, positive),
        "augment.noise_sd_hu": (c.augment.noise_sd_hu, positive),
        "augment.low_resolution": (c.augment.low_resolution, (1e-2, 1.0)),
        "optim.betas": (c.optim.betas, (0.0, 1.0)),
    }
    for key, (value, (lowest, highest)) in ranges.items():
        ordered = len(value) == 2 and lowest <= value[0] <= value[1] <= highest
        if not ordered or not all(map(math.isfinite, value)):
            yield key, list(value), f"two numbers in order, from {lowest:g} to {highest:g}"
    if c.intensity.clip_hu[0] == c.intensity.clip_hu[1]:
        yield "intensity.clip_hu", list(c.intensity.clip_hu), "two different numbers"
    above_zero = {
        "intensity.std_hu": c.intensity.std_hu,
        "optim.clip_grad": c.optim.clip_grad,
        "optim.layerwise_decay": c.optim.layerwise_decay,
        "losses.student_temp": c.losses.student_temp,
        "model.norm_eps": c.model.norm_eps,
    }
    for key, value in above_zero.items():
        if not 0 < value < math.inf:
            yield key, value, "above 0"


def _sizes(c: StageConfig) -> Iterator[Broken]:
    patch, gram = SIZES[c.model.size].patch_size, c.losses.gram
    if not c.crops.resolutions:
        yield "crops.resolutions", "none", "at least one combination of crop sizes"
    needs_gram_crops = gram.weight is not None and gram.teacher != "ema"
    for i, each in enumerate(c.crops.resolutions):
        key = f"crops.resolutions.{i}"
        for name in ("global_size", "local_size", "gram_size"):
            size = getattr(each, name)
            if size is not None and (size < 2 * patch or size % patch):
                yield f"{key}.{name}", size, f"a multiple of {patch} pixels, at least {2 * patch}"
        if each.local_size > each.global_size:
            yield (
                f"{key}.local_size",
                each.local_size,
                f"at most its global_size {each.global_size}",
            )
        if needs_gram_crops and each.gram_size is None:
            yield f"{key}.gram_size", "none", "a size in pixels where there is a Gram teacher"
        if not 0 <= each.probability <= 1:
            yield f"{key}.probability", each.probability, "between 0 and 1"
    total = sum(each.probability for each in c.crops.resolutions)
    if not math.isclose(total, 1, abs_tol=1e-6):
        yield "crops.resolutions", f"a sum of {total:g}", "probabilities that sum to 1"
    if c.optim.batch_size % c.losses.koleo_group:
        yield (
            "optim.batch_size",
            c.optim.batch_size,
            f"a multiple of losses.koleo_group={c.losses.koleo_group}",
        )


def _heads(c: StageConfig) -> Iterator[Broken]:
    for name, head in (("dino", c.heads.dino), ("ibot", c.heads.ibot)):
        for field in vars(Head()):
            if getattr(head, field) < 1:
                yield f"heads.{name}.{field}", getattr(head, field), "at least 1"


def _schedules(c: StageConfig) -> Iterator[Broken]:
    schedules: dict[str, tuple[Schedule, Callable[[float], bool], str]] = {
        "optim.lr": (c.optim.lr, lambda v: v >= 0, "at least 0"),
        "optim.weight_decay": (c.optim.weight_decay, lambda v: v >= 0, "at least 0"),
        "optim.momentum": (c.optim.momentum, lambda v: 0 <= v <= 1, "between 0 and 1"),
        "losses.teacher_temp": (c.losses.teacher_temp, lambda v: v > 0, "above 0"),
        "losses.local_weight": (c.losses.local_weight, lambda v: v >= 0, "at least 0"),
    }
    if c.losses.gram.weight is not None:
        schedules["losses.gram.weight"] = (c.losses.gram.weight, lambda v: v >= 0, "at least 0")
    for key, (schedule, holds, wanted) in schedules.items():
        for end in ("start", "peak", "end"):
            value = getattr(schedule, end)
            if not math.isfinite(value) or not holds(value):
                yield f"{key}.{end}", value, wanted
        cosine = schedule.cosine_steps or 0
        if min(schedule.warmup_steps, cosine) < 0 or schedule.warmup_steps + cosine > c.optim.steps:
            yield (
                f"{key}.warmup_steps + cosine_steps",
                f"{schedule.warmup_steps} + {cosine}",
                f"at most the {c.optim.steps} steps of the stage",
            )


_RULES = (_choices, _numbers, _shares, _ranges, _sizes, _heads, _schedules)
