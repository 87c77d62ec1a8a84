"""What ``--exclude`` names, read: the hashes of slices that must not enter."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2_meddinov3.curate.discover import find_sources
from nnunetv2_meddinov3.curate.modalities import identify
from nnunetv2_meddinov3.curate.orient import reorient
from nnunetv2_meddinov3.curate.readers import read
from nnunetv2_meddinov3.curate.slices import in_another_way, stack_slices
from nnunetv2_meddinov3.curate.volume import Unreadable
from nnunetv2_meddinov3.errors import UserError, first_line
from nnunetv2_meddinov3.store.fingerprints import perceptual_hash, slice_sha256
from nnunetv2_meddinov3.store.index import read_records
from nnunetv2_meddinov3.store.layout import INDEX, MANIFEST, STORE, read_options
from nnunetv2_meddinov3.store.records import VolumeRecord

_LIST_LINE = re.compile(r"([0-9a-fA-F]{64})(?:[\s,]+([0-9a-fA-F]{16}))?(?:[\s,].*)?")
Range = tuple[float, float, float]
"""Smallest, largest and mean value of a slice, which turning it leaves as they are."""


@dataclass(frozen=True)
class Excluded:
    """What is known of a slice that must not enter; of a line in a list of hashes not all is."""

    sha256: str
    phash: str | None
    range: Range | None


def read_excluded(argument: Path) -> tuple[str, list[Excluded], int | None]:
    """Return the name of an exclusion, its slices, and its number of volumes if it has any."""
    path = Path(argument)
    name = path.resolve().name
    if not path.exists():
        raise UserError(f"--exclude must name what exists, but {path} does not: check the path.")
    if path.is_file() and path.name in {STORE, MANIFEST, INDEX}:
        path = path.parent
        name = path.resolve().name
    if (path / STORE).is_file():
        return name, *_slices_of_store(path)
    if path.is_file() and path.suffix in {".txt", ".csv", ".sha256"}:
        return name, _slices_of_list(path), None
    tests = path / "imagesTs"
    if (path / "dataset.json").is_file() and tests.is_dir() and any(tests.iterdir()):
        return f"{name}/imagesTs", *_slices_of_volumes(tests)
    return name, *_slices_of_volumes(path)


def _slices_of_store(store: Path) -> tuple[list[Excluded], int]:
    if is_resampled(read_options(store)):
        raise UserError(
            f"A store given to --exclude must have the native geometry, but {store} was resampled, "
            "which changes every hash: curate it without --pixel-spacing and --size."
        )
    records: list[VolumeRecord] = list(read_records(store))
    slices = [
        Excluded(row.sha256, row.phash, (row.hu_min, row.hu_max, row.hu_mean))
        for record in records
        for row in record.slices
    ]
    return slices, len(records)


def is_resampled(options: dict[str, Any]) -> bool:
    """Return whether a store's slices were resampled, which changes every hash."""
    return options.get("pixel_spacing_mm") is not None or options.get("size") is not None


def _slices_of_list(path: Path) -> list[Excluded]:
    slices: list[Excluded] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--exclude {path} must be a readable text file, but: {first_line(error)}."
        ) from error
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LIST_LINE.fullmatch(line.strip())
        if match is None:
            raise UserError(
                f"Each line of {path} must begin with the SHA-256 of a slice (64 hexadecimal "
                f"digits), but line {number} is {line[:80]!r}: correct it or begin it with #."
            )
        sha256, phash = match.groups()
        slices.append(Excluded(sha256.lower(), phash.lower() if phash else None, None))
    return slices


def _slices_of_volumes(path: Path) -> tuple[list[Excluded], int]:
    sources, problems = find_sources([path])
    if problems:
        key, reason = problems[0]
        raise _hole(path, key, reason)
    slices: list[Excluded] = []
    for source in sources:
        try:
            volume = identify(reorient(read(source)), source)
            if volume.array.min() == volume.array.max():
                continue  # constant slices are alike in many volumes
            stack, other = stack_slices(volume), in_another_way(volume)
        except Unreadable as error:
            raise _hole(path, source.key, str(error)) from error
        except MemoryError as error:
            raise _hole(path, source.key, "it needs more memory than is available") from error
        for image in (stack.array[z] for z in stack.informative()):
            phash = perceptual_hash(image, *stack.scale.window)
            slices.append(Excluded(slice_sha256(image), phash, range_of(image)))
        if other is not None:  # as a store of before, or a copy that says its modality, has it
            images = (other[z] for z in stack.informative())
            slices += [Excluded(slice_sha256(each), None, range_of(each)) for each in images]
    return slices, len(sources)


def range_of(image: np.ndarray) -> Range:
    """Return the smallest, largest and mean value; exact, in whatever order they are summed."""
    return float(image.min()), float(image.max()), float(image.mean(dtype=np.float64))


def _hole(path: Path, key: str, reason: str) -> UserError:
    return UserError(
        f"Everything in --exclude {path} must be readable, but {key} is not ({reason}): fix it, "
        "or name the folder or the files of the test images alone."
    )
