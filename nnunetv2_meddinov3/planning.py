"""The configuration ``2d_N``: what nnU-Net's 2D patch shows, on N pixels along its longest side.

MedDINOv3 trains on finer pixels than nnU-Net plans: the field of view of the 2D patch is spread
over 896 pixels (https://arxiv.org/abs/2509.02379, sec. 3.1). Its formula, ``spacing * patch / 896``
for each axis, squeezes the anatomy where the patch is not square; here one factor serves both axes.

``MedDINOv3Planner`` adds the configuration while nnU-Net plans, ``meddinov3 plan`` adds it to
existing plans; both call ``add_configuration``.
"""

import contextlib
import copy
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import (
    ExperimentPlanner,
)
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.preprocessing.resampling.resample_torch import resample_torch_fornnunet
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.preprocessed import (
    free_identifier,
    other_plans,
    preprocessing,
    users_of,
)
from nnunetv2_meddinov3.settings import backbone_setting, check_variables
from nnunetv2_meddinov3.unet import unet_for

PLANS_NAME = "nnUNetMedDINOv3Plans"
STOCK_PLANS_NAME = "nnUNetPlans"
STOCK_GPU_MEMORY_GB = 8
DEFAULT_BACKBONE = "vit_base"
PATCH_MULTIPLE = 16  # pixels; the side of a ViT's patch
SMALLEST_SIZE, LARGEST_SIZE = 64, 4096  # pixels
MIN_BATCH_SIZE = 2  # nnU-Net's
MAX_DATASET_COVERED = 0.05  # nnU-Net's: the part of all training pixels that one batch may show


class Memory(NamedTuple):
    """GPU memory in training, in GB: ``fixed + per_megapixel * (10^6 pixels in the batch)``."""

    fixed: float
    per_megapixel: float


# Estimates: counted, not measured on a GPU. Fixed: 18 bytes per parameter (weights, gradients and
# AdamW's two moments in fp32, a copy in bf16), twice what one chunk of the decoder keeps, and 1 GB
# for CUDA. Per pixel: 1.2 times what autograd keeps of the backbone under bf16 autocast, and 350
# bytes for logits and loss of 16 classes.
MEMORY = {
    "vit_tiny": Memory(1.2, 0.5),
    "vit_small": Memory(2.0, 1.4),
    "vit_small_plus": Memory(2.1, 1.8),
    "vit_base": Memory(4.0, 2.4),
    "vit_large": Memory(8.6, 5.7),
    "vit_huge_plus": Memory(19.0, 12.8),
    "vit_7b": Memory(140.0, 36.0),
}


class MedDINOv3Planner(ExperimentPlanner):
    """Plans as nnU-Net does and adds ``2d_896``, or ``2d_N`` where ``MEDDINOV3_SIZE`` is N.

    ``MEDDINOV3_BACKBONE`` names the backbone whose memory decides the batch size (vit_base).

    Raises:
        UserError: A variable, the memory target or the name of the plans cannot be used.
    """

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float = STOCK_GPU_MEMORY_GB,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str = PLANS_NAME,
        overwrite_target_spacing: list[float] | tuple[float, ...] | None = None,
        suppress_transpose: bool = False,
    ) -> None:
        check_variables()
        self.added_size = size_setting()
        self.backbone = backbone_setting() or DEFAULT_BACKBONE
        check_gpu_memory(gpu_memory_target_in_gb)
        check_plans_name(plans_name)
        super().__init__(
            dataset_name_or_id,
            gpu_memory_target_in_gb,
            preprocessor_name,
            plans_name,
            overwrite_target_spacing,
            suppress_transpose,
        )

    def plan_experiment(self) -> dict[str, Any]:
        """Write nnU-Net's plans with the added configuration; those added before are kept.

        Returns:
            The plans as written.
        """
        with _a_thread_for_the_planner():
            plans = super().plan_experiment()
        folder = Path(str(nnUNet_preprocessed), self.dataset_name)
        others = other_plans(folder, self.plans_identifier)
        for name in ("2d", "3d_fullres", "3d_lowres"):
            if name in plans["configurations"]:
                self._choose_data_folder(plans, name, others)
        self.plans = add_configuration(
            plans,
            self.added_size,
            gpu_memory_gb=self.UNet_vram_target_GB,
            backbone=self.backbone,
            training_cases=self.dataset_json["numTraining"],
            others=others,
        )
        self.save_plans(self.plans)
        print(describe(self.plans, self.added_size, self.backbone))
        return self.plans

    def generate_data_identifier(self, configuration_name: str) -> str:
        """Name the folder of preprocessed data: nnU-Net's own where the options are nnU-Net's.

        nnU-Net asks while it plans; ``plan_experiment`` compares what was planned afterwards.
        """
        as_stock = (
            self.overwrite_target_spacing is None
            and self.preprocessor_name == "DefaultPreprocessor"
            and not self.suppress_transpose
        )
        if configuration_name == "3d_lowres":  # its spacing follows from the memory
            as_stock = as_stock and self.UNet_vram_target_GB == STOCK_GPU_MEMORY_GB
        owner = STOCK_PLANS_NAME if as_stock else self.plans_identifier
        return f"{owner}_{configuration_name}"

    def _choose_data_folder(
        self, plans: dict[str, Any], name: str, others: list[dict[str, Any]]
    ) -> None:
        """Give a configuration a folder that no other plans fill with different data."""
        configuration = plans["configurations"][name]
        shared, own = configuration["data_identifier"], f"{self.plans_identifier}_{name}"
        wanted = preprocessing(plans, name)
        candidates = [shared, own]
        if shared != own and not any(users_of(shared, others)):
            # nobody planned for this folder yet, so nnU-Net's plans are yet to come
            expected = self._stock_preprocessing(plans, name)
            candidates = [shared, own] if wanted == expected else [own]
        chosen = free_identifier(wanted, candidates, others)
        if chosen != shared:
            print(f"{name} has preprocessed data of its own, {chosen}: those of {shared} differ")
        configuration["data_identifier"] = chosen

    def _stock_preprocessing(self, plans: dict[str, Any], name: str) -> dict[str, Any]:
        """Return how nnU-Net's default planner has this configuration preprocessed."""
        stock = ExperimentPlanner(self.dataset_name)
        transpose, _ = stock.determine_transpose()
        spacing = stock.determine_fullres_target_spacing()[transpose]
        schemes, masks = stock.determine_normalization_scheme_and_whether_mask_is_used_for_norm()
        of_data, data_kwargs, of_seg, seg_kwargs = stock.determine_resampling()
        planned = {
            "preprocessor_name": stock.preprocessor_name,
            "spacing": [float(mm) for mm in (spacing[1:] if name == "2d" else spacing)],
            "normalization_schemes": schemes,
            "use_mask_for_norm": masks,
            "resampling_fn_data": of_data.__name__,
            "resampling_fn_data_kwargs": data_kwargs,
            "resampling_fn_seg": of_seg.__name__,
            "resampling_fn_seg_kwargs": seg_kwargs,
        }
        if name == "3d_lowres" and type(self) is MedDINOv3Planner:
            # its spacing follows from the U-Net and the memory, which are nnU-Net's here
            planned["spacing"] = plans["configurations"][name]["spacing"]
        expected = {
            **plans,
            "transpose_forward": [int(axis) for axis in transpose],
            "image_reader_writer": stock.determine_reader_writer().__name__,
            "configurations": {name: planned},
        }
        return preprocessing(expected, name)


@contextlib.contextmanager
def _a_thread_for_the_planner() -> Iterator[None]:
    """Let nnU-Net plan where ``nnUNet_n_proc_DA`` is 0, as it may be for training.

    nnU-Net takes this number of augmentation processes for one of threads, and torch refuses 0.
    """
    if os.environ.get("nnUNet_n_proc_DA") != "0":
        yield
        return
    os.environ["nnUNet_n_proc_DA"] = "1"
    try:
        yield
    finally:
        os.environ["nnUNet_n_proc_DA"] = "0"


def add_configuration(
    plans: dict[str, Any],
    size: int,
    *,
    gpu_memory_gb: float,
    backbone: str,
    training_cases: int,
    others: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Return a copy of nnU-Net's plans with ``2d_<size>``, which inherits from their ``2d``.

    Args:
        plans: The plans; the patch (pixels) and in-plane spacing (mm) of ``2d`` decide the rest.
        size: Longest side of the new patch in pixels, a multiple of 16.
        gpu_memory_gb: GPU memory that training may take, in GB.
        backbone: A key of ``MEMORY``.
        training_cases: Number of training images, for nnU-Net's limit on the batch size.
        others: The other plans of the dataset, whose preprocessed data must stay.

    Raises:
        UserError: The plans have no configuration ``2d``.
    """
    if "2d" not in plans["configurations"]:
        raise UserError(
            f"2d_{size} needs a configuration 2d to inherit from, but {plans['plans_name']} of "
            f"{plans['dataset_name']} have {', '.join(plans['configurations']) or 'none'}: plan "
            "this dataset again with nnUNetv2_plan_experiment."
        )
    planned = PlansManager(plans).get_configuration("2d").configuration
    longest = int(max(planned["patch_size"]))
    factor = longest / size  # the same for both axes, so that a pixel keeps its aspect
    # In whole numbers: 224 / (256 / 896) may come out a hair above 784 and round up to 800.
    step = longest * PATCH_MULTIPLE
    patch_size = [PATCH_MULTIPLE * -(-int(n) * size // step) for n in planned["patch_size"]]
    median = [round(float(n) / factor) for n in planned["median_image_size_in_voxels"]]
    training_pixels = math.prod(median) * _slices_per_case(plans) * training_cases
    spacing = [float(mm) * factor for mm in planned["spacing"]]
    # Ours replace it; nnU-Net's own trainer, the baseline of a comparison, trains it.
    unet = unet_for(planned["architecture"], patch_size, spacing)
    before = plans["configurations"].get(f"2d_{size}")
    plans = copy.deepcopy(plans)
    plans["configurations"][f"2d_{size}"] = {
        "inherits_from": "2d",
        "data_identifier": f"{plans['plans_name']}_2d_{size}",
        "batch_size": _batch_size(MEMORY[backbone], patch_size, gpu_memory_gb, training_pixels),
        "patch_size": patch_size,
        "median_image_size_in_voxels": median,
        "spacing": spacing,
        **({} if unet is None else {"architecture": unet}),
        # nnU-Net's default takes several times as long to bring logits back to the image. As 2D
        # keeps the slices as they are, resampling all axes at once is linear within the slice;
        # with force_separate_z a long in-plane axis could pass for z and be resampled to nearest.
        "resampling_fn_probabilities": resample_torch_fornnunet.__name__,
        "resampling_fn_probabilities_kwargs": {
            "is_seg": False,
            "force_separate_z": False,
            "memefficient_seg_resampling": False,
        },
    }
    _choose_own_folder(plans, f"2d_{size}", before, list(others))
    return plans


def _choose_own_folder(
    plans: dict[str, Any], name: str, before: dict[str, Any] | None, others: list[dict[str, Any]]
) -> None:
    """Give an added configuration a folder that no other plans fill with different data.

    Args:
        plans: With the configuration in them, whose folder this changes.
        name: Of the configuration.
        before: The configuration of that name that is replaced; it keeps a folder with its data.
        others: The other plans of the dataset.
    """
    configurations = plans["configurations"]
    wanted = preprocessing(plans, name)
    if before is not None and "data_identifier" in before:
        old = {**plans, "configurations": {**configurations, name: before}}
        if preprocessing(old, name) == wanted:
            configurations[name]["data_identifier"] = before["data_identifier"]
            return
    candidates = [configurations[name]["data_identifier"]]
    configurations[name]["data_identifier"] = free_identifier(wanted, candidates, others)


def estimate_gpu_memory(backbone: str, batch_size: int, patch_size: list[int]) -> float:
    """Estimate the GPU memory that training takes, in GB.

    Args:
        backbone: A key of ``MEMORY``.
        batch_size: Slices in a batch.
        patch_size: Height and width in pixels.
    """
    memory = MEMORY[backbone]
    return memory.fixed + memory.per_megapixel * batch_size * math.prod(patch_size) / 1e6


def describe(plans: dict[str, Any], size: int, backbone: str) -> str:
    """Say in one line what ``2d_<size>`` of these plans is and what it takes."""
    added = plans["configurations"][f"2d_{size}"]
    patch_size, batch_size = added["patch_size"], added["batch_size"]
    return (
        f"2d_{size} of {plans['dataset_name']}: patch of {' x '.join(map(str, patch_size))} pixels "
        f"of {' x '.join(f'{mm:.4g}' for mm in added['spacing'])} mm, batch size {batch_size}; "
        f"training {backbone} takes about "
        f"{estimate_gpu_memory(backbone, batch_size, patch_size):.1f} GB of GPU memory (estimate)"
    )


def size_setting(option: str | None = None) -> int:
    """Return the patch's longest side in pixels: ``--size``, else ``MEDDINOV3_SIZE``, else 896.

    Raises:
        UserError: It is not a multiple of 16 from 64 to 4096.
    """
    source, text = "--size", option
    if text is None:
        source, text = "MEDDINOV3_SIZE", os.environ.get("MEDDINOV3_SIZE", "").strip() or "896"
    size = int(text) if re.fullmatch(r"[1-9][0-9]{1,3}", text) else 0
    if not SMALLEST_SIZE <= size <= LARGEST_SIZE or size % PATCH_MULTIPLE:
        raise UserError(
            f"{source} must be a multiple of {PATCH_MULTIPLE} from {SMALLEST_SIZE} to "
            f"{LARGEST_SIZE} (pixels), but is {text!r}: give one, for example 896."
        )
    return size


def check_gpu_memory(gigabytes: float) -> None:
    """Raise UserError unless this is an amount of memory."""
    if not 0 < gigabytes < math.inf:
        raise UserError(
            f"-gpu_memory_target must be a positive number of GB, but is {gigabytes}: give the "
            "memory of your GPU, for example 24."
        )


def check_plans_name(name: str) -> None:
    """Raise UserError where nnU-Net could not take the name of a model folder apart again."""
    if "__" in name:
        raise UserError(
            f"the name of plans may not contain '__', at which nnU-Net splits the names of its "
            f"folders, but is {name!r}: choose another."
        )


def _slices_per_case(plans: dict[str, Any]) -> float:
    """Return the median number of slices, as nnU-Net counts them where the plans still say it."""
    volume = plans["configurations"].get("3d_fullres", {}).get("median_image_size_in_voxels")
    return float((volume or plans["original_median_shape_after_transp"])[0])


def _batch_size(
    memory: Memory, patch_size: list[int], gpu_memory_gb: float, training_pixels: float
) -> int:
    pixels = math.prod(patch_size)
    fits = int((gpu_memory_gb - memory.fixed) / (memory.per_megapixel * pixels / 1e6))
    covers = round(training_pixels * MAX_DATASET_COVERED / pixels)
    return max(min(fits, covers), MIN_BATCH_SIZE)
