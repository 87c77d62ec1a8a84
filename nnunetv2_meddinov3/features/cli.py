"""``meddinov3 features``: what a backbone makes of a scan."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from nnunetv2_meddinov3.errors import UserError

_PCA = """\
Colours each patch by the first three principal components of its tokens, over patches of the body
in all scans that are given: one basis, so that a colour means the same in all of them. Writes for
each scan a picture, and a NIfTI of colours in the scan's own place.
"""
_SIMILARITY = """\
Compares every patch with the one at a point, by the cosine of their tokens. Writes a NIfTI of
cosines for each scan, and a page that needs no other file: click any patch, and the map follows.
"""
_EPILOG_SIMILARITY = """\
  meddinov3 features similarity chest.nii.gz --point 250,300,40 --weights teacher.safetensors -o out
  meddinov3 features similarity a.nii.gz --point=-31,12,-580 --mm --to b.nii.gz --weights W -o out
"""
_EXTRACT = """\
Writes the tokens of each scan after the last block to a .npz in fp16: cls (S, D), patches
(S, rows, columns, D), slices (S,), and facts, a text of JSON with the affine from patches to mm.
A scan whose file is there from the same weights and options is left alone, so that the same command
continues an interrupted run.
"""
_EPILOG_EXTRACT = """\
  meddinov3 features extract Dataset042_Mine/imagesTr --weights W -o tokens --size 448
"""
_SEARCH = """\
Finds the slices whose cls tokens have the largest cosine with that of one slice, among those of
`features extract` with the same weights. Writes a picture of them.
"""
_EPILOG_SEARCH = """\
  meddinov3 features search chest.nii.gz tokens --at 40 --weights W -o nearest.png
"""
_COMPARE = """\
Shows what several checkpoints make of the same slices: effective ranks, noise of patches, principal
components in matching colours, and similarity to one patch, in one page that needs no other file.
"""
_EPILOG_COMPARE = """\
  meddinov3 features compare run/stage1 run/stage3 --on chest.nii.gz -o compared.html
"""
_WEIGHTS = "a path, timm:NAME, hf:OWNER/REPO/FILE, or the folder of a pretraining stage"
_VOLUME = "NIfTI, NRRD, MHA, DICOM, pictures, an nnU-Net raw dataset, or a folder of them"
_EPILOG = """\
  meddinov3 features pca chest.nii.gz --weights stage3/teacher.safetensors -o maps
  meddinov3 features pca chest.nii.gz --weights other.pth -o maps_of_other --like maps
"""


def main(argv: list[str] | None = None) -> int:
    """Run one of the ways of looking.

    Args:
        argv: What was typed after ``meddinov3 features``; by default that of this process.

    Returns:
        The exit code, 0.

    Raises:
        UserError: A mistake in the arguments, or what cannot be read or written.
    """
    arguments = _parser().parse_args(argv)
    print("\n".join(map(str, arguments.way(arguments))))
    return 0


# Imports in functions because `--help` need not wait for torch.
def _pca(arguments: argparse.Namespace) -> list[Path]:
    from nnunetv2_meddinov3.features.pca import pca

    return pca(
        arguments.volumes,
        arguments.weights,
        arguments.output,
        size=arguments.size,
        tile=arguments.tile,
        slices=_count(arguments.slices),
        at=arguments.at,
        like_folder=arguments.like,
        modality=arguments.modality,
        device=arguments.device,
    )


def _similarity(arguments: argparse.Namespace) -> list[Path]:
    point = _point(arguments.point)
    from nnunetv2_meddinov3.features.similarity import similarity

    return similarity(
        arguments.volume,
        point,
        arguments.weights,
        arguments.output,
        in_mm=arguments.mm,
        others=arguments.to,
        size=arguments.size,
        tile=arguments.tile,
        slices=_count(arguments.slices),
        modality=arguments.modality,
        device=arguments.device,
    )


def _extract(arguments: argparse.Namespace) -> list[Path]:
    if arguments.batch is not None and arguments.batch < 1:
        raise UserError(f"--batch must be at least 1, got {arguments.batch}.")
    from nnunetv2_meddinov3.features.extract import extract

    return extract(
        arguments.volumes,
        arguments.weights,
        arguments.output,
        size=arguments.size,
        tile=arguments.tile,
        slices=_count(arguments.slices),
        with_patches=not arguments.cls_only,
        batch=arguments.batch,
        modality=arguments.modality,
        device=arguments.device,
    )


def _search(arguments: argparse.Namespace) -> list[str]:
    if arguments.count < 1:
        raise UserError(f"--count must be at least 1, got {arguments.count}.")
    from nnunetv2_meddinov3.features.search import search

    hits = search(
        arguments.query,
        arguments.folder,
        arguments.weights,
        arguments.output,
        at=arguments.at,
        count=arguments.count,
        elsewhere=arguments.elsewhere,
        modality=arguments.modality,
        device=arguments.device,
    )
    lines = [f"{hit.cosine:6.3f}  slice {hit.slice:4}  {hit.scan}" for hit in hits]
    return [*lines, str(arguments.output)]


def _compare(arguments: argparse.Namespace) -> list[Path]:
    from nnunetv2_meddinov3.features.side_by_side import compare_features

    return compare_features(
        arguments.weights,
        arguments.on,
        arguments.output,
        size=arguments.size,
        tile=arguments.tile,
        slices=_count(arguments.slices),
        dataset=arguments.dataset,
        modality=arguments.modality,
        device=arguments.device,
    )


def _point(text: str) -> tuple[float, float, float]:
    try:
        x, y, z = (float(part) for part in text.split(","))
    except ValueError:
        x = y = z = math.nan
    if not all(map(math.isfinite, (x, y, z))):
        raise UserError(f"--point must be three numbers such as 120,96,40, got {text!r}.")
    return x, y, z


def _count(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--slices must be a number from 1 on, or all, got {text!r}.")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="meddinov3 features",
        description="Shows what a backbone makes of a scan. `meddinov3 features WAY --help` "
        "explains a way.",
    )
    ways = parser.add_subparsers(metavar="WAY", required=True)
    for add_way in (_add_pca, _add_similarity, _add_extract, _add_search, _add_compare):
        add_way(ways)
    return parser


def _add_pca(ways: Any) -> None:
    pca = ways.add_parser(
        "pca",
        help="colours of principal components over the anatomy",
        description=_PCA,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    pca.set_defaults(way=_pca)
    pca.add_argument("volumes", nargs="+", type=Path, metavar="VOLUME", help=_VOLUME)
    _add_common(pca)
    pca.add_argument(
        "--at",
        type=int,
        nargs="+",
        default=[],
        metavar="INDEX",
        help="these slices instead, counted from the lowest, 0",
    )
    pca.add_argument(
        "--like",
        type=Path,
        metavar="DIR",
        help="output of an earlier run whose colours are kept: of the same weights on any scans, "
        "or of others on the same slices",
    )


def _add_similarity(ways: Any) -> None:
    similar = ways.add_parser(
        "similarity",
        help="cosines with one patch, and a page to click in",
        description=_SIMILARITY,
        epilog=_EPILOG_SIMILARITY,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    similar.set_defaults(way=_similarity)
    similar.add_argument("volume", type=Path, metavar="VOLUME", help=_VOLUME)
    similar.add_argument(
        "--point",
        required=True,
        metavar="X,Y,Z",
        help="[REQUIRED] voxel of the file, counted from 0 (write --point=-1,2,3 for a negative "
        "first number)",
    )
    similar.add_argument(
        "--mm", action="store_true", help="the point is a position in mm, RAS as viewers show it"
    )
    similar.add_argument(
        "--to",
        type=Path,
        nargs="+",
        default=[],
        metavar="OTHER",
        help="compare the slices of these scans too",
    )
    _add_common(similar)


def _add_extract(ways: Any) -> None:
    extract = ways.add_parser(
        "extract",
        help="tokens of slices in .npz files, for retrieval and probing",
        description=_EXTRACT,
        epilog=_EPILOG_EXTRACT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    extract.set_defaults(way=_extract)
    extract.add_argument("volumes", nargs="+", type=Path, metavar="VOLUME", help=_VOLUME)
    _add_common(extract, slices="all")
    extract.add_argument("--cls-only", action="store_true", help="write no patch tokens")
    extract.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help="slices that the backbone sees together. Default: 8 on a GPU, 1 on a CPU",
    )


def _add_search(ways: Any) -> None:
    search = ways.add_parser(
        "search",
        help="the slices of a folder that are most like one, as a picture",
        description=_SEARCH,
        epilog=_EPILOG_SEARCH,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    search.set_defaults(way=_search)
    search.add_argument("query", type=Path, metavar="QUERY", help="a scan")
    search.add_argument("folder", type=Path, metavar="FOLDER", help="output of `features extract`")
    search.add_argument(
        "-o", dest="output", required=True, type=Path, metavar="PNG", help="[REQUIRED] picture"
    )
    search.add_argument(
        "--at",
        type=int,
        metavar="INDEX",
        help="the query's slice, counted from the lowest, 0. Default: the middle one",
    )
    search.add_argument("--count", type=int, default=11, metavar="N", help="to find. Default: 11")
    search.add_argument(
        "--elsewhere", action="store_true", help="leave out all slices of the query's own scan"
    )
    _add_weights(search)


def _add_compare(ways: Any) -> None:
    compare = ways.add_parser(
        "compare",
        help="several checkpoints on the same slices, in one page",
        description=_COMPARE,
        epilog=_EPILOG_COMPARE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    compare.set_defaults(way=_compare)
    compare.add_argument("weights", nargs="+", metavar="W", help=_WEIGHTS)
    compare.add_argument(
        "--on",
        nargs="+",
        required=True,
        type=Path,
        metavar="VOLUME",
        help=f"[REQUIRED] {_VOLUME}",
    )
    compare.add_argument(
        "-o", dest="output", required=True, type=Path, metavar="HTML", help="[REQUIRED] page"
    )
    compare.add_argument(
        "--dataset",
        type=Path,
        metavar="DIR",
        help="labelled raw dataset of nnU-Net, on which they are probed too, as by `meddinov3 "
        "probe`",
    )
    _add_size(compare)
    _add_slices(compare, "4")
    _add_place(compare)


def _add_common(parser: argparse.ArgumentParser, slices: str = "12") -> None:
    _add_weights(parser)
    parser.add_argument(
        "-o", dest="output", required=True, type=Path, metavar="OUT", help="[REQUIRED] folder"
    )
    _add_size(parser)
    _add_slices(parser, slices)


def _add_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--size",
        type=int,
        default=896,
        metavar="PIXELS",
        help="along a slice's longer side, in which the backbone sees it; more show finer maps and "
        "take longer. Default: 896",
    )
    parser.add_argument(
        "--tile",
        type=int,
        metavar="PIXELS",
        help="cut larger slices into overlapping tiles of this side, where memory is short; a "
        "tile's patches see only each other. Default: none",
    )


def _add_slices(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--slices",
        default=default,
        metavar="N",
        help=f"of each scan, at even distances, or all. Default: {default}",
    )


def _add_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", required=True, metavar="W", help=f"[REQUIRED] {_WEIGHTS}")
    _add_place(parser)


def _add_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--modality",
        metavar="NAME",
        help="CT, MR, PT, US or XR: that of scans which do not say theirs",
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="Default: auto"
    )
