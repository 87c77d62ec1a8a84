"""``meddinov3 dataset``: the paper's benchmarks for nnU-Net, from their downloads."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nnunetv2_meddinov3.errors import UserError

if TYPE_CHECKING:
    from nnunetv2_meddinov3.datasets.benchmarks import Benchmark

_DESCRIPTION = """\
Makes a raw dataset of nnU-Net from a benchmark as downloaded: a folder of archives, or what they
were unpacked into. The data are not ours to give; each set has its own terms, which are printed.
Every file is read whole, so that a damaged one is found now; an interrupted conversion goes on.
"""


def main(argv: list[str] | None = None) -> int:
    """Convert a download.

    Args:
        argv: What was typed after ``meddinov3 dataset``; by default that of this process.

    Returns:
        The exit code, 0.

    Raises:
        UserError: If something is missing, damaged or cannot be written.
    """
    arguments = _parser().parse_args(argv)
    target = arguments.output or os.environ.get("nnUNet_raw")
    if not target:
        raise UserError(
            "nnUNet_raw must name the folder of raw datasets, but is unset: or give -o."
        )
    # Imported here because `--help` need not wait for numpy and nibabel.
    from nnunetv2_meddinov3.datasets.convert import convert, find, named
    from nnunetv2_meddinov3.files import check_writable

    benchmark = _benchmark(arguments)
    number = benchmark.number if arguments.number is None else arguments.number
    if not 1 <= number <= 9999:
        raise UserError(f"-d must be a number from 1 to 9999, got {number}.")
    folder = Path(target) / f"Dataset{number:03d}_{benchmark.name}"
    check_writable(folder)
    download = find(benchmark, arguments.folder)
    if download.missing and not arguments.partial:
        raise UserError(
            f"{arguments.folder} must hold all {benchmark.count} labelled cases of "
            f"{benchmark.name}, but lacks {named(download.missing)}: download what is missing, or "
            "say --partial to convert what is there."
        )
    print(f"Licence: {benchmark.licence} ({benchmark.reference}).")
    converted = convert(
        benchmark,
        download,
        folder,
        with_tests=arguments.with_test,
        unknown_spacing=arguments.unknown_spacing,
        stream=sys.stderr,
    )
    for note in (*benchmark.notes, *converted.notes):
        print(note)
    if download.missing:
        print(f"Not the whole benchmark: it lacks {named(download.missing)}.")
    print(f"{len(converted.cases)} labelled cases in {folder}")
    print(f"Next: nnUNetv2_plan_and_preprocess -d {number} -pl MedDINOv3Planner -c 2d_896")
    return 0


def _benchmark(arguments: argparse.Namespace) -> Benchmark:
    from nnunetv2_meddinov3.datasets import benchmarks

    if arguments.ct and arguments.benchmark != "amos22":
        raise UserError(f"--ct must go with amos22, but came with {arguments.benchmark}.")
    if arguments.regions and arguments.benchmark != "kits23":
        raise UserError(f"--regions must go with kits23, but came with {arguments.benchmark}.")
    if arguments.benchmark == "amos22":
        return benchmarks.amos22("ct" if arguments.ct else "ct+mr")
    if arguments.benchmark == "kits23":
        return benchmarks.kits23("regions" if arguments.regions else "labels")
    return benchmarks.btcv() if arguments.benchmark == "btcv" else benchmarks.lits()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="meddinov3 dataset",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("benchmark", choices=("amos22", "btcv", "kits23", "lits"), help="which one")
    add("folder", type=Path, metavar="ARCHIVE_FOLDER", help="the download")
    add("-o", dest="output", type=Path, metavar="DIR", help="Default: nnUNet_raw")
    add("-d", dest="number", type=int, metavar="ID", help="of the dataset. Default: nnU-Net's own")
    add("--ct", action="store_true", help="amos22: the 300 CT only. Default: CT and MR")
    add(
        "--regions",
        action="store_true",
        help="kits23: kidney with masses, masses, tumor, as the challenge measures. Default: "
        "kidney, tumor, cyst, as the paper",
    )
    add("--with-test", action="store_true", help="also images without labels, to imagesTs")
    add("--partial", action="store_true", help="convert what is there of an incomplete download")
    add(
        "--unknown-spacing",
        choices=("error", "skip", "keep"),
        default="error",
        help="what becomes of cases whose files state no spacing (20 of lits). keep: 1 mm, as "
        "stored, which all who use the files as they are have. Default: error",
    )
    return parser
