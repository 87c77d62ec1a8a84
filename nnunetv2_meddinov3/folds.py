"""The folds of a model folder: one plans.json describes them all, so they must be alike in it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.fine_tuning import saved_architecture, trained_folds
from nnunetv2_meddinov3.models.architecture import Architecture, differences

# What prediction reads, in words: of the backbone, the network, a configuration and the plans. Not
# here are drop path, batch size and the like, which only training reads.
_BACKBONE = {
    "embed_dim": "the width of the tokens",
    "depth": "the number of blocks",
    "num_heads": "the number of attention heads",
    "ffn": "the kind of the feed-forward layers",
    "ffn_hidden": "the width of the feed-forward layers",
    "qkv_bias": "the biases of queries and values",
    "num_registers": "the number of register tokens",
    "norm_eps": "the epsilon of the LayerNorms",
    "rope_base": "the base of the rotary periods",
    "rope_dtype": "the precision of the rotary embeddings",
    "layer_scale": "the LayerScale",
    "patch_size": "the side of the ViT's patches",
    "input_channels": "the input channels of the ViT",
}
_NETWORK = {
    "layers": "the blocks that the decoder reads",
    "copies": "the copies of the tokens",
    "encoder": "the encoder",
    "skip_in_ffn": "the skips in the feed-forward layers",
    "input_scale": "the enlargement of the images",
}
_CONFIGURATION = {
    "patch_size": "the patch size",
    "spacing": "the spacing",
    "normalization_schemes": "the normalisation",
    "use_mask_for_norm": "the mask of the normalisation",
    "preprocessor_name": "the preprocessor",
    "resampling_fn_data": "the resampling of images",
    "resampling_fn_data_kwargs": "the resampling of images",
    "resampling_fn_probabilities": "the resampling of probabilities",
    "resampling_fn_probabilities_kwargs": "the resampling of probabilities",
    "previous_stage": "the previous stage",
}
_PLANS = {
    "transpose_forward": "the order of axes",
    "transpose_backward": "the order of axes",
    "image_reader_writer": "the reader of images",
    "label_manager": "the handling of labels",
}
# normalisations that do not read the intensities of the whole dataset
_OF_ONE_IMAGE = {
    "ZScoreNormalization",
    "NoNormalization",
    "RescaleTo01Normalization",
    "RGBTo01Normalization",
}


@dataclass(frozen=True)
class Fold:
    """A fold that is about to be trained or validated.

    Attributes:
        plans: Its plans.
        dataset: The content of its dataset.json.
        entry: Its ``architecture``.
        folder: The model's, with plans.json and the folds.
        name: Of its own folder, such as ``fold_0``.
        configuration: Name of the configuration.
    """

    plans: dict[str, Any]
    dataset: dict[str, Any]
    entry: dict[str, Any]
    folder: str
    name: str
    configuration: str


def check_other_folds(fold: Fold) -> None:
    """Refuse a fold for which prediction would differ from that of the folds trained before.

    Raises:
        UserError: If a fold beside this one has a checkpoint and other plans.
    """
    others = [p.name for p in trained_folds(fold.folder) if p.name != fold.name]
    if others and (differ := differences_from_saved(fold, others[0])):
        raise UserError(
            f"all folds of a model must have one architecture and one preprocessing, but this one "
            f"differs from {others[0]} in {', '.join(differ)}: use the same weights and plans, or "
            f"move {fold.folder} away."
        )


def differences_from_saved(fold: Fold, theirs: str = "the saved ones") -> list[str]:
    """Say in what a fold differs from the plans.json and dataset.json of its model's folder.

    Args:
        fold: What is compared.
        theirs: What to call what the folder holds.

    Returns:
        Parts of a sentence such as ``the epsilon of the LayerNorms (norm_eps: 1e-05 here, 1e-06 in
        fold_0)``; none if the folder holds no plans of ours.
    """
    plans, folder, configuration = fold.plans, fold.folder, fold.configuration
    saved = saved_architecture(folder, configuration, fold.entry["network_class_name"])
    if saved is None:
        return []
    told: dict[str, str] = {}

    def compare(words: dict[str, str], one: dict[str, Any], other: dict[str, Any]) -> None:
        for name, word in words.items():
            ours, others = (json.loads(json.dumps(d.get(name))) for d in (one, other))
            if ours != others:
                values = f"{ours} here, {others} in {theirs}"
                told.setdefault(word, f"{word} ({name}{f': {values}' if len(values) < 90 else ''})")

    new, old = fold.entry["arch_kwargs"], saved["arch_kwargs"]
    if "backbone" in new:
        fields = differences(Architecture(**new["backbone"]), Architecture(**old["backbone"]))
        ours, others = ({name: pair[n] for name, pair in fields.items()} for n in (0, 1))
        compare({name: _BACKBONE[name] for name in sorted(fields)}, ours, others)
    compare(_NETWORK, new, old)
    old_plans = load_json(str(Path(folder) / "plans.json"))
    one, other = (PlansManager(p).get_configuration(configuration) for p in (plans, old_plans))
    compare(_CONFIGURATION, one.configuration, other.configuration)
    compare(_PLANS, plans, old_plans)
    channels = (_intensities(p, one.normalization_schemes) for p in (plans, old_plans))
    compare({"intensities": "the intensities of the dataset"}, *channels)
    if (path := Path(folder) / "dataset.json").exists():
        labels = {"labels": "the values of the labels", "regions_class_order": "the regions"}
        compare(
            labels | {"channels": "the number of channels"},
            *map(_meaning, (fold.dataset, load_json(str(path)))),
        )
    return list(told.values())


def _intensities(plans: dict[str, Any], schemes: list[str]) -> dict[str, Any]:
    """Return the statistics of the channels whose normalisation reads them."""
    every = plans.get("foreground_intensity_properties_per_channel") or {}
    read = [str(n) for n, scheme in enumerate(schemes) if scheme not in _OF_ONE_IMAGE]
    return {"intensities": {channel: every.get(channel) for channel in read}}


def _meaning(dataset: dict[str, Any]) -> dict[str, Any]:
    """Return what a dataset.json says without the names, which may change."""
    return {
        "labels": list(dataset["labels"].values()),
        "regions_class_order": dataset.get("regions_class_order"),
        "channels": len(dataset.get("channel_names") or dataset.get("modality") or ()),
    }
