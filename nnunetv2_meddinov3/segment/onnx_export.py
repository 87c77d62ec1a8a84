"""``meddinov3 export-onnx``: a trained network as one ONNX file, compared with PyTorch."""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2_meddinov3 import __version__
from nnunetv2_meddinov3.errors import UserError, first_line
from nnunetv2_meddinov3.files import check_writable, part_beside, unwritable
from nnunetv2_meddinov3.segment.model_source import TrainedModel, add_model_options, opened_model

if TYPE_CHECKING:
    from torch import Tensor, nn

TOLERANCE = 1e-4  # of the largest logit, or of 1 where all are smaller
METADATA = "meddinov3"
_DESCRIPTION = """\
Writes the network of a trained model as one ONNX file that needs neither torch nor nnU-Net: images
as nnU-Net preprocesses them (resampled, normalised) in, logits out, for batches and images of any
size where the network allows it. The file is run with onnxruntime and compared with PyTorch. What
is left to do around it (spacing, normalisation, tiles, labels) is in its metadata. Several folds
become one network, the mean of their logits. Needs the extra "onnx".
"""


def main(argv: list[str] | None = None) -> int:
    """Export a model.

    Args:
        argv: What was typed after ``meddinov3 export-onnx``; by default that of this process.

    Returns:
        The exit code, 0.

    Raises:
        UserError: If there is no such model, it cannot be exported, or numbers differ.
    """
    arguments = _parser().parse_args(argv)
    if arguments.output.suffix != ".onnx" or arguments.output.is_dir():
        raise UserError(f"-o must name a file that ends in .onnx, got {arguments.output}.")
    check_writable(arguments.output.parent)
    _check_packages()
    # Imported here because `--help` need not wait for torch.
    from nnunetv2_meddinov3.segment.segmenting import load_predictor

    source = arguments.model, arguments.configuration, arguments.folds, arguments.checkpoint
    with opened_model(*source, max_gb=arguments.max_gb) as model:
        predictor = load_predictor(model, "cpu")
        print(export(predictor, model, arguments.output))
    return 0


def _check_packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"export-onnx needs {error.name}, which is not installed: run "
            "pip install 'nnunetv2_meddinov3[onnx]'."
        ) from error


def export(predictor: Any, model: TrainedModel, path: Path) -> str:
    """Write the network of a predictor as ONNX, once it gave PyTorch's numbers.

    Args:
        predictor: With the parameters of each fold.
        model: What it was loaded from.
        path: The file.

    Returns:
        A line about what was written.

    Raises:
        UserError: If it cannot be exported or written, or numbers differ.
    """
    import torch

    configuration = predictor.configuration_manager
    patch = [int(side) for side in configuration.patch_size]
    network = _mean_of_folds(predictor)
    channels = len(
        predictor.dataset_json.get("channel_names") or predictor.dataset_json["modality"]
    )
    generator = torch.Generator().manual_seed(0)

    def images(batch: int, sides: Sequence[int]) -> Tensor:
        return torch.randn((batch, channels, *sides), generator=generator)

    example = images(2, patch)
    exported, is_any_size = _exported(network, example)
    # other sides: the network of ours takes any, U-Nets multiples of their strides
    others = [tuple(2 * side for side in patch), (*patch[:-1], 2 * patch[-1])]
    tried = [(1, tuple(patch)), (3, tuple(patch))]
    tried += [(1, sides) for sides in others[: 2 if is_any_size and len(patch) == 2 else 0]]
    facts = _facts(predictor, model, is_any_size)
    path = path.resolve()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part_beside(path) as place:
            place.mkdir()
            part = place / path.name
            exported.model.metadata_props[METADATA] = json.dumps(facts)
            exported.save(str(part))
            worst = _compare(part, network, [images(*shape) for shape in tried])
            for file in sorted(part.parent.iterdir(), reverse=True):  # weights beside it first
                file.replace(path.with_name(file.name))
    except OSError as error:
        raise unwritable(path, error) from error
    size = path.stat().st_size / 1e6
    sizes = "any size" if is_any_size else f"{' x '.join(map(str, patch))} pixels"
    return (
        f"Written: {path} ({size:.1f} MB), batches of any number, images of {sizes}; largest "
        f"difference from PyTorch {worst:.1e} of the largest logit, of {len(tried)} inputs."
    )


def _mean_of_folds(predictor: Any) -> nn.Module:
    from torch import nn

    networks = []
    for weights in predictor.list_of_parameters:
        network = copy.deepcopy(predictor.network)
        network.load_state_dict(weights)
        networks.append(network.float().eval())
    if len(networks) == 1:
        return networks[0]

    class Mean(nn.Module):
        """The mean of the logits of several networks."""

        def __init__(self) -> None:
            super().__init__()
            self.networks = nn.ModuleList(networks)

        def forward(self, images: Tensor) -> Tensor:
            return sum(network(images) for network in self.networks) / len(self.networks)

    return Mean().eval()


def _exported(network: nn.Module, example: Tensor) -> tuple[Any, bool]:
    """Return what torch exports, and whether it takes images of any size."""
    import torch

    from nnunetv2_meddinov3.models.decoder import TokenDecoder

    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, TokenDecoder):
            module.chunk = None  # whole maps: the number of chunks would be that of the example
    dynamic = torch.export.Dim.DYNAMIC
    sides = range(2, example.ndim)
    errors: list[Exception] = []
    for free in ({0: dynamic, **dict.fromkeys(sides, dynamic)}, {0: dynamic}):
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")  # of torch, on what it does itself
                found = torch.onnx.export(
                    network,
                    (example,),
                    dynamo=True,
                    dynamic_shapes=(free,),
                    input_names=["images"],
                    output_names=["logits"],
                    verbose=False,
                )
            return found, len(free) > 1
        except Exception as error:  # whatever torch raises of what it cannot export
            errors.append(error)
    raise UserError(
        f"the network must be one that torch exports to ONNX, but {type(network).__name__} is not: "
        f"{first_line(errors[-1].__cause__ or errors[-1])}."
    )


def _compare(path: Path, network: nn.Module, inputs: Sequence[Tensor]) -> float:
    """Return the largest difference between onnxruntime and PyTorch, of the largest logit.

    Raises:
        UserError: If it is more than ``TOLERANCE``.
    """
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    worst = 0.0
    for images in inputs:
        with torch.inference_mode():
            expected = network(images)
        found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        scale = max(1.0, float(expected.abs().max()))
        worst = max(worst, float((found - expected).abs().max()) / scale)
    if not worst <= TOLERANCE:
        raise UserError(
            f"the ONNX file must give PyTorch's logits to {TOLERANCE:g} of the largest, but they "
            f"differ by {worst:.1e}; nothing was written: report this with the model's plans.json."
        )
    return worst


def _facts(predictor: Any, model: TrainedModel, is_any_size: bool) -> dict[str, Any]:
    """Return what has to be known to use the file."""
    configuration, plans = predictor.configuration_manager, predictor.plans_manager.plans
    return {
        "written_by": f"nnunetv2_meddinov3 {__version__}",
        "trainer": str(predictor.trainer_name),
        "dataset": str(plans.get("dataset_name")),
        "folds": list(model.folds),
        "channel_names": predictor.dataset_json.get("channel_names"),
        "labels": predictor.dataset_json["labels"],
        "regions_class_order": predictor.dataset_json.get("regions_class_order"),
        "output": "sigmoid" if predictor.label_manager.has_regions else "softmax",
        "spacing_mm": list(configuration.spacing),
        "patch_size": list(configuration.patch_size),
        "any_size": is_any_size,
        "transpose_forward": plans.get("transpose_forward"),
        "normalization_schemes": configuration.normalization_schemes,
        "intensity_properties": plans.get("foreground_intensity_properties_per_channel"),
        "mirroring_axes": list(predictor.allowed_mirroring_axes or ()),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="meddinov3 export-onnx",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser, "MODEL")
    parser.add_argument(
        "-o", dest="output", required=True, type=Path, metavar="FILE", help="[REQUIRED] FILE.onnx"
    )
    return parser
