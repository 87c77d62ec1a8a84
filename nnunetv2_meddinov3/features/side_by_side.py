"""``meddinov3 features compare``: several checkpoints on the same slices, in one page."""

from __future__ import annotations

import io
import string
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from matplotlib.figure import Figure

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.features.basis import Basis, fit_basis, like
from nnunetv2_meddinov3.features.extraction import (
    Extractor,
    Tokens,
    body_patches,
    shown_by_patches,
    unit,
)
from nnunetv2_meddinov3.features.pictures import grey_of, over_anatomy, pixel_aspect
from nnunetv2_meddinov3.features.scans import Scan, choose_slices, find_scans, open_scans
from nnunetv2_meddinov3.files import check_writable
from nnunetv2_meddinov3.html import Block, Code, Picture, Section, Table, Text, write_page
from nnunetv2_meddinov3.pretrain.monitor.health import effective_rank, similarity
from nnunetv2_meddinov3.progress import Progress

_RANK_PATCHES = 2048  # of which an effective rank is computed
_LETTERS = string.ascii_uppercase
_OUTLIER = 2.0  # times the median length of patch tokens
_NUMBERS = {
    "effective rank of cls tokens": "cls_rank",
    "effective rank of patch tokens": "patch_rank",
    "mean cosine between slices (cls)": "cls_similarity",
    "mean cosine between neighbouring patches": "smoothness",
    f"patches longer than {_OUTLIER:g} times the median": "outliers",
}


class _Slice(NamedTuple):
    """A slice that is shown in the page."""

    title: str
    grey: Float[np.ndarray, "height width"]
    body: Bool[np.ndarray, "height width"]
    patches: Bool[np.ndarray, "row column"]  # of the body
    shown: Float[np.ndarray, "row column 3"]
    aspect: float


def compare_features(
    weights: Sequence[str],
    paths: Sequence[Path],
    output: Path,
    *,
    size: int = 896,
    tile: int | None = None,
    slices: int | None = 4,
    dataset: Path | None = None,
    modality: str | None = None,
    device: str = "auto",
) -> list[Path]:
    """Write a page with what several backbones make of the same slices.

    Args:
        weights: Two or more of what ``load_backbone`` takes, or folders of pretraining stages.
        paths: Scans or folders of them.
        output: Page to write.
        size: Pixels along a slice's longer side, in which the backbones see it.
        tile: Side in pixels of the tiles that slices are cut into; None cuts none.
        slices: How many of each scan; None for all.
        dataset: Labelled raw dataset of nnU-Net on which they are probed too.
        modality: Of scans that do not say theirs.
        device: ``auto``, ``cpu`` or ``cuda``.

    Returns:
        The page's path.

    Raises:
        UserError: A mistake in the arguments, or scans that cannot be read.
    """
    check_writable(output.parent)
    if not 2 <= len(set(weights)) == len(weights) <= len(_LETTERS):
        raise UserError(
            f"`features compare` needs from two to {len(_LETTERS)} different weights, got "
            f"{len(weights)}{' with a repetition' if len(set(weights)) < len(weights) else ''}."
        )
    found = find_scans(paths, modality)
    probed = [] if dataset is None else _probe(weights, dataset, device)
    scans = [(scan, choose_slices(scan, slices)) for scan in open_scans(found, modality)]
    pictured: list[_Slice] = []
    tokens: dict[str, list[Tokens]] = {}
    patch_size = 0
    for name in weights:
        extractor = Extractor(name, size, device, tile)
        if patch_size not in (0, extractor.patch_size):
            raise UserError(
                f"weights of one patch size can be compared, but {name} has patches of "
                f"{extractor.patch_size} pixels and {weights[0]} of {patch_size}."
            )
        patch_size = extractor.patch_size
        if not pictured:
            pictured = [_for_page(scan, n, extractor) for scan, chosen in scans for n in chosen]
        tokens[name] = _look(extractor, scans)
        del extractor  # its backbone, before the next is loaded
    sections = [
        Section("Numbers", [_numbers(tokens, pictured), Text(_EXPLAINED)]),
        *probed,
        Section("Principal components", _components(tokens, pictured)),
        Section("Similarity", _similarities(tokens, pictured)),
    ]
    write_page(output, f"{len(weights)} checkpoints side by side", _intro(weights, scans), sections)
    return [output]


_EXPLAINED = (
    "An effective rank (Roy and Vetterli, 2007) is the number of directions that tokens use: 1 "
    "where all are the same. Neighbouring patches of smooth features have a cosine near 1; a low "
    "one is noise, or fine detail. Long tokens, which other patches' information is kept in, spoil "
    "dense features (Darcet et al., 2024)."
)


def _intro(weights: Sequence[str], scans: list[tuple[Scan, list[int]]]) -> list[Block]:
    number = sum(len(chosen) for _, chosen in scans)
    names = ", ".join(scan.name for scan, _ in scans)
    pairs = zip(_LETTERS, weights, strict=False)
    listed = "\n".join(f"{letter}  {name}" for letter, name in pairs)
    return [Code(listed), Text(f"The same {number} slices of {names}.")]


def _look(extractor: Extractor, scans: list[tuple[Scan, list[int]]]) -> list[Tokens]:
    total = sum(len(chosen) for _, chosen in scans)
    with Progress(
        total, "slices", title=extractor.weights, every=10, stream=sys.stderr
    ) as progress:
        found = []
        for scan, chosen in scans:
            for index in chosen:
                found.append(extractor.tokens(scan, index))
                progress.advance()
    return found


def _for_page(scan: Scan, index: int, extractor: Extractor) -> _Slice:
    return _Slice(
        f"{scan.name}, {scan.said(index)}",
        grey_of(scan, index),
        scan.body(index),
        body_patches(scan, index, extractor.grid_size(scan)),
        shown_by_patches(scan, index, extractor),
        pixel_aspect(scan),
    )


def measured(
    tokens: Sequence[Tokens], bodies: Sequence[Bool[np.ndarray, "row column"]]
) -> dict[str, float]:
    """Return numbers on the tokens of some slices, of patches of the body where it is patches."""
    cls = torch.from_numpy(np.stack([each.cls for each in tokens]))
    patches = np.concatenate([t.patches[b] for t, b in zip(tokens, bodies, strict=True)])
    few = np.unique(np.linspace(0, len(patches) - 1, _RANK_PATCHES).round().astype(int))
    lengths = np.linalg.norm(patches, axis=1)
    cosines = [_neighbours(t.patches, body) for t, body in zip(tokens, bodies, strict=True)]
    return {
        "cls_rank": effective_rank(cls),
        "patch_rank": effective_rank(torch.from_numpy(patches[few])),
        "cls_similarity": similarity(cls),
        "smoothness": float(np.concatenate(cosines).mean()),
        "outliers": float((lengths > _OUTLIER * np.median(lengths)).mean()),
    }


def _neighbours(
    patches: Float[np.ndarray, "row column dim"], body: Bool[np.ndarray, "row column"]
) -> Float[np.ndarray, " pair"]:
    """Return the cosines of patches of the body with those below and to the right of them."""
    x = unit(patches)
    below = (x[1:] * x[:-1]).sum(-1)[body[1:] & body[:-1]]
    beside = (x[:, 1:] * x[:, :-1]).sum(-1)[body[:, 1:] & body[:, :-1]]
    return np.concatenate([below, beside])


def _numbers(tokens: dict[str, list[Tokens]], pictured: list[_Slice]) -> Table:
    bodies = [each.patches for each in pictured]
    columns = [measured(found, bodies) for found in tokens.values()]
    rows = [[title, *(f"{each[key]:.3g}" for each in columns)] for title, key in _NUMBERS.items()]
    return Table(["", *_LETTERS[: len(columns)]], rows)


def _probe(weights: Sequence[str], dataset: Path, device: str) -> list[Section]:
    """Probe the weights on labelled slices, before anything else is computed."""
    from nnunetv2_meddinov3.pretrain.probe.comparison import compare, table
    from nnunetv2_meddinov3.pretrain.probe.labelled import ProbeData

    data = ProbeData.from_nnunet(dataset)
    return [Section("Probes", [Code(table(compare(list(weights), data, device=device), data))])]


def _components(tokens: dict[str, list[Tokens]], pictured: list[_Slice]) -> list[Block]:
    """Colour the patches; those of the others are rotated to be like the first ones'."""
    bodies = [each.patches for each in pictured]
    shown = np.concatenate([each.shown[each.patches] for each in pictured])
    first: Basis | None = None
    maps: list[list[np.ndarray]] = []
    for name, found in tokens.items():
        flat = np.concatenate([t.patches[b] for t, b in zip(found, bodies, strict=True)])
        basis = fit_basis(flat, shown, weights=name, patches="of the page")
        basis = basis if first is None else like(basis, first)
        first = first or basis
        maps.append([basis.colours(each.patches).astype(np.float32) for each in found])

    def draw(column: int, row: int) -> np.ndarray:
        each = pictured[row]
        colours = np.where(each.patches[..., None], np.maximum(maps[column][row], 1 / 255), 0)
        return over_anatomy(each.grey, colours.astype(np.float32), each.body)

    text = (
        "The first three principal components of patches of the body as red, green and blue, those "
        "of the others rotated to be as near as possible to those of A."
    )
    alt = f"Slices, and their principal components by {len(tokens)} checkpoints."
    return [Text(text), Picture(_grid(pictured, len(tokens), draw), alt)]


def _similarities(tokens: dict[str, list[Tokens]], pictured: list[_Slice]) -> list[Block]:
    """Draw cosines with the patch in the middle of the body."""
    places = [_middle(each.patches) for each in pictured]
    found = list(tokens.values())

    def draw(column: int, row: int) -> np.ndarray:
        x = unit(found[column][row].patches)
        return x @ x[places[row]]

    text = "The cosine of every patch with the one in the middle of the body (cross), -0.2 to 1."
    alt = f"Slices, and cosines with a patch in the middle by {len(tokens)} checkpoints."
    return [Text(text), Picture(_grid(pictured, len(tokens), draw, places), alt)]


def _middle(body: Bool[np.ndarray, "row column"]) -> tuple[int, int]:
    """Return the patch of the body that is nearest to its middle."""
    places = np.argwhere(body)
    if not len(places):
        return body.shape[0] // 2, body.shape[1] // 2
    row, column = places[np.square(places - places.mean(0)).sum(1).argmin()].tolist()
    return row, column


def _grid(
    pictured: list[_Slice],
    columns: int,
    draw: Callable[[int, int], np.ndarray],
    places: list[tuple[int, int]] | None = None,
) -> bytes:
    """Draw slices as rows, and what each checkpoint makes of them as columns."""
    rows = len(pictured)
    tallest = max(each.aspect * each.grey.shape[0] / each.grey.shape[1] for each in pictured)
    figure = Figure(
        figsize=(2.6 * (columns + 1), (2.6 * tallest + 0.3) * rows), layout="constrained"
    )
    axes: np.ndarray = figure.subplots(rows, columns + 1, squeeze=False)
    for axis in axes.ravel():
        axis.set_axis_off()
    for row, each in enumerate(pictured):
        axes[row, 0].imshow(each.grey, cmap="gray", vmin=0, vmax=1, aspect=each.aspect)
        axes[row, 0].set_title(each.title, fontsize=7)
        height, width = each.grey.shape
        for column in range(columns):
            axis = axes[row, column + 1]
            axis.imshow(
                draw(column, row),
                cmap="magma",
                vmin=-0.2,
                vmax=1,
                extent=(-0.5, width - 0.5, height - 0.5, -0.5),
                aspect=each.aspect,
                interpolation="nearest",
            )
            if not row:
                axis.set_title(_LETTERS[column], fontsize=9)
            if places is not None:
                y, x = (
                    (p + 0.5) * n / c - 0.5
                    for p, n, c in zip(
                        places[row], (height, width), each.patches.shape, strict=True
                    )
                )
                axis.plot(x, y, "+", color="#44dd88", markersize=9)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return data.getvalue()
