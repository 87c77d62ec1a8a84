"""Several weights probed on the same slices, and their scores as a table."""

from __future__ import annotations

from pathlib import Path

import torch

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.models.backbone import Backbone
from nnunetv2_meddinov3.models.build import backbone_from
from nnunetv2_meddinov3.models.weights import Checkpoint, read_checkpoint, resolve_source
from nnunetv2_meddinov3.pretrain.checkpoints import state_of
from nnunetv2_meddinov3.pretrain.probe.labelled import ProbeData
from nnunetv2_meddinov3.pretrain.probe.probing import (
    KINDS,
    MIN_HELD_OUT,
    ProbeResult,
    run_probe,
    too_few,
)
from nnunetv2_meddinov3.pretrain.run_folder import CHECKPOINTS, EXPORT

_COLUMNS = {"knn": "k-NN (mAP)", "linear": "linear (mAP)", "dense": "segmentation (Dice)"}


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
    chosen = chosen_device(device)
    checkpoints = {source: read_weights(source) for source in sources}  # all, before any work

    def probe(backbone: Backbone, checkpoint: Checkpoint) -> ProbeResult:
        intensity = checkpoint.metadata.get("intensity")
        return run_probe(backbone, data, intensity=intensity, device=chosen)

    results = {name: probe(backbone_from(each), each) for name, each in checkpoints.items()}
    if with_random:
        first = checkpoints[sources[0]]
        torch.manual_seed(0)
        results["random weights"] = probe(Backbone(first.architecture), first)
    return results


def chosen_device(device: str) -> str:
    """Return ``cpu`` or ``cuda``, the second for ``auto`` where there is one.

    Raises:
        UserError: If ``cuda`` is asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda needs a GPU that PyTorch can use, but there is none.")
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


def read_weights(source: str) -> Checkpoint:
    """Read anything that ``load_backbone`` takes, or what the folder of a stage has to give.

    Raises:
        UserError: If it cannot be read.
    """
    folder = Path(source)
    if (folder / EXPORT).is_file():
        return read_checkpoint(folder / EXPORT)
    if (folder / CHECKPOINTS).is_dir() and (state := state_of(folder)) is not None:
        return read_checkpoint(state, branch="teacher")
    return resolve_source(source)


def table(results: dict[str, ProbeResult], data: ProbeData) -> str:
    """Return the scores as text, one line for each of the weights."""
    first = next(iter(results.values()))
    width = max(len("weights"), *map(len, results))
    lines = [
        f"{data.name}: {first.slices[0]} slices of {first.patients[0]} patients to fit, "
        f"{first.slices[1]} of {first.patients[1]} held out",
        f"{'weights':{width}}  " + "".join(f"{title:26}" for title in _COLUMNS.values()),
    ]
    for name, result in results.items():
        cells = "".join(f"{_cell(result, kind):26}" for kind in KINDS)
        lines.append(f"{name:{width}}  {cells}".rstrip())
    blind = ("-" if (value := first.blind[kind]) is None else f"{value:.3f}" for kind in KINDS)
    lines.append(f"{'blind guess':{width}}  {''.join(f'{cell:26}' for cell in blind)}".rstrip())
    if (note := too_few(first.patients[1])) is not None:
        lines.append(note)
    if first.knn is None:
        which = "completely labelled slices" if data.ignored.any() else "slices"
        lines.append(
            f"k-NN and linear: no structure is shown by some {which} and not by others in both "
            "parts."
        )
    return "\n".join(lines)


def _cell(result: ProbeResult, kind: str) -> str:
    value, interval = getattr(result, kind), result.intervals.get(kind)
    if value is None:
        return "not measurable"
    if result.patients[1] < MIN_HELD_OUT:
        interval = None
    return f"{value:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")
