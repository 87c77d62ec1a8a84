"""``meddinov3 features extract``: tokens of scans in files, for retrieval and probing."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from nnunetv2_meddinov3.curate.volume import VolumeSource
from nnunetv2_meddinov3.features.extraction import Extractor
from nnunetv2_meddinov3.features.npz import Damaged, read_npz, write_npz
from nnunetv2_meddinov3.features.pictures import grey_of, pixel_aspect
from nnunetv2_meddinov3.features.scans import Scan, choose_slices, find_scans, open_scans
from nnunetv2_meddinov3.files import check_writable
from nnunetv2_meddinov3.progress import Progress
from nnunetv2_meddinov3.store.fingerprints import source_sha256

ENDING = "_features.npz"
THUMBNAIL = 128  # pixels
_VERSION = 1


def extract(
    paths: Sequence[Path],
    weights: str,
    output: Path,
    *,
    size: int = 896,
    tile: int | None = None,
    slices: int | None = None,
    with_patches: bool = True,
    batch: int | None = None,
    modality: str | None = None,
    device: str = "auto",
) -> list[Path]:
    """Write the tokens of each scan to a file; those that are there from before are left alone.

    A file holds ``cls`` (S, D) and ``patches`` (S, rows, columns, D) in fp16, ``slices`` (S,),
    ``pictures`` of the slices, and in ``facts`` a text of JSON: the scan, ``spacing_mm``,
    ``affine`` (from slice, row and column of a patch to mm in RAS), the weights, and the size.

    Args:
        paths: Scans or folders of them.
        weights: Anything that ``load_backbone`` takes, or the folder of a pretraining stage.
        output: Folder of the results.
        size: Pixels along a slice's longer side, in which the backbone sees it.
        tile: Side in pixels of the tiles that slices are cut into; None cuts none.
        slices: How many of each scan; None for all.
        with_patches: Whether patch tokens are written beside cls tokens.
        batch: Slices that the backbone sees together; by default 8 on a GPU and 1 on a CPU.
        modality: Of scans that do not say theirs.
        device: ``auto``, ``cpu`` or ``cuda``.

    Returns:
        The files of all scans that could be read, also of those that were there.

    Raises:
        UserError: A mistake in the arguments, or scans that cannot be read.
    """
    check_writable(output)
    found = find_scans(paths, modality)
    extractor = Extractor(weights, size, device, tile)
    together = batch or (8 if extractor.device.type == "cuda" else 1)
    wanted = {
        "version": _VERSION, "weights": extractor.identity, "size": size,
        "asked": slices, "patches": with_patches, "modality_stated": modality,
    }  # fmt: skip
    if tile is not None:  # files of before have no such key
        wanted["tile"] = tile
    left: list[tuple[str, VolumeSource]] = []
    hashes: dict[str, str] = {}
    for name, source in found:
        hashes[name] = source_sha256(source.paths)
        if facts_of(output / f"{name}{ENDING}") != {**wanted, "sha256": hashes[name]}:
            left.append((name, source))
    there = len(found) - len(left)
    if there:
        print(f"{there} of {len(found)} scans are there from before", file=sys.stderr)
    output.mkdir(parents=True, exist_ok=True)
    done = {name for name, _ in found} - {name for name, _ in left}
    for scan in open_scans(left, modality) if left else ():
        facts = {**wanted, "sha256": hashes[scan.name]}
        _extract(scan, extractor, choose_slices(scan, slices), together, facts, output)
        done.add(scan.name)
    return [output / f"{name}{ENDING}" for name, _ in found if name in done]


def facts_of(path: Path) -> dict[str, Any] | None:
    """Return what decides whether a file need not be made again; None if there is no whole one."""
    try:
        facts, _ = read_npz(path, ("cls", "slices", "pictures"))
    except Damaged:
        return None
    return facts.get("made_from")


def _extract(
    scan: Scan,
    extractor: Extractor,
    indices: list[int],
    together: int,
    made_from: dict[str, Any],
    output: Path,
) -> None:
    """Look at slices of a scan, a few together, and write its file."""
    cls, patches = [], []
    with Progress(len(indices), "slices", title=scan.name, every=10, stream=sys.stderr) as progress:
        for start in range(0, len(indices), together):
            few = indices[start : start + together]
            for tokens in extractor.tokens_of(scan, few):
                cls.append(tokens.cls.astype(np.float16))
                if made_from["patches"]:
                    patches.append(tokens.patches.astype(np.float16))
            progress.advance(units=len(few))
    facts = {
        "made_from": made_from,
        "scan": scan.name,
        "modality": scan.modality,
        "spacing_mm": scan.spacing,
        "affine": None if scan.grid is None else patch_affine(scan, extractor).tolist(),
        "positions_mm": _positions(scan, indices),
        "grid": extractor.grid_size(scan),
        "patch_size": extractor.patch_size,
        "weights": extractor.weights,
    }
    pictures = np.stack([thumbnail(scan, index) for index in indices])
    arrays = {"cls": np.stack(cls), "slices": np.array(indices), "pictures": pictures}
    if patches:
        arrays["patches"] = np.stack(patches)
    write_npz(output / f"{scan.name}{ENDING}", facts, arrays)


def thumbnail(scan: Scan, index: int) -> UInt8[np.ndarray, "height width"]:
    """Return a small picture of a slice, its longer side of ``THUMBNAIL`` pixels."""
    height, width = scan.slices.shape[1:]
    height = round(height * pixel_aspect(scan))
    share = THUMBNAIL / max(height, width)
    size = max(1, round(width * share)), max(1, round(height * share))
    grey = np.rint(255 * grey_of(scan, index)).astype(np.uint8)
    return np.asarray(Image.fromarray(grey).resize(size))


def _positions(scan: Scan, indices: list[int]) -> list[float] | None:
    if scan.positions_mm is None:
        return None
    return [float(scan.positions_mm[index]) for index in indices]


def patch_affine(scan: Scan, extractor: Extractor) -> np.ndarray:
    """Return the matrix (4, 4) from slice, row and column of a patch to mm in RAS, its middle."""
    height, width = scan.slices.shape[1:]
    corners = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    first, *others = (scan.position_of(tuple(corner)) for corner in corners.tolist())
    pixels = np.eye(4)
    pixels[:3, 3] = first
    for axis, other in enumerate(others):
        pixels[:3, axis] = other - first
    patches = np.eye(4)
    for axis, (side, count) in enumerate(
        zip((height, width), extractor.grid_size(scan), strict=True), start=1
    ):
        patches[axis, axis] = side / count
        patches[axis, 3] = 0.5 * side / count - 0.5
    return pixels @ patches
