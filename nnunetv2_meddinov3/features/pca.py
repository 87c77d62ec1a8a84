"""``meddinov3 features pca``: what a backbone tells apart, as colours over the anatomy."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from nnunetv2_meddinov3.features.basis import FILE, Basis, fit_basis, like
from nnunetv2_meddinov3.features.extraction import (
    Extractor,
    body_patches,
    patch_of_pixels,
    shown_by_patches,
)
from nnunetv2_meddinov3.features.pictures import draw_montage, write_colours
from nnunetv2_meddinov3.features.scans import Scan, choose_slices, find_scans, open_scans
from nnunetv2_meddinov3.files import check_writable
from nnunetv2_meddinov3.progress import Progress

_DARKEST = 1 / 255  # of the body: black is what was not looked at
_FIT_SLICES = 16  # over all scans, to which the basis is fitted


class _Looked(NamedTuple):
    """A slice that was looked at."""

    tokens: Float[np.ndarray, "row column dim"]
    body: Bool[np.ndarray, "row column"]


def pca(
    paths: Sequence[Path],
    weights: str,
    output: Path,
    *,
    size: int = 896,
    tile: int | None = None,
    slices: int | None = 12,
    at: Sequence[int] = (),
    like_folder: Path | None = None,
    modality: str | None = None,
    device: str = "auto",
) -> list[Path]:
    """Write maps of principal components of the patches of scans: a picture and a NIfTI of each.

    One basis is fitted to patches of the body over slices of all scans, so that a colour means the
    same in all of them.

    Args:
        paths: Scans or folders of them.
        weights: Anything that ``load_backbone`` takes, or the folder of a pretraining stage.
        output: Folder of the results.
        size: Pixels along a slice's longer side, in which the backbone sees it.
        tile: Side in pixels of the tiles that slices are cut into; None cuts none.
        slices: How many of each scan; None for all.
        at: Numbers of slices instead, counted from the lowest.
        like_folder: Output of an earlier command whose colours are to be kept.
        modality: Of scans that do not say theirs.
        device: ``auto``, ``cpu`` or ``cuda``.

    Returns:
        What was written.

    Raises:
        UserError: A mistake in the arguments, or scans that cannot be read.
    """
    check_writable(output)
    other = None if like_folder is None else Basis.load(like_folder)
    found = find_scans(paths, modality)
    extractor = Extractor(weights, size, device, tile)
    looking = _Looking(extractor, slices, at, each=max(1, _FIT_SLICES // len(found)))
    only = list(open_scans(found, modality)) if len(found) == 1 else None
    for scan in only or open_scans(found, modality):
        looking.take(scan)
    fitted = looking.fit()
    basis = fitted if other is None else like(fitted, other)
    output.mkdir(parents=True, exist_ok=True)
    written = []
    again = [(name, source) for name, source in found if name in looking.chosen]
    for scan in only or open_scans(again, modality):
        written += _write(scan, looking.maps(scan, basis), extractor, output)
    basis.save(output / FILE)
    return [*written, output / FILE]


def _tiled(extractor: Extractor) -> str:
    return "" if extractor.tile is None else f" in tiles of {extractor.tile}"


class _Looking:
    """Looks at slices once: first at those that the basis is fitted to, which are kept.

    Args:
        extractor: The backbone.
        slices: How many of each scan; None for all.
        at: Numbers of slices instead.
        each: How many of each scan the basis is fitted to.
    """

    def __init__(
        self, extractor: Extractor, slices: int | None, at: Sequence[int], each: int
    ) -> None:
        self.extractor, self.slices, self.at, self.each = extractor, slices, at, each
        self.chosen: dict[str, list[int]] = {}
        self._kept: dict[tuple[str, int], _Looked] = {}
        self._tokens: list[np.ndarray] = []
        self._shown: list[np.ndarray] = []
        self._digest = hashlib.sha256(f"{extractor.size}{_tiled(extractor)}".encode())

    def take(self, scan: Scan) -> None:
        """Choose slices of a scan, and look at some of them for the basis."""
        chosen = self.chosen[scan.name] = choose_slices(scan, self.slices, self.at)
        places = np.linspace(0, len(chosen) - 1, min(self.each, len(chosen))).round().astype(int)
        with Progress(
            len(places), "slices", title=f"{scan.name}, basis", every=5, stream=sys.stderr
        ) as progress:
            for place in places.tolist():
                index = chosen[place]
                looked = self._kept[scan.name, index] = self._look(scan, index)
                self._tokens.append(looked.tokens[looked.body])
                self._shown.append(shown_by_patches(scan, index, self.extractor)[looked.body])
                self._digest.update(scan.slices[index].tobytes())
                progress.advance()

    def fit(self) -> Basis:
        """Fit the basis to patches of the body.

        Raises:
            UserError: If there are too few.
        """
        tokens, shown = np.concatenate(self._tokens), np.concatenate(self._shown)
        return fit_basis(
            tokens,
            shown,
            weights=self.extractor.identity,
            patches=self._digest.hexdigest(),
        )

    def maps(self, scan: Scan, basis: Basis) -> dict[int, Float[np.ndarray, "row column 3"]]:
        """Return the colours of the chosen slices of a scan, black where no body is."""
        found: dict[int, np.ndarray] = {}
        chosen = self.chosen[scan.name]
        left = sum((scan.name, index) not in self._kept for index in chosen)
        with Progress(left, "slices", title=scan.name, every=10, stream=sys.stderr) as progress:
            for index in chosen:
                looked = self._kept.pop((scan.name, index), None)
                if looked is None:
                    looked = self._look(scan, index)
                    progress.advance()
                colours = np.maximum(basis.colours(looked.tokens), _DARKEST)
                found[index] = np.where(looked.body[..., None], colours, 0).astype(np.float32)
        return found

    def _look(self, scan: Scan, index: int) -> _Looked:
        tokens = self.extractor.tokens(scan, index).patches
        return _Looked(tokens, body_patches(scan, index, self.extractor.grid_size(scan)))


def _write(
    scan: Scan,
    maps: dict[int, Float[np.ndarray, "row column 3"]],
    extractor: Extractor,
    output: Path,
) -> list[Path]:
    """Write the picture of a scan, and its NIfTI where it has a geometry."""
    picture = output / f"{scan.name}_pca.png"
    draw_montage(scan, maps, picture)
    if scan.grid is None:
        return [picture]
    voxels = np.zeros((*scan.slices.shape, 3), np.uint8)
    rows, columns = patch_of_pixels(scan.slices.shape[1:], extractor.grid_size(scan))
    for index, colours in maps.items():
        whole = np.rint(255 * colours).astype(np.uint8)
        voxels[index] = whole[rows[:, None], columns]
    path = output / f"{scan.name}_pca.nii.gz"
    write_colours(scan, voxels, path)
    return [picture, path]
