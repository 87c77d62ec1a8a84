"""``meddinov3 features similarity``: where else a scan looks like one place, to a backbone."""

from __future__ import annotations

import base64
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float, Int8
from jinja2 import Environment, FileSystemLoader
from PIL import Image

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.features.extraction import Extractor, patch_of_pixels, unit
from nnunetv2_meddinov3.features.pictures import grey_of, pixel_aspect, write_scalar
from nnunetv2_meddinov3.features.scans import Scan, choose_slices, find_scans, open_scans
from nnunetv2_meddinov3.files import check_writable, write_text
from nnunetv2_meddinov3.progress import Progress

PAGE = "similarity.html"
_DIMS = (64, 128, 256)  # of the tokens in the page, the fewest that are near enough
_NEAR = 0.02  # of the cosine
_FIT_PATCHES = 20_000  # from which these dimensions are found
_MOST_BYTES = 400e6  # of a page: more than this no browser opens gladly
_PICTURE_SIDE = 768  # pixels of a slice in the page, at most
_COLOURS = "magma"


@dataclass
class _Seen:
    """The slices of a scan that were looked at."""

    scan: Scan
    indices: list[int]
    tokens: Float[np.ndarray, "slice row column dim"]  # of length 1


def similarity(
    path: Path,
    point: tuple[float, float, float],
    weights: str,
    output: Path,
    *,
    in_mm: bool = False,
    others: Sequence[Path] = (),
    size: int = 896,
    tile: int | None = None,
    slices: int | None = 12,
    modality: str | None = None,
    device: str = "auto",
) -> list[Path]:
    """Write maps of cosines with the patch at a point: NIfTIs of the scans, and a page to click in.

    Args:
        path: The scan that the point is in.
        point: Voxel (x, y, z) of its file, counted from 0; in pictures z is the number of one.
        weights: Anything that ``load_backbone`` takes, or the folder of a pretraining stage.
        output: Folder of the results.
        in_mm: Whether the point is a position in mm, RAS as NIfTI and most viewers have it.
        others: More scans to be compared with the patch.
        size: Pixels along a slice's longer side, in which the backbone sees it.
        tile: Side in pixels of the tiles that slices are cut into; None cuts none.
        slices: How many of each scan, beside the one with the point; None for all.
        modality: Of scans that do not say theirs.
        device: ``auto``, ``cpu`` or ``cuda``.

    Returns:
        What was written.

    Raises:
        UserError: A mistake in the arguments, or scans that cannot be read.
    """
    check_writable(output)
    first = find_scans([path], modality)
    if len(first) != 1:
        raise UserError(
            f"VOLUME must be one scan, which the point is in, but {path} holds {len(first)}: name "
            "one of them, and the others after --to."
        )
    found = find_scans([path, *others], modality)
    key = first[0][1].key
    found.sort(key=lambda each: each[1].key != key)
    extractor = Extractor(weights, size, device, tile)
    seen: list[_Seen] = []
    place = (0, 0, 0)
    for scan in open_scans(found, modality):
        chosen = choose_slices(scan, slices)
        if not seen:
            place = scan.place_of(point, in_mm)
            if place[0] in scan.unusable:
                raise UserError(
                    f"--point must lie in a slice that shows something, but {scan.said(place[0])} "
                    f"of {scan.name} shows nothing: choose another place."
                )
            chosen = sorted({*chosen, place[0]})
        _check_size(seen, extractor, scan, len(chosen))
        seen.append(_look(extractor, scan, chosen))
    start = _start(seen[0], place)
    wanted = seen[0].tokens[start]
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for each in seen:
        if each.scan.grid is not None:
            written.append(output / f"{each.scan.name}_similarity.nii.gz")
            write_scalar(each.scan, _voxels(each, each.tokens @ wanted), written[-1])
    written.append(output / PAGE)
    _write_page(seen, start, extractor, written[-1])
    return written


def _check_size(seen: list[_Seen], extractor: Extractor, scan: Scan, slices: int) -> None:
    patches = sum(each.tokens[..., 0].size for each in seen)
    patches += slices * int(np.prod(extractor.grid_size(scan)))
    if (n_bytes := patches * _DIMS[0] * 4 / 3) > _MOST_BYTES:
        raise UserError(
            f"a page must be small enough for a browser, but these slices make one of about "
            f"{n_bytes / 1e6:.0f} MB: make --slices or --size smaller."
        )


def _look(extractor: Extractor, scan: Scan, indices: list[int]) -> _Seen:
    tokens = []
    with Progress(len(indices), "slices", title=scan.name, every=10, stream=sys.stderr) as progress:
        for index in indices:
            tokens.append(unit(extractor.tokens(scan, index).patches))
            progress.advance()
    return _Seen(scan, indices, np.stack(tokens))


def _start(seen: _Seen, place: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return the number of the slice among those looked at, and row and column of the patch."""
    index, row, column = place
    rows, columns = patch_of_pixels(seen.scan.slices.shape[1:], seen.tokens.shape[1:3])
    return seen.indices.index(index), int(rows[row]), int(columns[column])


def _voxels(seen: _Seen, cosines: Float[np.ndarray, "slice row column"]) -> np.ndarray:
    """Return the cosine of each pixel's patch; 0 in slices that were not looked at."""
    rows, columns = patch_of_pixels(seen.scan.slices.shape[1:], seen.tokens.shape[1:3])
    voxels = np.zeros(seen.scan.slices.shape, np.float32)
    for index, own in zip(seen.indices, cosines, strict=True):
        voxels[index] = own[rows[:, None], columns]
    return voxels


def _write_page(
    seen: list[_Seen], start: tuple[int, int, int], extractor: Extractor, path: Path
) -> None:
    small, error = reduced([each.tokens for each in seen])
    number, row, column = start
    data = {
        "dims": small[0].shape[-1],
        "colours": _base64(_table().tobytes()),
        "start": {
            "scan": 0, "slice": number, "row": row, "column": column,
            "toScan": min(1, len(seen) - 1), "toSlice": number if len(seen) == 1 else 0,
        },
        "scans": [_for_page(each, tokens) for each, tokens in zip(seen, small, strict=True)],
    }  # fmt: skip
    # "</" would end the script; in JSON "<\/" is the same
    text = json.dumps(data).replace("</", "<\\/")
    note = (
        f"Weights: {extractor.weights}; slices of {extractor.size} pixels, patches of "
        f"{extractor.patch_size}. Of each patch the page has {small[0].shape[-1]} numbers of 8 "
        f"bits instead of {extractor.backbone.embed_dim} of 32: cosines differ by up to "
        f"{error:.3f} from those in the NIfTI (of 20,000 pairs). The page is about "
        f"{len(text) / 1e6:.1f} MB and needs no other file."
    )
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    title = "Patches like one patch: " + ", ".join(each.scan.name for each in seen)
    page = environment.get_template(PAGE).render(title=title, note=note, data=text)
    write_text(path, page)


def reduced(
    tokens: Sequence[Float[np.ndarray, "slice row column dim"]],
) -> tuple[list[Int8[np.ndarray, "slice row column small"]], float]:
    """Return tokens of fewer dimensions and bits, whose cosines are nearly the same.

    Args:
        tokens: Of length 1.

    Returns:
        The tokens in the directions in which they are longest, scaled one by one to 8 bits; and the
        largest error of the cosine in 20,000 random pairs.
    """
    flat = np.concatenate([each.reshape(-1, each.shape[-1]) for each in tokens])
    generator = np.random.default_rng(0)
    few = flat[generator.permutation(len(flat))[:_FIT_PATCHES]].astype(np.float64)
    _, vectors = np.linalg.eigh(few.T @ few)
    axes = vectors[:, ::-1].astype(np.float32)
    pairs = generator.integers(len(flat), size=(2, _FIT_PATCHES))
    wanted = _cosines(flat, pairs)
    whole = flat.shape[1]
    small, error = flat.astype(np.int8), np.inf
    for dims in [*(n for n in _DIMS if n < whole), whole]:
        if np.isfinite(error) and len(flat) * dims * 4 / 3 > _MOST_BYTES:
            break
        small = _bytes(flat @ axes[:, :dims])
        error = float(np.abs(_cosines(small.astype(np.float32), pairs) - wanted).max())
        if error <= _NEAR:
            break
    ends = np.cumsum([each[..., 0].size for each in tokens])[:-1]
    parts = zip(np.split(small, ends), tokens, strict=True)
    return [part.reshape(*each.shape[:3], -1) for part, each in parts], error


def _bytes(tokens: Float[np.ndarray, "patch dim"]) -> Int8[np.ndarray, "patch dim"]:
    """Return tokens scaled one by one to whole numbers of 8 bits."""
    peak = np.maximum(np.abs(tokens).max(-1, keepdims=True), 1e-9)
    return np.rint(127 * tokens / peak).astype(np.int8)


def _cosines(tokens: Float[np.ndarray, "patch dim"], pairs: np.ndarray) -> np.ndarray:
    a, b = (tokens[each] for each in pairs)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.einsum("nd,nd->n", a, b) / np.maximum(norms, 1e-9)


def _for_page(seen: _Seen, tokens: Int8[np.ndarray, "slice row column small"]) -> dict[str, Any]:
    scan = seen.scan
    height, width = scan.slices.shape[1:]
    height = round(height * pixel_aspect(scan))
    share = min(1, _PICTURE_SIDE / max(height, width))
    size = (max(1, round(width * share)), max(1, round(height * share)))
    return {
        "name": scan.name,
        "rows": tokens.shape[1],
        "columns": tokens.shape[2],
        "width": size[0],
        "height": size[1],
        "tokens": _base64(tokens.tobytes()),
        "slices": [
            {"said": scan.said(index), "jpeg": _base64(_jpeg(grey_of(scan, index), size))}
            for index in seen.indices
        ],
    }


def _jpeg(grey: Float[np.ndarray, "height width"], size: tuple[int, int]) -> bytes:
    picture = Image.fromarray(np.rint(255 * grey).astype(np.uint8)).resize(size)
    data = io.BytesIO()
    picture.save(data, format="jpeg", quality=90)
    return data.getvalue()


def _table() -> np.ndarray:
    """Return 256 colours, (256, 3) bytes."""
    colours = matplotlib.colormaps[_COLOURS](np.arange(256))
    return np.rint(255 * colours[:, :3]).astype(np.uint8)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
