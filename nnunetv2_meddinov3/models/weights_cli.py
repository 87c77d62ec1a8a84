"""``meddinov3 weights inspect|convert|fetch``: look at weights, rewrite them, download them."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2_meddinov3.errors import UserError

if TYPE_CHECKING:
    from nnunetv2_meddinov3.models.weights import Checkpoint

_SOURCE_HELP = "a path, timm:NAME, hf:OWNER/REPO/FILE[@REV] or torchhub:ENTRY[@REPO_DIR][=FILE]"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of ``meddinov3 weights``."""
    parser = argparse.ArgumentParser(
        prog="meddinov3 weights", description="Inspect, convert or download weights."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="inspect|convert|fetch")
    inspect = verbs.add_parser("inspect", help="show what a file holds, and check every tensor")
    inspect.add_argument("source", help=_SOURCE_HELP)
    inspect.add_argument("--json", action="store_true", help="print JSON")
    convert = verbs.add_parser("convert", help="write any source as one safetensors file")
    convert.add_argument("source", help=_SOURCE_HELP)
    convert.add_argument("output", help="file to write, ending in .safetensors")
    convert.add_argument("--overwrite", action="store_true", help="replace an existing file")
    for verb in (inspect, convert):
        verb.add_argument("--branch", help="backbone of a training checkpoint (default: teacher)")
        verb.add_argument(
            "--norm-eps", type=float, help="LayerNorm epsilon, if the default is wrong"
        )
        verb.add_argument("--rope-dtype", choices=("fp32", "bf16"), help="default: fp32")
        verb.add_argument(
            "--num-heads", type=int, help="attention heads, if the file has no periods"
        )
    fetch = verbs.add_parser("fetch", help="download timm: or hf: weights to a file")
    fetch.add_argument("source", help="timm:NAME or hf:OWNER/REPO/FILE[@REV]")
    fetch.add_argument("output", nargs="?", help="copy to this file (default: the hub's cache)")
    fetch.add_argument("--overwrite", action="store_true", help="replace an existing file")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``meddinov3 weights``.

    Raises:
        UserError: If a source cannot be read, or a target must not be written.
    """
    args = build_parser().parse_args(argv)
    {"inspect": _inspect, "convert": _convert, "fetch": _fetch}[args.verb](args)


def _read(args: argparse.Namespace) -> "Checkpoint":
    from nnunetv2_meddinov3.models.weights import resolve_source

    names = ("norm_eps", "rope_dtype", "num_heads")
    given = {n: getattr(args, n) for n in names if getattr(args, n) is not None}
    return resolve_source(args.source, branch=args.branch, **given)


def _inspect(args: argparse.Namespace) -> None:
    checkpoint = _read(args)
    facts: dict[str, Any] = {
        "source": checkpoint.source,
        "format": checkpoint.layout,
        "architecture": checkpoint.architecture.to_dict(),
        "parameters": sum(t.numel() for n, t in checkpoint.tensors.items() if n != "rope.periods"),
        "tensors": len(checkpoint.tensors),
        "left_out": checkpoint.dropped,
        "licence": checkpoint.licence,
        "metadata": {
            k: v for k, v in checkpoint.metadata.items() if k not in ("architecture", "licence")
        },
    }
    if args.json:
        print(json.dumps(facts, indent=2))
        return
    print(f"{facts['source']}\n  format        {facts['format']}")
    for name, value in facts["architecture"].items():
        print(f"  {name:13} {value}")
    millions = facts["parameters"] / 1e6
    print(f"  tensors       {facts['tensors']}, all finite; {millions:.1f} M parameters")
    if checkpoint.dropped:
        from nnunetv2_meddinov3.models.formats import listing

        print(f"  left out      {len(checkpoint.dropped)}: {listing(checkpoint.dropped)}")
    print(f"  licence       {facts['licence']}")
    for name, value in facts["metadata"].items():
        print(f"  {name:13} {json.dumps(value)}")


def _check_target(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise UserError(f"{path} already exists: choose another name, or pass --overwrite.")
    if not path.absolute().parent.is_dir():
        raise UserError(f"the folder of {path} must exist: create it, or choose another one.")


def _convert(args: argparse.Namespace) -> None:
    from nnunetv2_meddinov3.models.build import backbone_from, save_backbone

    output = Path(args.output).expanduser()
    if output.suffix != ".safetensors":
        raise UserError(f"the output must end in .safetensors, got {args.output}.")
    _check_target(output, args.overwrite)
    checkpoint = _read(args)
    facts = {k: v for k, v in checkpoint.metadata.items() if k not in ("architecture", "licence")}
    facts.setdefault("base_model", checkpoint.source)
    save_backbone(backbone_from(checkpoint), output, licence=checkpoint.licence, **facts)
    print(f"{checkpoint.report()}\nwritten to {output}\nlicence: {checkpoint.licence}")


def _fetch(args: argparse.Namespace) -> None:
    from nnunetv2_meddinov3.files import copy_file
    from nnunetv2_meddinov3.models.resolve import fetch, parse_source
    from nnunetv2_meddinov3.models.weights import read_checkpoint

    if parse_source(args.source).kind not in ("timm", "hf"):
        raise UserError(f"only timm: and hf: sources can be fetched, got {args.source!r}.")
    if args.output:
        _check_target(Path(args.output).expanduser(), args.overwrite)
    path = fetch(args.source)
    checkpoint = read_checkpoint(path, source=args.source)  # a damaged download is found here
    if args.output:
        target = Path(args.output).expanduser()
        copy_file(path, target)
        path = target
    print(f"{checkpoint.report()}\nfile: {path}\nlicence: {checkpoint.licence}")
