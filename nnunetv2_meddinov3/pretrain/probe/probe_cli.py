"""``meddinov3 probe``: how good frozen features are, on labelled slices."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from nnunetv2_meddinov3.errors import UserError

_DESCRIPTION = """\
Measures frozen features on labelled slices: which structures a slice shows, by k-NN and by logistic
regression on cls tokens (mean average precision); where they are, by a linear classifier of patch
tokens (mean Dice). Held-out patients only, with 95 % intervals over six or more of them.
"""


def main(argv: list[str] | None = None) -> int:
    """Probe weights and print a table.

    Args:
        argv: What was typed after ``meddinov3 probe``; by default that of this process.

    Returns:
        The exit code, 0.

    Raises:
        UserError: If weights or dataset cannot be used.
    """
    arguments = _parser().parse_args(argv)
    if arguments.size < 32:
        raise UserError(f"--size must be at least 32 pixels, got {arguments.size}.")
    if arguments.slices_per_case < 1:
        raise UserError(f"--slices-per-case must be at least 1, got {arguments.slices_per_case}.")
    # Imported here because `--help` need not wait for torch.
    from nnunetv2_meddinov3.files import write_text
    from nnunetv2_meddinov3.pretrain.probe.comparison import compare, table
    from nnunetv2_meddinov3.pretrain.probe.labelled import ProbeData

    data = ProbeData.from_nnunet(
        arguments.dataset,
        size=arguments.size,
        slices_per_case=arguments.slices_per_case,
        patients=arguments.patients,
    )
    results = compare(
        arguments.weights, data, device=arguments.device, with_random=arguments.random
    )
    print(table(results, data))
    if arguments.json is not None:
        content = {name: result.to_dict() for name, result in results.items()}
        write_text(arguments.json, f"{json.dumps(content, indent=1)}\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="meddinov3 probe",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "weights",
        nargs="+",
        metavar="WEIGHTS",
        help="a path, timm:NAME, hf:OWNER/REPO/FILE, or the folder of a pretraining stage",
    )
    add(
        "--dataset",
        required=True,
        type=Path,
        metavar="DIR",
        help="[REQUIRED] labelled raw dataset of nnU-Net (dataset.json, imagesTr, labelsTr)",
    )
    add("--size", type=int, default=224, metavar="PIXELS", help="of the slices. Default: 224")
    add("--slices-per-case", type=int, default=8, metavar="N", help="at most. Default: 8")
    add(
        "--patients",
        metavar="REGEX",
        help="whose first group is the patient in a case's name. Default: every case is a patient",
    )
    add("--random", action="store_true", help="probe random weights of the same size too")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="Default: auto")
    add("--json", type=Path, metavar="FILE", help="write all figures to this file")
    return parser
