"""``meddinov3 curate``: converts volumes into a store of slices for pretraining."""

import argparse
import re
import sys
from pathlib import Path

from nnunetv2_meddinov3.errors import UserError

_EPILOG = """\
exit codes: 0 if all sources entered or were excluded on request, 3 if some were skipped, 2 if
none entered, 1 for a mistake in the command, 128 + its number after a signal

  meddinov3 curate Dataset042_Mine hospital/dicom --store store --workers 8
  meddinov3 curate AMOS22 --store store --exclude AMOS22/imagesTs --patients '(amos_[0-9]+)_'
  meddinov3 store verify store
"""


def main(argv: list[str] | None = None) -> int:
    """Curate what the command line names and print the result.

    Args:
        argv: What was typed after ``meddinov3 curate``; by default that of this process.

    Returns:
        The exit code: 0 if every source entered or was excluded on request, 3 if some were
        skipped, 2 if none entered, 128 + its number if a signal stopped the run.

    Raises:
        UserError: A mistake in the arguments, before anything is written, or a store that cannot
            be written.
    """
    arguments = _parser().parse_args(argv)
    shard = _shard(arguments.shard)
    from nnunetv2_meddinov3.store.sharing import check_target

    check_target(arguments.store, shard)  # a mistake need not wait for the imports that follow
    # Imported here because `--help` need not wait for SimpleITK and matplotlib.
    from nnunetv2_meddinov3.curate.leakage import DEFAULT_BENCHMARKS
    from nnunetv2_meddinov3.curate.pipeline import curate

    summary = curate(
        arguments.sources,
        arguments.store,
        workers=arguments.workers,
        shard=shard,
        exclude=arguments.exclude,
        patients=arguments.patients,
        modality=arguments.modality,
        hide_paths=arguments.hide_paths,
        pixel_spacing_mm=arguments.pixel_spacing,
        size=arguments.size,
        min_gap_mm=arguments.min_gap_mm,
        keep_flagged=arguments.keep_flagged,
        dask_scheduler=arguments.dask_scheduler,
        benchmark_names=arguments.benchmark_names or DEFAULT_BENCHMARKS,
        allow_benchmarks=arguments.allow_benchmarks,
        progress=sys.stderr,
    )
    print(summary)
    print(f"Report: {arguments.store / 'report.html'}")
    return summary.exit_code


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None:
        raise UserError(
            f"--shard must be i/n, for example 0/4 for the first of four, but is {text!r}."
        )
    return int(match[1]), int(match[2])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="meddinov3 curate",
        description="Converts volumes into a store of axial slices. What the store has already is "
        "left alone, so the same command continues an interrupted run.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "sources",
        nargs="+",
        type=Path,
        metavar="SOURCE",
        help="nnU-Net raw dataset, folder of NIfTI, NRRD, MHA, DICOM or PNG, or a file",
    )
    add("--store", required=True, type=Path, metavar="DIR", help="[REQUIRED] folder of the store")
    add("--workers", type=int, default=1, metavar="N", help="processes. Default: 1")
    add(
        "--shard",
        default="0/1",
        metavar="I/N",
        help="do the I-th of N parts, counted from 0; all may write one store. Default: 0/1",
    )
    add(
        "--exclude",
        nargs="+",
        action="extend",
        default=[],
        type=Path,
        metavar="TESTS",
        help="must not enter, recognised by content: nnU-Net raw dataset (its imagesTs), folder or "
        "file of volumes, store, or text file of hashes",
    )
    add(
        "--patients",
        metavar="REGEX",
        help="its first group, or whole match, is the patient in the name of a file or case, also "
        "of those in the store. Default: each file or case is a patient; DICOM names its own",
    )
    add(
        "--modality",
        metavar="NAME",
        help="CT, MR, PT, US or XR: that of volumes which do not say theirs, as in plain folders. "
        "DICOM and channel names say it, and values that are no HU outrank CT",
    )
    add(
        "--hide-paths",
        action="store_true",
        help="store keyed hashes instead of the names of files and folders; for the store's "
        "lifetime",
    )
    add(
        "--pixel-spacing",
        type=float,
        metavar="MM",
        help="resample slices to this spacing; the paper's is 0.45. Default: native",
    )
    add(
        "--size",
        type=int,
        metavar="PIXELS",
        help="resize slices to this many pixels per side; the paper's is 256. Default: native",
    )
    add(
        "--min-gap-mm",
        type=float,
        default=0.0,
        metavar="MM",
        help="leave out slices nearer than this to one that enters. Default: 0, all enter",
    )
    add("--keep-flagged", action="store_true", help="let air-only and constant slices enter")
    add(
        "--benchmark-names",
        nargs="+",
        metavar="NAME",
        help="test sets to be refused without --exclude. Default: AMOS22 BTCV KiTS23 LiTS",
    )
    add("--allow-benchmarks", action="store_true", help="do not look for test sets by name")
    add(
        "--dask-scheduler",
        metavar="ADDRESS",
        help="run on this Dask cluster, such as tcp://host:8786, instead of --workers",
    )
    return parser
