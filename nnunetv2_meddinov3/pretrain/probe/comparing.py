"""Several weights beside each other on one probe."""

from __future__ import annotations

from pathlib import Path

import torch

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.models.backbone import Backbone
from nnunetv2_meddinov3.models.build import backbone_from, resolve_source
from nnunetv2_meddinov3.models.weights import Checkpoint, read_checkpoint
from nnunetv2_meddinov3.pretrain.checkpoints import CHECKPOINTS, EXPORT, state_of
from nnunetv2_meddinov3.pretrain.probe.labelled import ProbeData
from nnunetv2_meddinov3.pretrain.probe.probing import KINDS, ProbeResult, run_probe

_TITLES = {"knn": "k-NN (mAP)", "linear": "linear (mAP)", "dense": "segmentation (Dice)"}


def compare(
    sources: list[str], data: ProbeData, *, device: str = "auto", with_random: bool = False
) -> dict[str, ProbeResult]:
    """Probe several weights on the same slices.

    Args:
        sources: Anything that ``load_backbone`` takes, or folders of pretraining stages.
        data: The slices.
        device: ``auto``, ``cpu`` or ``cuda``.
        with_random: Whether random weights of the first one's size are probed too.

    Returns:
        Source -> result, in the order given.

    Raises:
        UserError: If weights cannot be read, or there is no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda needs a GPU that PyTorch can use, but there is none.")
    chosen = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    checkpoints = {source: _read(source) for source in sources}  # all, before any work
    results = {
        source: run_probe(
            backbone_from(checkpoint),
            data,
            intensity=checkpoint.metadata.get("intensity"),
            device=chosen,
        )
        for source, checkpoint in checkpoints.items()
    }
    if with_random:
        first = checkpoints[sources[0]]
        torch.manual_seed(0)
        results["random weights"] = run_probe(
            Backbone(first.architecture),
            data,
            intensity=first.metadata.get("intensity"),
            device=chosen,
        )
    return results


def _read(source: str) -> Checkpoint:
    folder = Path(source)
    if (folder / EXPORT).is_file():
        return read_checkpoint(folder / EXPORT)
    if (folder / CHECKPOINTS).is_dir():
        return read_checkpoint(state_of(folder), branch="teacher")
    return resolve_source(source)


def table(results: dict[str, ProbeResult], data: ProbeData) -> str:
    """Return the figures as text, one line for each of the weights."""
    first = next(iter(results.values()))
    width = max(len("weights"), *map(len, results))
    lines = [
        f"{data.name}: {first.slices[0]} slices of {first.patients[0]} patients to fit, "
        f"{first.slices[1]} of {first.patients[1]} held out",
        f"{'weights':{width}}  " + "".join(f"{_TITLES[kind]:26}" for kind in KINDS),
    ]
    for name, result in results.items():
        cells = []
        for kind in KINDS:
            value, interval = getattr(result, kind), result.intervals.get(kind)
            text = "not measurable" if value is None else f"{value:.3f}"
            if interval:
                text += f" ({interval[0]:.3f} to {interval[1]:.3f})"
            cells.append(f"{text:26}")
        lines.append(f"{name:{width}}  {''.join(cells)}".rstrip())
    if first.chance is not None:
        lines.append(f"{'blind guess':{width}}  {first.chance:<26.3f}{first.chance:.3f}")
    if first.knn is None:
        lines.append(
            "k-NN and linear: no structure is shown by some slices and not by others in both parts."
        )
    return "\n".join(lines)
