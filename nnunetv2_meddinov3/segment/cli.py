"""``meddinov3 segment``: a scan and a model in, labels out."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.readiness import check_device
from nnunetv2_meddinov3.segment.model_source import add_model_options, opened_model

_DESCRIPTION = """\
Segments scans with a trained model of nnU-Net's, ours or any other that is installed: NIfTI, NRRD,
MHA, or DICOM in; NIfTI out, with a picture of each. The labels are those of nnUNetv2_predict. It
needs none of nnU-Net's variables and no preparation; the model is a folder of nnUNet_results or the
zip of nnUNetv2_export_model_to_zip, which is not installed. Run again, it goes on with the scans
that have no labels in OUT.
"""


def main(argv: list[str] | None = None) -> int:
    """Segment scans.

    Args:
        argv: What was typed after ``meddinov3 segment``; by default that of this process.

    Returns:
        The exit code, 1 where a scan of several failed.

    Raises:
        UserError: If there is no such model or scan, or results cannot be written.
    """
    arguments = _parser().parse_args(argv)
    # Imported here because `--help` need not wait for torch.
    from nnunetv2_meddinov3.files import check_writable
    from nnunetv2_meddinov3.raw_dataset import read_dataset_json
    from nnunetv2_meddinov3.segment.cases import find_cases
    from nnunetv2_meddinov3.segment.dicom_seg import check_highdicom
    from nnunetv2_meddinov3.segment.segmenting import (
        Wanted,
        labels_name,
        load_predictor,
        segment_cases,
    )

    check_writable(arguments.output)
    if arguments.dicom_seg:
        check_highdicom()
    device = _device(arguments.device)
    source = arguments.model, arguments.configuration, arguments.folds, arguments.checkpoint
    with opened_model(*source, max_gb=arguments.max_gb) as model:
        dataset = read_dataset_json(model.folder / "dataset.json")
        cases = find_cases(arguments.volume, dataset)
        if arguments.dicom_seg and not any(c.source and c.source.kind == "dicom" for c in cases):
            raise UserError(
                f"--dicom-seg needs DICOM series, which it refers to, but {arguments.volume} holds "
                "none: leave it out."
            )
        paths = {case.name: arguments.output / labels_name(case, dataset) for case in cases}
        done = [] if arguments.overwrite else [c for c in cases if paths[c.name].is_file()]
        if done:
            print(f"{len(done)} of {len(cases)} were done before (--overwrite repeats them).")
        left = [case for case in cases if case not in done]
        if not left:
            return 0
        predictor = load_predictor(model, device, arguments.mirroring)
        wanted = Wanted(arguments.picture, arguments.uncertainty, arguments.dicom_seg)
        failed = segment_cases(left, model, predictor, arguments.output, wanted)
    print(f"Written to {arguments.output}" + (", but for what is said above" if failed else ""))
    return 1 if failed else 0


def _device(name: str) -> str:
    if name != "auto":
        check_device(name)
        return name
    import torch  # seconds

    return "cuda" if torch.cuda.is_available() else "cpu"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="meddinov3 segment",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("volume", type=Path, metavar="VOLUME", help="a scan, or a folder of scans")
    add_model_options(parser, "--model")
    add("-o", dest="output", required=True, type=Path, metavar="OUT", help="[REQUIRED] folder")
    add("-device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="Default: auto")
    add(
        "--uncertainty",
        action="store_true",
        help="also write CASE_uncertainty.nii.gz: 0 is sure, 1 is a guess; the entropy of the mean "
        "probabilities over mirrorings and folds (2D models)",
    )
    add(
        "--dicom-seg",
        action="store_true",
        help="also write CASE.dcm, a DICOM Segmentation of each series (needs the extra dicom)",
    )
    add(
        "--no-mirroring",
        dest="mirroring",
        action="store_false",
        help="do not average over mirrored images: up to four times faster, less exact",
    )
    add("--no-picture", dest="picture", action="store_false", help="write no CASE_overlay.png")
    add("--overwrite", action="store_true", help="repeat what is in OUT already")
    return parser
