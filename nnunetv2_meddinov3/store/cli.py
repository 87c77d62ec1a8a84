"""``meddinov3 store verify|merge|split|export``: look after stores of slices."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.files import check_writable


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of ``meddinov3 store``."""
    parser = argparse.ArgumentParser(
        prog="meddinov3 store", description="Look after stores of slices."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="verify|merge|split|export")
    verify = verbs.add_parser(
        "verify", help="compare every byte with its checksum; exit code 1 if anything is wrong"
    )
    verify.add_argument("store", type=Path, help="folder of the store")
    merge = verbs.add_parser("merge", help="make one store of several with the same options")
    merge.add_argument("stores", type=Path, nargs="+", metavar="STORE", help="stores to merge")
    merge.add_argument(
        "--into", type=Path, required=True, help="a new folder, or a store to add to"
    )
    merge.add_argument(
        "--with-key",
        action="store_true",
        help="keep the key of the stores, if it is one, to go on curating the same patients",
    )
    split = verbs.add_parser("split", help="divide the slices, keeping patients together")
    split.add_argument("store", type=Path, help="folder of the store; splits.json is written there")
    split.add_argument("splits", nargs="+", metavar="NAME=FRACTION", help="train=0.9 val=0.1")
    split.add_argument("--seed", type=int, default=0, help="default: 0")
    export = verbs.add_parser("export", help="write each slice as a .npy file (int16)")
    export.add_argument("store", type=Path, help="folder of the store")
    export.add_argument("target", type=Path, help="a new or empty folder")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``meddinov3 store`` and return the exit code.

    Raises:
        UserError: If a store is missing or unfit for what is asked, or a target cannot be written.
    """
    args = build_parser().parse_args(argv)
    verbs = {"verify": _verify, "merge": _merge, "split": _split, "export": _export}
    return verbs[args.verb](args)


def _verify(args: argparse.Namespace) -> int:
    from nnunetv2_meddinov3.store.verify import verify

    found = verify(args.store, sys.stderr)
    for sentence in found:
        print(sentence)
    print(f"{args.store}: {len(found)} problem(s) found" if found else f"{args.store}: intact")
    return 1 if found else 0


def _merge(args: argparse.Namespace) -> int:
    from nnunetv2_meddinov3.store.sharing import check_target

    check_target(args.into)
    from nnunetv2_meddinov3.store.manage import merge
    from nnunetv2_meddinov3.store.reader import SliceStore

    merge(args.stores, args.into, with_key=args.with_key)
    print(f"{args.into}: {len(SliceStore(args.into))} slices of {len(args.stores)} store(s)")
    return 0


def _split(args: argparse.Namespace) -> int:
    from nnunetv2_meddinov3.store.manage import split_by_patient

    rows = split_by_patient(args.store, _fractions(args.splits), args.seed)
    for name, numbers in rows.items():
        print(f"{name}: {len(numbers)} slices")
    return 0


def _fractions(splits: Sequence[str]) -> dict[str, float]:
    fractions = {}
    for split in splits:
        name, _, share = split.partition("=")
        try:
            fractions[name] = float(share)
        except ValueError as error:
            raise UserError(
                f"a split must be NAME=FRACTION such as train=0.9, got {split!r}: give each split "
                "its fraction."
            ) from error
    if len(fractions) < len(splits):
        raise UserError(
            f"the splits must have different names, got {' '.join(splits)}: rename one."
        )
    return fractions


def _export(args: argparse.Namespace) -> int:
    check_writable(args.target)
    from nnunetv2_meddinov3.store.manage import export_npy

    print(f"{args.target}: {export_npy(args.store, args.target)} slices")
    return 0
