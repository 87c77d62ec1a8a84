"""What a fine-tuning run decides before it starts: configuration, architecture, weights, schedule.

The architecture is decided once, at the start of training, and written into the plans that nnU-Net
saves with the model; prediction, ``--val``, ``--c`` and an imported zip read it from there and need
neither a variable nor a weights file.
"""

import inspect
import os
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from nnunetv2_meddinov3 import discovery
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.models.architecture import (
    SIZE_FIELDS,
    Architecture,
    architecture_of,
    differences,
)
from nnunetv2_meddinov3.models.build import stem_channels
from nnunetv2_meddinov3.models.contracts import HU, NORMALISED, contracts_of
from nnunetv2_meddinov3.models.formats import parse_state_dict
from nnunetv2_meddinov3.models.segmenter import resolve_layers
from nnunetv2_meddinov3.models.tensor_files import read_files
from nnunetv2_meddinov3.models.weights import Checkpoint, checkpoint_from, resolve_source
from nnunetv2_meddinov3.settings import backbone_setting, checkpointing_setting, weights_setting

SEGMENTER = "nnunetv2_meddinov3.models.segmenter.Segmenter"
SEGFORMER = "nnunetv2_meddinov3.models.segformer.SegFormer"
SEGDINO = "nnunetv2_meddinov3.models.segdino.SegDINO"
DINO_UNET = "nnunetv2_meddinov3.models.dino_unet.DinoUNet"
SAM_SEGMENTER = "nnunetv2_meddinov3.models.sam_decoder.SamSegmenter"
DETAIL_SEGMENTER = "nnunetv2_meddinov3.models.detail_segmenter.DetailSegmenter"
NETWORKS = (SEGMENTER, DETAIL_SEGMENTER, SEGFORMER, SEGDINO, DINO_UNET, SAM_SEGMENTER)
"""What the plans of our trainers name."""

LIBRARY = "the library's"
"""Stands for the weights that the library of a network comes with."""

# names that a run's length has in the optimiser's groups, and so in every checkpoint
_LENGTH = ("num_epochs", "num_iterations")


def set_iterations(trainer: Any, iterations: int) -> None:
    """Set a trainer's iterations per epoch, with nnU-Net's share of them for validation."""
    trainer.num_iterations_per_epoch = iterations
    trainer.num_val_iterations_per_epoch = max(1, iterations // 5)


def note_length(optimizer: torch.optim.Optimizer, epochs: int, iterations: int) -> None:
    """Write a run's length into the optimiser's groups, which nnU-Net saves in its checkpoints."""
    for group in optimizer.param_groups:
        group.update(zip(_LENGTH, (epochs, iterations), strict=True))


def noted_length(
    filename_or_checkpoint: str | dict[str, Any],
) -> tuple[int, int | None, int | None]:
    """Return the epochs done, the epochs and the iterations per epoch of a checkpoint's run.

    Checkpoints of earlier versions do not note them (None): the number of epochs follows from the
    linear decay there, but not after the first epoch, when the rates are still the initial ones.

    Args:
        filename_or_checkpoint: As nnU-Net passes it; a file is opened without its tensors.
    """
    content: Any = filename_or_checkpoint
    if isinstance(content, str | os.PathLike):
        content = torch.load(content, map_location="cpu", mmap=True, weights_only=False)
    done, group = content["current_epoch"], content["optimizer_state"]["param_groups"][0]
    if _LENGTH[0] in group:
        return done, group[_LENGTH[0]], group[_LENGTH[1]]
    left = group["lr"] / group["initial_lr"] if group.get("initial_lr") else 1.0
    epochs = (done - 1) / (1 - left) if left < 1 else 0.5
    is_linear = abs(epochs - round(epochs)) < 1e-3 and epochs >= done
    return done, round(epochs) if is_linear else None, None


def check_configuration(plans: dict[str, Any], name: str) -> None:
    """Refuse configurations that are not 2D, before anything is made.

    Raises:
        UserError: If the configuration, or a cascade it belongs to, is three-dimensional.
    """
    if name not in plans["configurations"]:
        raise UserError(
            f"the plans {plans['plans_name']} must hold the configuration {name}, but they hold "
            f"{', '.join(plans['configurations'])}: plan it (`meddinov3 plan`) or choose one."
        )
    manager = PlansManager(plans)
    configuration = manager.get_configuration(name)
    linked = [name, configuration.previous_stage_name, *(configuration.next_stage_names or [])]
    for other in filter(None, linked):
        patch_size = manager.get_configuration(other).patch_size
        if len(patch_size) != 2:
            what = "is" if other == name else f"belongs to a cascade with {other}, which is"
            raise UserError(
                f"MedDINOv3 is a 2D network and needs a 2D configuration, but {name} {what} 3D: "
                "train `2d` or `2d_896` (a cascade may only join 2D configurations)."
            )


def chosen_weights(default: str, fixed: bool) -> str | None:
    """Return the source of weights, or None for random initialisation on purpose.

    Args:
        default: The recipe's own source, or ``"none"``.
        fixed: Whether the recipe ignores ``MEDDINOV3_WEIGHTS``.
    """
    value = default if fixed else weights_setting() or default
    return None if value.lower() == "none" else value


def settle_backbone(weights: str | None) -> tuple[Architecture, Checkpoint | None]:
    """Return the backbone's architecture, and its checkpoint unless initialisation is random.

    Raises:
        UserError: If the weights cannot be read, or are of another size than MEDDINOV3_BACKBONE.
    """
    if weights is None:
        return architecture_of(backbone_setting() or "vit_base"), None
    checkpoint = resolve_source(weights)
    _check_size(checkpoint.architecture, weights)
    return checkpoint.architecture, checkpoint


def said_of_values(metadata: dict[str, Any], channel_names: Collection[str]) -> str | None:
    """Return a sentence where weights were pretrained on other values than a dataset has.

    Args:
        metadata: Of the weights; those that state no intensity contract say nothing.
        channel_names: Of the dataset; as for nnU-Net, "CT" means HU.
    """
    units = set(contracts_of(metadata.get("intensity")))
    names = ", ".join(channel_names)
    has_ct = any(name.casefold() == "ct" for name in channel_names)
    if not units or (HU if has_ct else NORMALISED) in units:
        return None
    theirs = "CT in HU" if HU in units else "images that are not CT"
    return (
        f"These weights were pretrained on {theirs} alone, but the channels of the dataset are "
        f"{names}: weights pretrained on such images may do better."
    )


def _check_size(architecture: Architecture, weights: str) -> None:
    """Refuse weights of another size than MEDDINOV3_BACKBONE, where that is set."""
    size = backbone_setting()
    differ = differences(architecture_of(size), architecture, SIZE_FIELDS) if size else {}
    if differ:
        listed = (f"{name} {theirs} instead of {ours}" for name, (ours, theirs) in differ.items())
        raise UserError(
            f"MEDDINOV3_BACKBONE={size} must be the size of the weights {weights}, but they "
            f"have {', '.join(listed)}: unset it, or set MEDDINOV3_WEIGHTS to weights of that "
            "size or to none."
        )


def pretrained_file() -> str | None:
    """Return the file of ``-pretrained_weights`` while nnU-Net initialises a trainer for it.

    nnU-Net initialises first and loads the file over the network afterwards, and tells the trainer
    nothing of it. So it is the fourth argument of the function of nnU-Net that does both, found on
    the stack by its code: there it is also for ``run_training`` called from Python and for the
    processes of several GPUs. Should a later nnU-Net have no such function, it is what the command
    line of this process says. Anywhere else this is None, and the trainer starts from its own
    weights, as without the option.
    """
    module = sys.modules.get("nnunetv2.run.run_training")
    loading = getattr(module, "maybe_load_checkpoint", None)
    if module is not None and loading is None:
        return discovery.own_options().get("pretrained_weights")
    code = getattr(loading, "__code__", None)
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is code:
            return frame.f_locals[code.co_varnames[3]]
        frame = frame.f_back
    return None


def check_checkpoint(filename_or_checkpoint: str | dict[str, Any]) -> None:
    """Refuse a checkpoint file that does not exist.

    Args:
        filename_or_checkpoint: As nnU-Net passes it.

    Raises:
        UserError: With the checkpoints that are there.
    """
    if isinstance(filename_or_checkpoint, str | os.PathLike):
        path = Path(filename_or_checkpoint)
        if not path.is_file():
            there = ", ".join(sorted(p.name for p in path.parent.glob("checkpoint_*.pth")))
            raise UserError(
                f"the checkpoint must exist, but there is no {path} (there: {there or 'none'}): "
                "train with checkpoints, without --disable_checkpointing, or leave --val_best out."
            )


@dataclass(frozen=True)
class Pretrained:
    """A file for ``-pretrained_weights``, looked at before nnU-Net loads it.

    Attributes:
        file: Its path.
        architecture: Of its backbone; None where the file does not say.
        shapes: Of its network's tensors.
    """

    file: str
    architecture: Architecture | None
    shapes: dict[str, tuple[int, ...]]


def read_pretrained(file: str, part: str = "backbone.vit.") -> Pretrained:
    """Read a file for ``-pretrained_weights``, without running its code.

    Args:
        file: Its path.
        part: How the names of the pretrained part's tensors begin.

    Raises:
        UserError: If it cannot be read, or is no checkpoint of nnU-Net with a network of ours, or
            is of another size than MEDDINOV3_BACKBONE.
    """
    files = read_files(file)
    if not files.run or not any(key.startswith(part) for key in files.tensors):
        raise UserError(
            f"-pretrained_weights must be a checkpoint_*.pth of a MedDINOv3 trainer, but {file} is "
            "not: set MEDDINOV3_WEIGHTS to it if it holds a pretrained ViT, or name another file."
        )
    shapes = {name: tuple(t.shape) for name, t in files.tensors.items()}
    if "architecture" not in files.run:
        return Pretrained(file, None, shapes)
    parsed = parse_state_dict(files.tensors, file)
    architecture = checkpoint_from(parsed, file, run=files.run).architecture
    _check_size(architecture, file)
    return Pretrained(file, architecture, shapes)


def check_pretrained(pretrained: Pretrained, network: nn.Module) -> None:
    """Refuse a file that nnU-Net's ``-pretrained_weights`` cannot load into a network.

    nnU-Net asks for every tensor of the network but those of the last layer, of the same shape.

    Raises:
        UserError: If one is missing or has another shape.
    """
    for name, tensor in network.state_dict().items():
        found, needed = pretrained.shapes.get(name), tuple(tensor.shape)
        if ".seg_layers." not in name and found != needed:
            what = f"is {found}" if found is not None else "is missing"
            raise UserError(
                f"the network of -pretrained_weights must be the one that is trained but for its "
                f"last layer, but {name} {what} in {pretrained.file} where {needed} is needed: "
                "train with the trainer and the channels of that file, or set MEDDINOV3_WEIGHTS "
                "to it, which takes its ViT alone and fits it to the channels."
            )


def plans_entry(
    architecture: Architecture,
    input_channels: int,
    layers: list[int] | str | None,
    drop_path: float,
    network_class: str = SEGMENTER,
    **options: Any,
) -> dict[str, Any]:
    """Return the plans' ``architecture`` entry for a backbone and the images of a dataset."""
    stem = stem_channels(architecture.input_channels, input_channels)
    arguments = {
        "backbone": {**architecture.to_dict(), "input_channels": stem},
        "layers": resolve_layers(layers, architecture.depth),
        "drop_path": drop_path,
        "activation_checkpointing": bool(checkpointing_setting()),
    }
    return network_entry(network_class, {**arguments, **options})


def network_entry(network_class: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return an ``architecture`` entry as nnU-Net reads it."""
    return {
        "network_class_name": network_class,
        "arch_kwargs": arguments,
        "_kw_requires_import": [],
    }


def trained_folds(folder: str) -> list[Path]:
    """Return the fold folders of a model folder that hold a checkpoint."""
    return sorted({p.parent for p in Path(folder).glob("fold_*/checkpoint_*.pth")})


def saved_architecture(
    folder: str, configuration: str, network_class: str = SEGMENTER
) -> dict[str, Any] | None:
    """Return the ``architecture`` entry in a model folder's plans.json, if it is of that class."""
    path = Path(folder) / "plans.json"
    if not path.exists():
        return None
    entry = load_json(str(path))["configurations"].get(configuration, {}).get("architecture", {})
    return entry if entry.get("network_class_name") == network_class else None


def checkpoint_architecture(
    filename_or_checkpoint: str | dict[str, Any],
    configuration: str,
    network_class: str = SEGMENTER,
) -> dict[str, Any]:
    """Return the ``architecture`` entry with which a nnU-Net checkpoint was trained.

    Args:
        filename_or_checkpoint: As nnU-Net passes it. The architecture is in the model folder's
            plans.json; only where that is missing is the file opened, without its tensors.
        configuration: Name of the configuration.
        network_class: What the trainer that continues trains.

    Raises:
        UserError: If it was not trained with such a trainer.
    """
    content: Any = filename_or_checkpoint
    if isinstance(content, str | os.PathLike):
        folder = str(Path(content).parent.parent)
        entry = saved_architecture(folder, configuration, network_class)
        if entry is not None:
            return entry
        content = torch.load(content, map_location="cpu", mmap=True, weights_only=False)
    plans = content["init_args"]["plans"]
    entry = plans["configurations"].get(configuration, {}).get("architecture", {})
    if entry.get("network_class_name") != network_class:
        raise UserError(
            f"the checkpoint must come from a trainer of {network_class.rpartition('.')[2]}, but "
            f"its plans describe {entry.get('network_class_name', 'no network')}: continue it with "
            "its own trainer."
        )
    return entry
