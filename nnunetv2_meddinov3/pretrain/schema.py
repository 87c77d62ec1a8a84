"""What a stage's config may say: one dataclass per section, a meaning and a unit for every field.

Sections down to ``optim`` decide results; ``data`` and ``engine`` say where things lie and how fast
they go, and should not affect results. A *step* is one optimiser step, from 0 in each stage.
"""

from dataclasses import dataclass, field

KINDS = {
    "hu": "CT in HU",
    "windowed": "8-bit grey values whose HU are lost",
    "mr": "MR, mapped to 0..16384",
    "unknown": "values of unknown meaning",
}


@dataclass
class Schedule:
    """A value over the steps of a stage: linear, then cosine, then constant.

    Linear from ``start`` to ``peak`` over ``warmup_steps`` (the first step has ``start``, ``peak``
    comes right after the last), cosine from ``peak`` to ``end`` over ``cosine_steps`` including
    both ends, then ``end``.
    """

    start: float
    peak: float
    end: float
    warmup_steps: int = 0
    cosine_steps: int | None = None  # None: all that is left


@dataclass
class Model:
    """The ViT. With pretrained weights the architecture is theirs; this is for fresh ones."""

    size: str = "vit_base"
    input_channels: int = 3  # one slice is repeated; 1 sums a pretrained stem's kernels
    qkv_bias: bool = True
    norm_eps: float = 1e-6
    rope_dtype: str = "fp32"
    drop_path: float = 0.2  # share of images that skip a branch, the same for every block
    rope_shift: float | None = None  # add U(-s, s) to each axis
    rope_jitter: float | None = None  # multiply each axis by exp(U(-ln j, ln j))
    rope_rescale: float | None = 2.0  # multiply both axes by one exp(U(-ln r, ln r))


@dataclass
class Head:
    """A projection head: D -> hidden -> ... -> bottleneck, normalised, -> prototypes."""

    prototypes: int = 65536
    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    layers: int = 3


@dataclass
class Heads:
    """The two heads, which share nothing."""

    dino: Head = field(default_factory=Head)
    ibot: Head = field(default_factory=Head)


@dataclass
class Init:
    """Where a stage starts.

    Attributes:
        source: ``none`` (random), any weights (a path, ``timm:NAME``, ``hf:...``), or an earlier
            stage with heads: ``previous`` under ``--stage all``, or its folder or checkpoint.
        student: Which branch of an earlier stage the student continues: ``student`` keeps both
            branches as they were, ``teacher`` copies the teacher into both.
        optimizer: Whether the state of AdamW is continued too.
    """

    source: str = "none"
    student: str = "student"
    optimizer: bool = False


@dataclass
class Gram:
    """Gram anchoring (DINOv3, sec. 4.2).

    Attributes:
        weight: None for a stage without it.
        teacher: Where the Gram teacher comes from: any weights, ``ema`` (the teacher itself, no
            Gram crops), ``init`` (the backbone this stage starts from), ``previous`` (the last
            stage's teacher at its end), ``previous@STEP`` (its teacher exported at that step) or
            ``retained`` (the last stage's Gram teacher).
        remove_negatives: Whether negative similarities count as 0.
        refresh_every: Copy the teacher into the Gram teacher every so many steps; None: never.
        refresh_from: First step at which it may be copied.
        max_refreshes: How often at most; None: without limit.
    """

    weight: Schedule | None = None
    teacher: str = "ema"
    remove_negatives: bool = False
    refresh_every: int | None = None
    refresh_from: int = 0
    max_refreshes: int | None = None


@dataclass
class Losses:
    """Weights and temperatures of the losses."""

    dino_weight: float = 1.0
    local_weight: Schedule = field(default_factory=lambda: Schedule(1.0, 1.0, 1.0))
    ignore_diagonal: bool = True
    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
    koleo_group: int = 16  # images; neighbours are searched, and masks are drawn, in such groups
    student_temp: float = 0.1
    teacher_temp: Schedule = field(default_factory=lambda: Schedule(0.07, 0.07, 0.07))
    gram: Gram = field(default_factory=Gram)


@dataclass
class Masks:
    """Which patches the student does not see."""

    probability: float = 0.5  # share of global crops with a mask
    ratio: list[float] = field(default_factory=lambda: [0.1, 0.5])  # share of their patches


@dataclass
class Resolution:
    """One combination of crop sizes in pixels; each step draws one."""

    global_size: int
    local_size: int
    gram_size: int | None = None
    probability: float = 1.0


@dataclass
class Crops:
    """Geometry of the views."""

    resolutions: list[Resolution] = field(default_factory=lambda: [Resolution(256, 112)])
    global_crops: int = 2
    local_crops: int = 8
    global_scale: list[float] = field(default_factory=lambda: [0.32, 1.0])  # share of the area
    local_scale: list[float] = field(default_factory=lambda: [0.05, 0.32])
    aspect_ratio: list[float] = field(default_factory=lambda: [0.75, 4 / 3])
    horizontal_flip: float = 0.5  # probability


@dataclass
class Intensity:
    """The intensity contract: what a network that was trained here expects of its input."""

    clip_hu: list[float] = field(default_factory=lambda: [-1000.0, 1000.0])
    mean_hu: float = 65.1084213256836
    std_hu: float = 178.01663208007812


@dataclass
class Augment:
    """Photometric changes of a view, in HU before normalisation; each drawn for each crop.

    ``*_probability`` is the share of crops that are changed. Gram crops are never changed.
    """

    window_probability: float = 0.5
    window_level_hu: list[float] = field(default_factory=lambda: [-200.0, 200.0])
    window_width_hu: list[float] = field(default_factory=lambda: [400.0, 2000.0])
    contrast_probability: float = 0.5
    contrast: list[float] = field(default_factory=lambda: [0.75, 1.25])  # factor about the mean
    brightness_hu: list[float] = field(default_factory=lambda: [-50.0, 50.0])  # added with it
    gamma_probability: float = 0.2
    gamma: list[float] = field(default_factory=lambda: [0.7, 1.5])
    blur_probability: list[float] = field(default_factory=lambda: [0.0, 0.9, 0.5])
    blur_sigma_pixels: list[float] = field(default_factory=lambda: [0.1, 2.0])
    noise_probability: float = 0.1
    noise_sd_hu: list[float] = field(default_factory=lambda: [0.0, 50.0])
    low_resolution_probability: float = 0.1
    low_resolution: list[float] = field(default_factory=lambda: [0.5, 1.0])  # zoom factor


@dataclass
class Optim:
    """AdamW and what changes over the steps. Learning rates hold for a batch of 512 images."""

    steps: int = 100_000
    batch_size: int = 512  # images per step, all ranks and micro-batches together
    lr: Schedule = field(default_factory=lambda: Schedule(0.0, 2e-4, 2e-4))
    weight_decay: Schedule = field(default_factory=lambda: Schedule(0.04, 0.04, 0.04))
    momentum: Schedule = field(default_factory=lambda: Schedule(0.994, 0.994, 0.994))  # of the EMA
    freeze_last_layer_steps: int = 0
    layerwise_decay: float = 0.9
    patch_embed_lr_multiplier: float = 0.2
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    clip_grad: float = 3.0  # L2, of backbone and of each head alone
    seed: int = 0


@dataclass
class Data:
    """The slice store and how it is read.

    Attributes:
        store: Folder of ``meddinov3 curate``.
        values: Kinds of slices that may be trained on: ``hu`` (CT in HU), ``windowed`` (8-bit
            grey), ``mr``. A store with another kind is refused.
        part: Name of a part of ``meddinov3 store split``; None for all slices.
        workers: Processes that read slices, on each rank.
        prefetch: Groups of images that each of them keeps ready.
        views_on: ``auto`` (the GPU if there is one, else the workers), ``device`` or ``workers``.
    """

    store: str | None = None
    values: list[str] = field(default_factory=lambda: ["hu"])
    part: str | None = None
    workers: int = 4
    prefetch: int = 4
    views_on: str = "auto"


@dataclass
class Engine:
    """How it runs.

    Attributes:
        device: ``auto``, ``cpu`` or ``cuda``.
        micro_batch: Images per rank that are forwarded at once; None for all of a step.
        precision: ``auto`` (bf16 on a GPU that has it, else fp32), ``bf16`` or ``fp32``.
        parallel: ``ddp`` or ``fsdp2``.
        compile: ``auto`` (on a GPU), ``always`` or ``never``; each block by itself.
        activation_checkpointing: Recompute the student's blocks in the backward pass.
        save_every: Steps between two checkpoints.
        keep_last: Checkpoints that stay.
        keep_every: Checkpoints at multiples of this stay for good; None: none.
        export_at: Steps at which the teacher is exported beside the end of the stage.
        log_every: Steps between two lines of the log.
        health_every: Steps between two checks of health.
        report_every: Steps between two report.html; None: at the end alone.
        probe_every: Steps between two probes; None: never.
        probe_dataset: Labelled nnU-Net raw dataset for them.
        max_bad_steps: Steps in a row that may be skipped for numbers that are not finite.
        tensorboard: Write TensorBoard events too.
        wandb: Project of Weights & Biases to log to; None: do not.
    """

    device: str = "auto"
    micro_batch: int | None = None
    precision: str = "auto"
    parallel: str = "ddp"
    compile: str = "auto"
    activation_checkpointing: bool = False
    save_every: int = 1000
    keep_last: int = 2
    keep_every: int | None = None
    export_at: list[int] = field(default_factory=list)
    log_every: int = 10
    health_every: int = 100
    report_every: int | None = None
    probe_every: int | None = None
    probe_dataset: str | None = None
    max_bad_steps: int = 3
    tensorboard: bool = False
    wandb: str | None = None


@dataclass
class StageConfig:
    """One stage."""

    stage: int = 1
    init: Init = field(default_factory=Init)
    model: Model = field(default_factory=Model)
    heads: Heads = field(default_factory=Heads)
    losses: Losses = field(default_factory=Losses)
    masks: Masks = field(default_factory=Masks)
    crops: Crops = field(default_factory=Crops)
    intensity: Intensity = field(default_factory=Intensity)
    augment: Augment = field(default_factory=Augment)
    optim: Optim = field(default_factory=Optim)
    data: Data = field(default_factory=Data)
    engine: Engine = field(default_factory=Engine)
