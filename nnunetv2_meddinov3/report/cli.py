"""``meddinov3 report``: a page on a trained model, at any time."""

from __future__ import annotations

import argparse
from pathlib import Path

_DESCRIPTION = """\
Writes one page on a model folder (TRAINER__PLANS__CONFIGURATION in nnUNet_results) of any trainer
of nnU-Net's, finished or not: curves, Dice per label and case of the validation, the worst and the
best cases with what is wrong in them, what was trained, and the commands to use it. Our trainers
write it themselves after the validation.
"""


def main(argv: list[str] | None = None) -> int:
    """Write the page of a model folder.

    Args:
        argv: What was typed after ``meddinov3 report``; by default that of this process.

    Returns:
        The exit code, 0.

    Raises:
        UserError: If the folder is no model folder, or the page cannot be written.
    """
    arguments = _parser().parse_args(argv)
    # Imported here because `--help` need not wait for them.
    from nnunetv2_meddinov3.files import check_writable
    from nnunetv2_meddinov3.raw_dataset import open_raw_dataset
    from nnunetv2_meddinov3.report.model_folder import PAGE, read_model
    from nnunetv2_meddinov3.report.model_page import summary, write_model_page

    if arguments.raw is not None:
        open_raw_dataset(arguments.raw)
    model = read_model(arguments.folder, arguments.raw)
    path = arguments.output or model.folder / PAGE
    if path.is_dir():
        path = path / PAGE
    check_writable(path.parent)
    write_model_page(path, model)
    print("\n".join(map(summary, model.folds)))
    print(f"Written: {path}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="meddinov3 report",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="MODEL_FOLDER", help="the model's folder, or one of its folds")
    add(
        "-o",
        dest="output",
        type=Path,
        metavar="FILE",
        help="the page. Default: report.html in the model's folder",
    )
    add(
        "--raw",
        type=Path,
        metavar="DIR",
        help="raw dataset with the images. Default: the one of that name in nnUNet_raw",
    )
    return parser
