"""Trainers for stock nnU-Net: the paper's recipe and its named deviations.

Each is chosen with ``-tr NAME``. Names become folder names and are public. Only trainer classes
live here, because nnU-Net's search imports every module of this folder.
"""

from copy import deepcopy
from typing import Any, ClassVar

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunetv2_meddinov3 import fine_tuning, folds, optimisation, readiness
from nnunetv2_meddinov3.augmentation import faster
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.models.build import load_into
from nnunetv2_meddinov3.models.segmentation_network import Network
from nnunetv2_meddinov3.prediction.predictor import used_in_validation
from nnunetv2_meddinov3.report import after_validation
from nnunetv2_meddinov3.settings import check_variables, checkpointing_setting, count_setting
from nnunetv2_meddinov3.step_guard import StepGuard


class MedDINOv3Trainer(nnUNetTrainer):
    """Fine-tune the released CT-3M ViT-B as the paper does (https://arxiv.org/abs/2509.02379).

    AdamW (0.9, 0.98) with weight decay 5e-2 on every parameter, decoder learning rate 3e-4, ViT
    3e-5, linear decay without warm-up, gradient clipping at 12 (nnU-Net's), drop path 0.2, 1000
    epochs of 250 iterations; loss, sampling and augmentation are nnU-Net's.

    ``MEDDINOV3_WEIGHTS`` names other weights, ``MEDDINOV3_BACKBONE`` the size where there are none.
    """

    network_class = fine_tuning.SEGMENTER
    network_options: ClassVar[dict[str, Any]] = {}  # further arguments of that class
    weights = "hf:ricklisz123/MedDINOv3-ViTB-16-CT-3M/model.pth"
    weights_are_fixed = False
    pretrained_part = "ViT"
    epochs = 1000
    decoder_lr = 3e-4
    vit_lr = 3e-5
    make_optimizer = staticmethod(optimisation.adamw)
    decay = 5e-2
    lr_exponent = 1.0  # of the decay of the learning rates
    layers: list[int] | str | None = None  # the end of every quarter: 2, 5, 8, 11 of 12
    drop_path = 0.2
    is_frozen = False
    is_mirroring = True
    skipped_steps_limit = 20  # in a row, after which a run stops

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008  nnU-Net's signature
    ) -> None:
        check_variables()
        checkpointing_setting()
        readiness.check_planned(plans, configuration)
        fine_tuning.check_configuration(plans, configuration)
        epochs, iterations = map(count_setting, ("MEDDINOV3_EPOCHS", "MEDDINOV3_ITERATIONS"))
        try:
            super().__init__(plans, configuration, fold, dataset_json, device)
        except OSError as error:
            raise UserError(
                f"the results folder (nnUNet_results) must be writable, but: {error}."
            ) from error
        self.initial_lr = self.decoder_lr
        self.weight_decay = self.decay
        self.num_epochs = epochs or self.epochs
        if iterations is not None:
            fine_tuning.set_iterations(self, iterations)
        self.enable_deep_supervision = False
        self._step_guard: StepGuard | None = None
        self._resumed_architecture: dict[str, Any] | None = None

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Predict and measure the validation cases, once it is certain that labels are there."""
        readiness.check_labels(self)
        with used_in_validation():
            super().perform_actual_validation(save_probabilities)
        after_validation.write_after_validation(self)

    def initialize(self) -> None:
        """Settle the architecture, build, and load pretrained weights unless a run is resumed.

        Raises:
            UserError: If device, preprocessed data or weights are not available or do not fit;
                nothing is built before.
        """
        if self.was_initialized:
            super().initialize()  # which refuses
        readiness.check_trainer(self)
        file = None if self._resumed_architecture else fine_tuning.pretrained_file()
        pretrained = None if file is None else self._read_pretrained(file)
        checkpoint = self._settle_architecture(pretrained)
        super().initialize()
        network = self._unwrapped_network()
        if pretrained is not None:
            fine_tuning.check_pretrained(pretrained, network)
        if checkpoint is not None:
            self._load_weights(network, checkpoint, len(self._channel_names()))
        if network.autocast_dtype is torch.bfloat16:
            self.grad_scaler = None  # bf16 has the range of fp32
        fine_tuning.note_length(self.optimizer, self.num_epochs, self.num_iterations_per_epoch)
        if self.grad_scaler is None:  # which would skip such steps itself
            self._step_guard = StepGuard(
                self.optimizer, self.loss, self.skipped_steps_limit, self._say_once
            )

    def _read_pretrained(self, file: str) -> fine_tuning.Pretrained:
        """Look at the file of ``-pretrained_weights``."""
        return fine_tuning.read_pretrained(file)

    def _choose_architecture(
        self, given: fine_tuning.Pretrained | None
    ) -> tuple[dict[str, Any], Any]:
        """Return the plans' ``architecture`` of a new run, and pretrained weights, if any."""
        architecture, checkpoint = given.architecture if given else None, None
        if architecture is None:
            weights = fine_tuning.chosen_weights(self.weights, self.weights_are_fixed)
            architecture, checkpoint = fine_tuning.settle_backbone(weights)
        channels = determine_num_input_channels(
            self.plans_manager, self.configuration_manager, self.dataset_json
        )
        entry = fine_tuning.plans_entry(
            architecture,
            channels,
            self.layers,
            self.drop_path,
            self.network_class,
            **self.network_options,
        )
        return entry, checkpoint

    def _load_weights(self, network: Any, checkpoint: Any, image_channels: int) -> None:
        """Copy what ``_choose_architecture`` returned into the network."""
        load_into(network, checkpoint.tensors, image_channels=image_channels)

    def _settle_architecture(self, given: fine_tuning.Pretrained | None) -> Any:
        """Write the architecture into the plans; return the pretrained checkpoint, if any.

        Args:
            given: The file of ``-pretrained_weights``, whose network nnU-Net loads afterwards.
        """
        if self._resumed_architecture is not None:
            entry = self._resumed_architecture
            folds.check_other_folds(self._fold(entry))
            differ = folds.differences_from_saved(self._fold(entry))
            if differ:
                self._say_once(f"The plans differ from the saved ones in {', '.join(differ)}.")
            self._set_architecture(entry)
            return None
        entry, checkpoint = self._choose_architecture(given)
        folds.check_other_folds(self._fold(entry))
        self._set_architecture(entry)
        if given is not None:
            self._say_once(f"The network starts from {given.file} (-pretrained_weights).")
        elif checkpoint is None:
            self.print_to_log_file(f"The {self.pretrained_part} starts from random weights.")
        elif self.local_rank == 0:
            self.print_to_log_file(f"The {self.pretrained_part} starts from {checkpoint.report()}.")
            self.print_to_log_file(f"Licence of these weights: {checkpoint.licence}.")
            if said := fine_tuning.said_of_values(checkpoint.metadata, self._channel_names()):
                self.print_to_log_file(said)
        return checkpoint

    def _channel_names(self) -> list[str]:
        names = self.dataset_json.get("channel_names") or self.dataset_json["modality"]
        return [str(name) for name in names.values()]

    def _fold(self, entry: dict[str, Any]) -> folds.Fold:
        return folds.Fold(
            self.plans_manager.plans,
            self.dataset_json,
            entry,
            self.output_folder_base,
            f"fold_{self.fold}",
            self.configuration_name,
        )

    def _set_architecture(self, entry: dict[str, Any]) -> None:
        self.plans_manager.plans["configurations"][self.configuration_name]["architecture"] = entry
        self.configuration_manager.configuration["architecture"] = entry

    def load_checkpoint(self, filename_or_checkpoint: Any) -> None:
        """Resume from a checkpoint, with its architecture and its length unless told otherwise."""
        is_fresh = not self.was_initialized  # not --val_best after the training
        fine_tuning.check_checkpoint(filename_or_checkpoint)
        if is_fresh:
            readiness.check_trainer(self)
            entry = fine_tuning.checkpoint_architecture(
                filename_or_checkpoint, self.configuration_name, self.network_class
            )
            self._resumed_architecture = deepcopy(entry)
            arguments = self._resumed_architecture["arch_kwargs"]
            told = checkpointing_setting()
            if told is not None and "activation_checkpointing" in arguments:
                arguments["activation_checkpointing"] = told
                self._say_once(f"Activation checkpointing is {'on' if told else 'off'}.")
            self._settle_length(*fine_tuning.noted_length(filename_or_checkpoint))
        super().load_checkpoint(filename_or_checkpoint)
        if is_fresh:
            fine_tuning.note_length(self.optimizer, self.num_epochs, self.num_iterations_per_epoch)

    def _settle_length(self, done: int, epochs: int | None, iterations: int | None) -> None:
        """Keep a checkpoint's epochs and iterations unless a variable tells others; log it."""
        told = [count_setting(name) for name in ("MEDDINOV3_EPOCHS", "MEDDINOV3_ITERATIONS")]
        self.num_epochs = told[0] or epochs or self.num_epochs
        if told[1] is None and iterations not in (None, self.num_iterations_per_epoch):
            fine_tuning.set_iterations(self, iterations)
        self._say_once(
            f"The checkpoint has done {done} of {self.num_epochs} epochs of "
            f"{self.num_iterations_per_epoch} iterations."
        )
        now = self.num_epochs, self.num_iterations_per_epoch
        names = "MEDDINOV3_EPOCHS", "MEDDINOV3_ITERATIONS"
        for name, number, before, asked in zip(names, now, (epochs, iterations), told, strict=True):
            what = name.removeprefix("MEDDINOV3_").lower()
            if before is None:
                self._say_once(f"It does not say its number of {what}, which is now {number}.")
            elif number != before:
                rates = "; the learning rates follow it" if what == "epochs" else ""
                self._say_once(f"{name}={asked} replaces its {before} {what}{rates}.")
            elif asked is None:
                self._say_once(f"Its {what} are kept, because {name} is unset.")

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Build the network that the plans describe; prediction calls this too, with nothing else.

        Raises:
            UserError: If the plans were not written by one of these trainers.
        """
        if configuration_manager.network_arch_class_name not in fine_tuning.NETWORKS:
            raise UserError(
                "the plans.json beside the model must be the one its training saved, but it "
                f"describes {configuration_manager.network_arch_class_name}."
            )
        return get_network_from_plans(
            configuration_manager.network_arch_class_name,
            configuration_manager.network_arch_init_kwargs,
            configuration_manager.network_arch_init_kwargs_req_import,
            num_input_channels,
            num_output_channels,
            allow_init=False,
        )

    def configure_optimizers(
        self,
    ) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        """Return an optimiser with a group for each learning rate, and their decay."""
        groups = self._parameter_groups(self._unwrapped_network())
        optimizer = self.make_optimizer(groups, self.weight_decay)
        return optimizer, optimisation.GroupwisePolyLR(optimizer, self.num_epochs, self.lr_exponent)

    def _parameter_groups(self, network: Any) -> list[dict[str, Any]]:
        """Return the decoder's group, and the ViT's where it is trained."""
        if self.is_frozen:
            network.backbone.requires_grad_(False)
        groups = [{"params": list(network.decoder.parameters()), "lr": self.decoder_lr}]
        vit = [p for p in network.backbone.parameters() if p.requires_grad]
        if vit:
            groups.append({"params": vit, "lr": self.vit_lr})
        return groups

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Train on a batch as nnU-Net does, but skip the step if loss or gradient is not finite.

        Raises:
            UserError: If ``skipped_steps_limit`` steps in a row were.
        """
        if self._step_guard is None:
            return super().train_step(batch)
        self._step_guard.batch = batch
        output = super().train_step(batch)
        self._step_guard.batch = {}  # which would keep its memory
        return {**output, "skipped": True} if self._step_guard.skipped else output

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        """Log the mean loss of the steps that were done."""
        done = [output for output in train_outputs if "skipped" not in output]
        super().on_train_epoch_end(done or train_outputs)

    def _say_once(self, sentence: str) -> None:
        """Log what all ranks know."""
        if self.local_rank == 0:
            self.print_to_log_file(sentence)

    @staticmethod
    def get_training_transforms(*args: Any, **kwargs: Any) -> Any:
        """Return nnU-Net's augmentation, computed faster."""
        return faster(nnUNetTrainer.get_training_transforms(*args, **kwargs))

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple[Any, ...]:
        """Return nnU-Net's choice, with mirroring off where the recipe says so."""
        *others, axes = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        if not self.is_mirroring:
            axes = self.inference_allowed_mirroring_axes = None
        return *others, axes

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Do nothing: there is one output, whatever nnU-Net asks for around validation."""

    def plot_network_architecture(self) -> None:
        """Do nothing: nnU-Net's plot needs a library that knows no transformer."""

    def _unwrapped_network(self) -> Network:
        """Return the network without the wrappers of DDP and torch.compile."""
        network: Any = getattr(self.network, "module", self.network)
        return getattr(network, "_orig_mod", network)


class DINOv3Trainer(MedDINOv3Trainer):
    """The paper's DINOv3 row: Meta's ViT-B (LVD-1689M) with its registers, ViT lr 1e-4."""

    weights = "timm:vit_base_patch16_dinov3.lvd1689m"
    vit_lr = 1e-4


class MedDINOv3Trainer_scratch(MedDINOv3Trainer):
    """Random initialisation with one learning rate; does not read ``MEDDINOV3_WEIGHTS``."""

    weights = "none"
    weights_are_fixed = True
    vit_lr = 3e-4


class MedDINOv3Trainer_singlescale(MedDINOv3Trainer):
    """Decode the last block's tokens only (the paper's ablation, table 1)."""

    layers = "last"


class MedDINOv3Trainer_singlescale_matched(MedDINOv3Trainer_singlescale):
    """Decode the last block's tokens with a decoder of the size that four blocks have.

    A row that the paper's table 1 lacks: the decoder gets four copies of the tokens, so that it has
    the same layers, parameters and compute, and only the depths that it sees are fewer.
    """

    network_options: ClassVar[dict[str, Any]] = {"copies": 4}


class DINOv3Trainer_singlescale(MedDINOv3Trainer_singlescale, DINOv3Trainer):
    """The paper's DINOv3 row with the last block alone (table 1); random with weights ``none``."""


class DINOv3Trainer_singlescale_matched(MedDINOv3Trainer_singlescale_matched, DINOv3Trainer):
    """The same with a decoder of the size that four blocks have."""


class MedDINOv3Trainer_frozen(MedDINOv3Trainer):
    """Train the decoder only; the backbone keeps its weights and runs without drop path."""

    is_frozen = True
    drop_path = 0.0


class MedDINOv3Trainer_NoMirroring(MedDINOv3Trainer):
    """No mirroring in training and prediction, for structures with a side."""

    is_mirroring = False


class MedDINOv3Trainer_50epochs(MedDINOv3Trainer):
    """The paper's recipe in 50 epochs."""

    epochs = 50


class MedDINOv3Trainer_250epochs(MedDINOv3Trainer):
    """The paper's recipe in 250 epochs."""

    epochs = 250


class MedDINOv3Trainer_demo(MedDINOv3Trainer_scratch):
    """What ``meddinov3 demo`` runs: random weights, and rates for a few hundred iterations."""

    epochs = 6
    decoder_lr = 2e-3
    vit_lr = 1e-3
    drop_path = 0.0
