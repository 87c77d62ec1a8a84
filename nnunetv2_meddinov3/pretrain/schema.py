"""What a stage's config may say: a model per section, with meanings, units, defaults and rules.

The defaults are those of stage 1 for a ViT-B (``configs/stage1.yaml``, which has their sources). A
*step* is one optimiser step, from 0 in each stage. ``MAY_CHANGE`` of a section names the keys that
may differ when a run is resumed; all others change results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.models.architecture import SIZES
from nnunetv2_meddinov3.pretrain.schema_values import (
    AreaRange,
    Count,
    Positive,
    PositiveRange,
    Range,
    Share,
    Text,
    gram_source,
    ordered,
    size_name,
    three,
    two_different,
)

Kind = Literal["hu", "windowed", "mr", "other", "unknown"]
KINDS: dict[str, str] = {
    "hu": "CT in HU",
    "windowed": "8-bit grey values whose HU are lost",
    "mr": "MR",
    "other": "other modalities (PET, ultrasound, X-ray)",
    "unknown": "values of unknown meaning",
}
GLOBAL_CROPS = 2  # of an image, as in every DINO


class Section(BaseModel):
    """A part of a config; unknown keys, other types and infinite numbers are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset()


class Schedule(Section):
    """A value over the steps of a stage: linear, then cosine, then constant.

    Linear from ``start`` to ``peak`` over ``warmup_steps`` (the first step has ``start``, ``peak``
    comes right after the last), cosine from ``peak`` to ``end`` over ``cosine_steps`` including
    both ends, then ``end``. A ``warmup_share`` of the stage decides ``warmup_steps``; a config or
    change that gives steps alone has no share.
    """

    start: float
    peak: float
    end: float
    warmup_share: Share | None = None  # of the stage's steps
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    cosine_steps: Annotated[int, Field(ge=0)] | None = None  # None: all that is left


def _constant(value: float) -> Schedule:
    return Schedule(start=value, peak=value, end=value, cosine_steps=0)


class Model(Section):
    """The ViT.

    ``size`` must be that of the weights. What is None is as the weights say, and as named beside it
    for random ones; the config that a run saves has the values it used. A stated ``qkv_bias`` must
    be that of the weights, a stated ``norm_eps`` or ``rope_dtype`` is used in place of theirs.
    """

    size: Annotated[str, AfterValidator(size_name)] = "vit_base"
    input_channels: Literal[1, 3] = 3  # one slice is repeated; 1 sums a pretrained stem's kernels
    qkv_bias: bool | None = None  # random: true
    norm_eps: Annotated[float, Field(gt=0, lt=1)] | None = None  # random: 1e-6
    rope_dtype: Literal["fp32", "bf16"] | None = None  # random: fp32
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.2  # share of images that skip a branch
    rope_shift: float | None = None  # add U(-s, s) to each axis
    rope_jitter: float | None = None  # multiply each axis by exp(U(-ln j, ln j))
    rope_rescale: float | None = 2.0  # multiply both axes by one exp(U(-ln r, ln r))


class Head(Section):
    """A projection head: D -> hidden -> ... -> bottleneck, normalised, -> prototypes."""

    prototypes: Count = 65536
    hidden_dim: Count = 2048
    bottleneck_dim: Count = 256
    layers: Count = 3


class Heads(Section):
    """The two heads, which share nothing."""

    dino: Head = Head()
    ibot: Head = Head()


class Init(Section):
    """Where a stage starts.

    Attributes:
        source: ``none`` (random), any weights (a path, ``timm:NAME``, ``hf:...``), or an earlier
            stage with heads: ``previous`` under ``--stage all``, or its folder or checkpoint.
        student: Which branch of an earlier stage the student continues: ``student`` keeps both
            branches as they were, ``teacher`` copies the teacher into both.
        optimizer: Whether the state of AdamW is continued too.
    """

    source: Text = "timm:vit_base_patch16_dinov3.lvd1689m"
    student: Literal["student", "teacher"] = "student"
    optimizer: bool = False


class Gram(Section):
    """Gram anchoring (DINOv3, sec. 4.2).

    Its teacher is any weights, ``ema`` (the teacher itself, no Gram crops), ``init`` (the backbone
    this stage starts from), ``previous`` (the last stage's teacher at its end), ``previous@STEP``
    (its teacher exported at that step) or ``retained`` (the last stage's Gram teacher).
    """

    weight: Schedule | None = None  # None: a stage without it
    teacher: Annotated[Text, AfterValidator(gram_source)] = "ema"
    refresh_every: Count | None = None  # copy the teacher into it every so many steps; None: never
    refresh_from: Annotated[int, Field(ge=0)] = 0  # first step at which it may be copied
    max_refreshes: Count | None = None  # None: without limit


class Losses(Section):
    """Weights and temperatures of the losses."""

    dino_weight: float = 1.0
    local_weight: Schedule = _constant(1)
    ignore_diagonal: bool = True
    ibot_weight: float = 1.0
    # what keeps the cls tokens of a batch apart: their nearest neighbours far away (KoLeo), or
    # their projections near a standard normal (SIGReg, in place of KoLeo)
    regulariser: Literal["koleo", "sigreg"] = "koleo"
    koleo_weight: float = 0.1
    sigreg_weight: float = 0.05  # FINO (arXiv 2606.05107)
    sigreg_slices: Count = 1024  # random directions, others at each step; FINO
    # images; neighbours are searched, and masks are drawn, in such groups
    koleo_group: Annotated[int, Field(ge=2)] = 16
    student_temp: Positive = 0.1
    teacher_temp: Schedule = Schedule(
        start=0.04, peak=0.07, end=0.07, warmup_share=0.1, cosine_steps=0
    )
    gram: Gram = Gram()


class Masks(Section):
    """Which patches the student does not see."""

    probability: Share = 0.5  # share of global crops with a mask
    ratio: Annotated[list[float], ordered(0, 0.5)] = [0.1, 0.5]  # share of their patches


class Resolution(Section):
    """One combination of crop sizes in pixels; each step draws one."""

    global_size: int
    local_size: int
    gram_size: int | None = None
    probability: Share = 1.0


class Crops(Section):
    """Geometry of the views: two global crops of an image and some local ones."""

    resolutions: Annotated[list[Resolution], Field(min_length=1)] = [
        Resolution(global_size=256, local_size=112)
    ]
    local_crops: Count = 8
    global_scale: AreaRange = [0.32, 1.0]  # share of the slice's area
    local_scale: AreaRange = [0.05, 0.32]
    aspect_ratio: Annotated[list[float], ordered(0.1, 10)] = [0.75, 4 / 3]
    horizontal_flip: Share = 0.5  # probability


class Contract(Section):
    """What is done to values: clipped, ``mean`` subtracted, divided by ``std``."""

    clip: Annotated[Range, AfterValidator(two_different)]
    mean: float
    std: Positive


class Intensity(Section):
    """The intensity contracts: what a network that was trained here expects of its input."""

    hu: Contract = Contract(clip=[-1000.0, 1000.0], mean=65.1084213256836, std=178.01663208007812)
    # of all other values: 0 and 1 are the percentiles of a volume; None: runs of before took every
    # stored number for HU
    normalised: Contract | None = Contract(clip=[-0.25, 1.25], mean=0.4, std=0.27)


class Augment(Section):
    """Photometric changes of a view, before normalisation; each drawn for each crop.

    ``*_probability`` is the share of crops that are changed; Gram crops never are. Values are
    shares of the range of the contract's ``clip``, 2000 HU for CT.
    """

    window_probability: Share = 0.5
    window_level: Range = [0.4, 0.6]  # from the lower end of the range: -200 to 200 HU
    window_width: Annotated[list[float], ordered(1e-4)] = [0.2, 1.0]  # 400 to 2000 HU
    contrast_probability: Share = 0.15
    contrast: PositiveRange = [0.75, 1.25]  # factor about the mean
    brightness: Range = [-0.025, 0.025]  # added with it: -50 to 50 HU
    gamma_probability: Share = 0.1
    gamma: Annotated[list[float], ordered(1e-2)] = [0.7, 1.5]
    # of the first global, the second global and the local crops
    blur_probability: Annotated[list[Share], AfterValidator(three)] = [0.0, 0.9, 0.5]
    blur_sigma_pixels: PositiveRange = [0.1, 2.0]
    noise_probability: Share = 0.1
    noise_sd: PositiveRange = [0.0, 0.025]  # to 50 HU
    low_resolution_probability: Share = 0.25
    low_resolution: Annotated[list[float], ordered(1e-2, 1)] = [0.5, 1.0]  # zoom factor


class Optim(Section):
    """AdamW and what changes over the steps. Learning rates hold for a batch of 512 images."""

    steps: Count = 100_000
    # images per step, all ranks and micro-batches together
    batch_size: Annotated[int, Field(ge=2)] = 512
    lr: Schedule = Schedule(start=0, peak=2e-4, end=2e-4, warmup_share=0.1, cosine_steps=0)
    weight_decay: Schedule = _constant(0.04)
    momentum: Schedule = _constant(0.994)  # of the EMA
    freeze_last_layer_steps: Annotated[int, Field(ge=0)] = 3000
    layerwise_decay: Positive = 0.9
    patch_embed_lr_multiplier: float = 0.2
    betas: Annotated[list[float], ordered(0, 1)] = [0.9, 0.999]
    clip_grad: Positive = 3.0  # L2, of backbone and of each head alone
    seed: int = 0


class Data(Section):
    """The slice store and how it is read."""

    MAY_CHANGE = frozenset({"store", "workers", "prefetch", "views_on"})  # slices are compared

    store: Text | None = None  # folder of `meddinov3 curate`
    # kinds of slices that are trained on (KINDS); None: the store's, if it holds CT in HU, MR or
    # other modalities alone
    modalities: Annotated[list[Kind], Field(min_length=1)] | None = None
    split: Text | None = None  # name of a part of `meddinov3 store split`; None: all slices
    # whether slices that look like an excluded one (the flag of `meddinov3 curate`) are trained on;
    # None: no, but a stage that was begun goes on as it was begun
    near_excluded: bool | None = None
    workers: Annotated[int, Field(ge=0)] = 8  # processes that read slices, on each rank
    prefetch: Count = 4  # groups of images that each of them keeps ready
    # where crops are made; auto: on the GPU if there is one, else by the workers
    views_on: Literal["auto", "device", "workers"] = "auto"


class Engine(Section):
    """How it runs.

    All but ``precision`` may change when a run is resumed: losses and gradients stay the same but
    for rounding and, with another ``micro_batch``, for what the student draws.
    """

    MAY_CHANGE = frozenset(
        {"device", "compile", "micro_batch", "parallel", "activation_checkpointing"}
        | {"max_bad_steps", "export_at"}
        | {"save_every", "keep_last", "keep_every", "log_every", "health_every", "report_every"}
        | {"probe_every", "probe_dataset", "tensorboard", "wandb"}
    )

    device: Literal["auto", "cpu", "cuda"] = "auto"
    micro_batch: Count | None = 64  # images per rank that are forwarded at once; None: all
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 on a GPU that has it
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    compile: Literal["auto", "always", "never"] = "auto"  # each block; auto: on a GPU
    activation_checkpointing: bool = False  # recompute the student's blocks in the backward pass
    save_every: Count = 1000  # steps between two checkpoints
    keep_last: Count = 2  # checkpoints that stay
    keep_every: Count | None = 10_000  # those at multiples of this stay for good; None: none
    export_at: list[int] = [20_000]  # steps at which the teacher is exported, besides the end
    log_every: Count = 10  # steps between two lines of the log
    health_every: Count = 100  # steps between two checks of health
    report_every: Count | None = 5000  # steps between two report.html; None: at the end alone
    probe_every: Count | None = None  # steps between two probes; None: never
    probe_dataset: Text | None = None  # labelled nnU-Net raw dataset for them
    max_bad_steps: Count = 3  # in a row that may be skipped for numbers that are not finite
    tensorboard: bool = False  # write TensorBoard events too
    wandb: Text | None = None  # project of Weights & Biases to log to


class StageConfig(Section):
    """One stage."""

    stage: Literal[1, 2, 3] = 1
    init: Init = Init()
    model: Model = Model()
    heads: Heads = Heads()
    losses: Losses = Losses()
    masks: Masks = Masks()
    crops: Crops = Crops()
    intensity: Intensity = Intensity()
    augment: Augment = Augment()
    optim: Optim = Optim()
    data: Data = Data()
    engine: Engine = Engine()

    @model_validator(mode="after")
    def _rules_between_sections(self) -> StageConfig:
        for schedule in schedules_in(self).values():
            if schedule.warmup_share is not None:
                schedule.warmup_steps = math.floor(schedule.warmup_share * self.optim.steps + 0.5)
        for rules in (_sizes, _schedules):
            for key, value, wanted in rules(self):
                raise UserError(f"{key} must be {wanted}, got {value}.")
        return self


def schedules_in(c: StageConfig) -> dict[str, Schedule]:
    """Return the schedules of a stage by their keys."""
    optim, losses = c.optim, c.losses
    found = {f"optim.{name}": getattr(optim, name) for name in ("lr", "weight_decay", "momentum")}
    found |= {f"losses.{name}": getattr(losses, name) for name in ("teacher_temp", "local_weight")}
    found["losses.gram.weight"] = losses.gram.weight
    return {key: schedule for key, schedule in found.items() if schedule is not None}


Broken = tuple[str, object, str]  # key, what came, what must hold


def _sizes(c: StageConfig) -> Iterator[Broken]:
    patch, gram = SIZES[c.model.size].patch_size, c.losses.gram
    needs_gram_crops = gram.weight is not None and gram.teacher != "ema"
    for i, each in enumerate(c.crops.resolutions):
        key = f"crops.resolutions.{i}"
        for name in ("global_size", "local_size", "gram_size"):
            size = getattr(each, name)
            if size is not None and (size < 2 * patch or size % patch):
                yield f"{key}.{name}", size, f"a multiple of {patch} pixels, at least {2 * patch}"
        if each.local_size > each.global_size:
            wanted = f"at most its global_size {each.global_size}"
            yield f"{key}.local_size", each.local_size, wanted
        if needs_gram_crops and each.gram_size is None:
            yield f"{key}.gram_size", "none", "a size in pixels where there is a Gram teacher"
    total = sum(each.probability for each in c.crops.resolutions)
    if not math.isclose(total, 1, abs_tol=1e-6):
        yield "crops.resolutions", f"a sum of {total:g}", "probabilities that sum to 1"
    batch, group = c.optim.batch_size, c.losses.koleo_group
    if batch % group:
        yield "optim.batch_size", batch, f"a multiple of losses.koleo_group={group}"
    if c.engine.probe_every and not c.engine.probe_dataset:
        wanted = "a labelled nnU-Net raw dataset where probe_every is set"
        yield "engine.probe_dataset", "none", wanted


def _schedules(c: StageConfig) -> Iterator[Broken]:
    positive = (lambda v: v >= 0, "at least 0")
    rules: dict[str, tuple[Callable[[float], bool], str]] = {
        "optim.momentum": (lambda v: 0 <= v <= 1, "between 0 and 1"),
        "losses.teacher_temp": (lambda v: v > 0, "above 0"),
    }
    for key, schedule in schedules_in(c).items():
        holds, wanted = rules.get(key, positive)
        for end in ("start", "peak", "end"):
            if not holds(value := getattr(schedule, end)):
                yield f"{key}.{end}", value, wanted
        warmup, cosine = schedule.warmup_steps, schedule.cosine_steps or 0
        if warmup + cosine > c.optim.steps:
            wanted = f"at most the {c.optim.steps} steps of the stage"
            yield f"{key}.warmup_steps + cosine_steps", f"{warmup} + {cosine}", wanted
