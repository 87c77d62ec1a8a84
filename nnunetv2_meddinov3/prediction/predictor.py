"""nnU-Net's predictor, faster for 2D configurations, with the same labels and files.

Stock nnU-Net predicts one tile at a time, keeps the logits of a whole volume and hands them to
other processes, which resample them whole. In a 2D configuration no slice needs another: here the
logits of a slice are resampled and turned into labels as soon as its last tile is predicted.
"""

from __future__ import annotations

import contextlib
import copy
import os
import queue
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import insert_crop_into_image
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from jaxtyping import Float, Float16, Float32, Int
from nnunetv2.configuration import default_num_processes
from nnunetv2.inference import predict_from_raw_data
from nnunetv2.inference.data_iterators import preprocess_fromfiles_save_to_queue
from nnunetv2.inference.export_prediction import (
    convert_predicted_logits_to_segmentation_with_correct_shape,
)
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.utilities.helpers import empty_cache
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_meddinov3.errors import UserError, first_line
from nnunetv2_meddinov3.files import part_beside, sweep_leftovers
from nnunetv2_meddinov3.prediction.ahead import in_threads
from nnunetv2_meddinov3.prediction.slicewise import Resample, slice_resampling
from nnunetv2_meddinov3.prediction.sliding_window import SlidingWindow
from nnunetv2_meddinov3.prediction.uncertainty import WithProbabilities, doubt, not_measurable
from nnunetv2_meddinov3.progress import Progress

_LINES = 10  # of progress for each case, where there is no terminal
GO_ON = "What was predicted before is kept; repair or remove it, then add --continue_prediction."


class MedDINOv3Predictor(nnUNetPredictor):
    """nnU-Net's predictor with a faster way for 2D configurations, whatever the network.

    Arguments and results are those of ``nnUNetPredictor``. 3D configurations, saved probabilities
    and unusual resampling go nnU-Net's own way.

    Attributes:
        batch: Tiles predicted at once, mirrored ones counted; None until the first prediction
            chose it. Halved where a GPU's memory does not suffice.
        measures_uncertainty: Whether ``segment`` also sets ``uncertainty``.
        uncertainty: Of the case that was segmented last, in the shape of its labels: ``doubt`` of
            the mean probabilities over mirrorings and folds.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batch: int | None = None
        self.measures_uncertainty = False
        self.uncertainty: Float32[np.ndarray, ...] | None = None
        self._folds: tuple[Any, list[Any]] = (None, [])

    # Whole commands

    def predict_from_data_iterator(
        self,
        data_iterator: Iterable[dict[str, Any]],
        save_probabilities: bool = False,
        num_processes_segmentation_export: int = default_num_processes,
    ) -> list[Any]:
        """Predict cases; arguments and results as nnU-Net's.

        Args:
            data_iterator: Cases with ``data``, ``ofile`` (None: return the labels) and
                ``data_properties``.
            save_probabilities: Also write them; nnU-Net's way.
            num_processes_segmentation_export: Files written at a time, here by threads.

        Raises:
            UserError: If a case cannot be written.
        """
        if save_probabilities or not self.is_2d:
            return super().predict_from_data_iterator(
                data_iterator, save_probabilities, num_processes_segmentation_export
            )
        results: list[Future[np.ndarray | None]] = []
        with ThreadPoolExecutor(max(1, num_processes_segmentation_export)) as writers:
            for case in data_iterator:
                data, properties, name = case["data"], case["data_properties"], case["ofile"]
                if isinstance(data, str):  # nnU-Net's iterators may put large cases into files
                    file, data = Path(data), torch.from_numpy(np.load(data))
                    file.unlink()
                title = "image" if name is None else Path(name).name
                labels = self.segment(data, properties, title=title)
                del case, data  # the next case is large too
                results.append(writers.submit(self._deliver, labels, properties, name))
                del labels
                if len(results) > 1:
                    results[-2].result()  # an error ends the command at once
            found = [result.result() for result in results]
        compute_gaussian.cache_clear()
        empty_cache(self.device)
        return found

    def predict_from_files_sequential(
        self,
        list_of_lists_or_source_folder: str | list[list[str]],
        output_folder_or_list_of_truncated_output_files: str | list[str] | None,
        save_probabilities: bool = False,
        overwrite: bool = True,
        folder_with_segs_from_prev_stage: str | None = None,
    ) -> Any:
        """Predict without other processes, which ``predict_from_files`` does not need here either.

        Raises:
            UserError: If a case cannot be read or written.
        """
        if save_probabilities or not self.is_2d:
            return super().predict_from_files_sequential(
                list_of_lists_or_source_folder,
                output_folder_or_list_of_truncated_output_files,
                save_probabilities,
                overwrite,
                folder_with_segs_from_prev_stage,
            )
        return self.predict_from_files(
            list_of_lists_or_source_folder,
            output_folder_or_list_of_truncated_output_files,
            overwrite=overwrite,
            num_processes_preprocessing=1,
            num_processes_segmentation_export=1,
            folder_with_segs_from_prev_stage=folder_with_segs_from_prev_stage,
        )

    def _internal_get_data_iterator_from_lists_of_filenames(
        self,
        input_list_of_lists: list[list[str]],
        seg_from_prev_stage_files: list[str] | None,
        output_filenames_truncated: list[str] | None,
        num_processes: int,
    ) -> Iterator[dict[str, Any]]:
        """Preprocess the next cases in threads: processes would import nnU-Net first."""
        if not self.is_2d:
            return super()._internal_get_data_iterator_from_lists_of_filenames(
                input_list_of_lists,
                seg_from_prev_stage_files,
                output_filenames_truncated,
                num_processes,
            )
        none: list[str | None] = [None] * len(input_list_of_lists)
        previous, names = seg_from_prev_stage_files or none, output_filenames_truncated or none
        cases = zip(input_list_of_lists, previous, names, strict=True)
        # on a CPU the prediction takes longer than reading and needs the cores and the memory
        readers = 1 if self.device.type == "cpu" else max(1, num_processes)
        return in_threads(self.read, cases, readers)

    def read(self, case: tuple[list[str], str | None, str | None]) -> dict[str, Any]:
        """Read and preprocess a case as nnU-Net does.

        Args:
            case: Image files; label map of an earlier stage, or None; what to write, or None.

        Raises:
            UserError: If it cannot be read.
        """
        files, previous, name = case
        channels = self.dataset_json.get("channel_names", self.dataset_json.get("modality"))
        if len(files) != len(channels):
            raise UserError(
                f"each case must have {len(channels)} files, one for each of "
                f"{', '.join(map(str, channels.values()))}, but there is only "
                f"{', '.join(files) or 'none'}. {GO_ON}"
            )
        found: queue.Queue[dict[str, Any]] = queue.Queue()
        try:
            preprocess_fromfiles_save_to_queue(
                [files],
                None if previous is None else [previous],
                None if name is None else [name],
                self.plans_manager,
                self.dataset_json,
                self.configuration_manager,
                found,
                threading.Event(),
                threading.Event(),
                self.verbose_preprocessing,
            )
        except Exception as error:
            raise UserError(
                f"{', '.join(files)} must be a case of this model's kind, but cannot be read or "
                f"preprocessed: {first_line(error)}. {GO_ON}"
            ) from error
        return found.get_nowait()

    def _deliver(
        self, labels: np.ndarray, properties: dict[str, Any], name: str | None
    ) -> np.ndarray | None:
        """Return the labels of a case, or write them, whole or not at all."""
        if name is None:
            return labels
        path = Path(name + self.dataset_json["file_ending"]).resolve()
        try:
            sweep_leftovers(path.parent)
            with part_beside(path) as part:
                part.mkdir()  # a folder, as the ending tells the writer the format
                writer = self.plans_manager.image_reader_writer_class()
                writer.write_seg(labels, str(part / path.name), properties)
                (part / path.name).replace(path)
        except Exception as error:
            raise UserError(
                f"{path} must be writable, but: {first_line(error)}; make room or choose another "
                "folder, then go on with --continue_prediction."
            ) from error
        return None

    # One case

    def segment(
        self, data: Float[Tensor, "channel _ _ _"], properties: dict[str, Any], title: str = "image"
    ) -> Int[np.ndarray, ...]:
        """Return the labels of a case in its original shape.

        Args:
            data: Preprocessed, (C, Z, Y, X).
            properties: Of the image, as the preprocessor returned them.
            title: What lines of progress call it.

        Returns:
            uint8, or uint16 from 255 labels on, with the axes that nnU-Net's writer expects.
        """
        resample = self._resampling(properties, data.shape[1])
        if resample is None and self.measures_uncertainty:
            raise not_measurable()
        if resample is None:
            return convert_predicted_logits_to_segmentation_with_correct_shape(
                self.predict_logits_from_preprocessed_data(data).numpy(),
                self.plans_manager,
                self.configuration_manager,
                self.label_manager,
                properties,
            )
        shape = tuple(properties["shape_after_cropping_and_before_resampling"])
        dtype = np.uint8 if len(self.label_manager.foreground_labels) < 255 else np.uint16
        labels = np.empty(shape, dtype)
        doubts = np.empty(shape, np.float32) if self.measures_uncertainty else None
        heads = self.label_manager.num_segmentation_heads
        bar = Progress(
            shape[0],
            "slices",
            title=title,
            every=max(1, shape[0] // _LINES),
            stream=sys.stderr if self.allow_tqdm else None,
        )
        patch = self.configuration_manager.patch_size
        networks, is_by_region = self._networks(), self.label_manager.has_regions
        if self.measures_uncertainty:
            networks = [WithProbabilities(network, is_by_region) for network in networks]
        with torch.inference_mode(), bar:
            padded, unpad = pad_nd_image(data, patch, "constant", {"value": 0}, True, None)
            tiles = self._internal_get_sliding_window_slicers(padded.shape[1:])
            index = (slice(None), *unpad[2:])
            window = self._window(networks, heads * (1 + self.measures_uncertainty))
            with torch.autocast(self.device.type, enabled=self.device.type == "cuda"):
                for z, found in window.slices(self._near(padded), tiles):
                    logits = found[index]
                    labels[z] = self._labels(resample(logits[:heads], shape[1:]))
                    if doubts is not None:
                        doubts[z] = doubt(logits[heads:], is_by_region, shape[1:])
                    bar.advance()
            self.batch = window.batch
        if doubts is not None:
            self.uncertainty = self._uncropped(doubts, properties)
        return self._uncropped(labels, properties)

    def _uncropped(self, values: np.ndarray, properties: dict[str, Any]) -> np.ndarray:
        """Return values of the cropped image in the shape of the original."""
        whole = np.zeros(properties["shape_before_cropping"], values.dtype)
        insert_crop_into_image(whole, values, properties["bbox_used_for_cropping"])  # in place
        return whole.transpose(self.plans_manager.transpose_backward)

    def _labels(self, logits: Float[Tensor, "class height width"]) -> Int[np.ndarray, "_ _"]:
        """Return the labels of a slice from its logits in the image's shape."""
        manager = self.label_manager
        if type(manager) is LabelManager and not manager.has_regions:
            return logits.argmax(0).cpu().numpy()
        return manager.convert_logits_to_segmentation(logits[:, None].cpu().numpy())[0]

    def _resampling(self, properties: dict[str, Any], slices: int) -> Resample | None:
        if not self.is_2d:
            return None
        spacing = [properties["spacing"][i] for i in self.plans_manager.transpose_forward]
        wanted = properties["shape_after_cropping_and_before_resampling"][0]
        return slice_resampling(self.configuration_manager, spacing, (slices, wanted))

    # The sliding window

    @property
    def is_2d(self) -> bool:
        """Whether the configuration is."""
        return len(self.configuration_manager.patch_size) == 2

    def _internal_predict_sliding_window_return_logits(
        self, data: Tensor, slicers: Sequence[tuple], do_on_device: bool = True
    ) -> Float16[Tensor, "class _ _ _"]:
        """Return the logits of a padded image, as nnU-Net's training validation wants them."""
        if not self.is_2d:
            return super()._internal_predict_sliding_window_return_logits(
                data, slicers, do_on_device
            )
        place = self.device if do_on_device else torch.device("cpu")
        heads = self.label_manager.num_segmentation_heads
        logits = torch.empty((heads, *data.shape[1:]), dtype=torch.half, device=place)
        network = cast(Any, self).network  # of the trainer: in DDP, ranks have other cases here
        is_wrapped = isinstance(network, DistributedDataParallel)
        window = self._window([network.module if is_wrapped else network], heads)
        for z, found in window.slices(data.to(place), slicers):
            logits[:, z] = found
        self.batch = window.batch
        return logits

    def _window(self, networks: Sequence[nn.Module], channels: int) -> SlidingWindow:
        """Return the sliding window over the slices, with the batch that fitted before."""
        threads = torch.get_num_threads()
        if "nnUNet_def_n_proc" in os.environ:  # which nnU-Net obeys too
            threads = min(threads, default_num_processes)
        weight = None
        if self.use_gaussian:
            patch = tuple(self.configuration_manager.patch_size)
            weight = compute_gaussian(patch, 1.0 / 8, 10, device=self.device)
        return SlidingWindow(
            networks,
            self.device,
            channels,
            mirror_axes=(self.allowed_mirroring_axes if self.use_mirroring else None) or (),
            weight=weight,
            batch=self.batch,
            threads=threads,
        )

    def _networks(self) -> list[nn.Module]:
        """Return the network of each fold, on the device and in evaluation mode."""
        parameters, network = self.list_of_parameters, cast(Any, self).network
        is_compiled = isinstance(network, OptimizedModule)
        plain = network._orig_mod if is_compiled else network
        if len(parameters) == 1:
            plain.load_state_dict(parameters[0])
            return [network.to(self.device).eval()]
        if self._folds[0] is not parameters:
            networks = []
            for each in parameters:
                own = copy.deepcopy(plain)
                own.load_state_dict(each)
                own = own.to(self.device).eval()
                networks.append(torch.compile(own) if is_compiled else own)
            self._folds = (parameters, networks)
        return self._folds[1]

    def _near(self, data: Tensor) -> Tensor:
        """Return an image on the device, if all is to be there and there is room for it."""
        if not self.perform_everything_on_device:
            return data
        try:
            return data.to(self.device)
        except torch.OutOfMemoryError:
            empty_cache(self.device)
            return data


def main() -> int:
    """Run nnU-Net's ``nnUNetv2_predict`` on this process's arguments, with this predictor."""
    use_in_stock_command()
    predict_from_raw_data.predict_entry_point()
    return 0


def use_in_stock_command() -> None:
    """Let nnU-Net's commands for prediction in this process use ``MedDINOv3Predictor``."""
    predict_from_raw_data.nnUNetPredictor = MedDINOv3Predictor


@contextlib.contextmanager
def used_in_validation() -> Iterator[None]:
    """Let nnU-Net's trainer predict its validation cases with ``MedDINOv3Predictor`` meanwhile."""
    from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as module

    before, module.nnUNetPredictor = module.nnUNetPredictor, MedDINOv3Predictor
    try:
        yield
    finally:
        module.nnUNetPredictor = before
