"""``meddinov3 features search``: the slices of a folder that a backbone takes for most like one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from nnunetv2_meddinov3.errors import UserError, first_line
from nnunetv2_meddinov3.features.extract import ENDING, thumbnail
from nnunetv2_meddinov3.features.extraction import Extractor, unit
from nnunetv2_meddinov3.features.npz import Damaged, read_npz
from nnunetv2_meddinov3.features.scans import choose_slices, find_scans, open_scans
from nnunetv2_meddinov3.files import check_writable, replacing
from nnunetv2_meddinov3.store.fingerprints import source_sha256

_COLUMNS = 6


class Hit(NamedTuple):
    """A slice that was found.

    Attributes:
        cosine: Of its cls token with the query's.
        scan: Its name.
        slice: Its number, counted from the lowest.
        picture: Of the slice, (height, width) bytes.
    """

    cosine: float
    scan: str
    slice: int
    picture: np.ndarray


def search(
    query: Path,
    folder: Path,
    weights: str,
    output: Path,
    *,
    at: int | None = None,
    count: int = 11,
    elsewhere: bool = False,
    modality: str | None = None,
    device: str = "auto",
) -> list[Hit]:
    """Find the slices of a folder that are most like one, and draw them.

    Args:
        query: A scan.
        folder: Output of ``features extract`` with the same weights.
        weights: Those weights.
        output: PNG to write.
        at: Number of the query's slice, counted from the lowest; by default the middle one.
        count: Slices to find.
        elsewhere: Leave out the other slices of the query's scan too, its neighbours before all.
        modality: Of a query that does not say its own.
        device: ``auto``, ``cpu`` or ``cuda``.

    Returns:
        What was found, the nearest first. The query itself is left out.

    Raises:
        UserError: A mistake in the arguments, or files that cannot be read.
    """
    check_writable(output.parent)
    files = sorted(folder.glob(f"*{ENDING}"))
    if not files:
        raise UserError(
            f"FOLDER must be an output of `meddinov3 features extract`, but {folder} holds no "
            f"*{ENDING}."
        )
    read = [_read(path) for path in files]
    found = find_scans([query], modality)
    if len(found) != 1:
        raise UserError(f"QUERY must be one scan, but {query} holds {len(found)}.")
    made = {(f["made_from"]["size"], f["made_from"].get("tile")) for _, f in read}
    if len(made) != 1:
        said = sorted(f"{size} in tiles of {tile}" if tile else str(size) for size, tile in made)
        raise UserError(
            f"FOLDER must be of one --size and --tile, but {folder} has files of "
            f"{' and '.join(said)}: extract the scans again with one."
        )
    ((size, tile),) = made
    extractor = Extractor(weights, size, device, tile)
    if strange := [p for p, (_, f) in zip(files, read, strict=True) if not _same(f, extractor)]:
        raise UserError(
            f"FOLDER must be made with the weights of the search, but {strange[0]} was made with "
            f"others than {weights}."
        )
    (scan,) = open_scans(found, modality)
    (index,) = choose_slices(scan, 1, () if at is None else (at,))
    wanted = unit(extractor.tokens(scan, index).cls)
    sha256 = source_sha256(found[0][1].paths)
    hits: list[Hit] = []
    for arrays, facts in read:
        own = facts["made_from"]["sha256"] == sha256
        cosines = unit(arrays["cls"].astype(np.float32)) @ wanted
        for n, number in enumerate(arrays["slices"].tolist()):
            if not (own and (elsewhere or number == index)):
                hits.append(Hit(float(cosines[n]), facts["scan"], number, arrays["pictures"][n]))
    if not hits:
        raise UserError(
            f"FOLDER must hold other slices than the query's, but {folder} holds none: extract "
            "more scans into it."
        )
    nearest = sorted(hits, key=lambda hit: (-hit.cosine, hit.scan, hit.slice))[:count]
    _draw(thumbnail(scan, index), f"query: {scan.name}, {scan.said(index)}", nearest, output)
    return nearest


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    try:
        facts, arrays = read_npz(path, ("cls", "slices", "pictures"))
        if not {"size", "weights", "sha256"} <= set(facts["made_from"]):
            raise Damaged("its facts are not all there")
    except (Damaged, KeyError, TypeError) as error:
        raise UserError(
            f"{path} must be a whole file of `features extract`, but it cannot be read "
            f"({first_line(error)}): extract the scan again."
        ) from error
    return arrays, facts


def _same(facts: dict[str, Any], extractor: Extractor) -> bool:
    return facts["made_from"]["weights"] == extractor.identity


def _draw(query: np.ndarray, said: str, hits: list[Hit], path: Path) -> None:
    """Draw the query and then what was found.

    Raises:
        UserError: If it cannot be written.
    """
    columns = min(_COLUMNS, len(hits) + 1)
    lines = -(-(len(hits) + 1) // columns)
    figure = Figure(figsize=(2.2 * columns, 2.5 * lines), layout="constrained")
    axes: np.ndarray = figure.subplots(lines, columns, squeeze=False)
    for axis in axes.ravel():
        axis.set_axis_off()
    titles = [f"{h.scan}, slice {h.slice}\ncosine {h.cosine:.3f}" for h in hits]
    pictures = [query, *(hit.picture for hit in hits)]
    for axis, picture, title in zip(axes.ravel(), pictures, [said, *titles], strict=False):
        axis.imshow(picture, cmap="gray", vmin=0, vmax=255)
        axis.set_title(title, fontsize=7, wrap=True)
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=130)
