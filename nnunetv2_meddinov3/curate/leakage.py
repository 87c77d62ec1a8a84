"""The leakage guard: volumes of a test set, recognised by content, do not enter a store."""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nnunetv2_meddinov3.curate.discover import find_sources
from nnunetv2_meddinov3.curate.reading import read_volume
from nnunetv2_meddinov3.curate.stack import Stack, stack_slices
from nnunetv2_meddinov3.curate.volume import Unreadable
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.store.fingerprints import (
    as_numbers,
    bit_distances,
    perceptual_hash,
    slice_sha256,
)
from nnunetv2_meddinov3.store.index import read_records
from nnunetv2_meddinov3.store.layout import INDEX, MANIFEST, STORE, read_options
from nnunetv2_meddinov3.store.records import VolumeRecord

NEAR_BITS = 4  # of 64
_LIST_LINE = re.compile(r"([0-9a-fA-F]{64})(?:[\s,]+([0-9a-fA-F]{16}))?(?:[\s,].*)?")
_NOTE = "leakage guard"


@dataclass(frozen=True)
class Guard:
    """What must not enter.

    Attributes:
        origins: SHA-256 of a slice (int16, LPS, own geometry) -> name of the ``--exclude`` it
            comes from.
        looks: (N,) uint64, sorted perceptual hashes of those slices, where they are known.
        volumes: name of an ``--exclude`` -> number of its volumes, None for a list of hashes.
    """

    origins: dict[str, str] = field(default_factory=dict)
    looks: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.uint64))
    volumes: dict[str, int | None] = field(default_factory=dict)

    def note(self) -> tuple[str, ...]:
        """What the record of a volume says of the guard it passed; nothing if there was none."""
        if not self.origins:
            return ()
        digest = hashlib.sha256("".join(sorted(self.origins)).encode()).hexdigest()[:16]
        return (f"{_NOTE} {digest}: compared with {len(self.origins)} excluded slices",)

    def inspect(self, stack: Stack) -> tuple[str | None, list[int]]:
        """Compare a volume with what is excluded.

        Slices that are constant or show only air are not compared: they are alike in many volumes.

        Returns:
            The reason to leave out the whole volume, None if it may enter, and the indices of the
            slices that merely look like an excluded one.
        """
        if not self.origins:
            return None, []
        telling = stack.telling()
        found = [self.origins.get(slice_sha256(stack.array[z])) for z in telling]
        names = sorted({name for name in found if name is not None})
        if names:
            number = sum(name is not None for name in found)
            return f"excluded: shares slices with {' and '.join(names)} ({number} slices)", []
        return None, [z for z in telling if self._is_near(stack, z)]

    def _is_near(self, stack: Stack, z: int) -> bool:
        if not len(self.looks):
            return False
        look = as_numbers([perceptual_hash(stack.array[z], *stack.scale.window)])[0]
        return bool(bit_distances(look, self.looks).min() <= NEAR_BITS)


def build_guard(
    arguments: Sequence[Path], progress: Callable[[str], None] = lambda line: None
) -> Guard:
    """Read everything that must not enter.

    Args:
        arguments: each an nnU-Net raw dataset (its ``imagesTs`` if there are images in it, else
            all its images), a folder or file of volumes, a store in native geometry, or a text
            file with one SHA-256 of a slice per line, optionally followed by its perceptual hash.
        progress: is told in a sentence what was read.

    Raises:
        UserError: If an argument is none of these, or anything in it cannot be read: a guard with
            a hole is none.
    """
    origins: dict[str, str] = {}
    looks: set[str] = set()
    volumes: dict[str, int | None] = {}
    for argument in arguments:
        name, slices, number = _read_excluded(argument)
        if not slices:
            raise UserError(
                f"--exclude {argument} must hold volumes or hashes of slices, but has none: name "
                "the folder with the test images."
            )
        origins |= {sha256: origins.get(sha256, name) for sha256, _ in slices}
        looks |= {look for _, look in slices if look}
        volumes[name] = number
        what = "a list of" if number is None else f"{number} volumes with"
        progress(f"Excluding {name}: {what} {len(slices)} slices.")
    return Guard(origins, np.sort(as_numbers(looks)), volumes)


def check_store(guard: Guard, store: Path) -> None:
    """Refuse to add to a store that holds, or may hold, what is excluded now.

    Raises:
        UserError: If a volume of the store has an excluded slice, or was resampled and not
            compared with the same exclusions.
    """
    if not guard.origins or not (store / STORE).is_file():
        return
    resampled = _is_resampled(read_options(store))
    for record in read_records(store):
        if resampled:
            leaks = guard.note()[0] not in record.notes
        else:
            leaks = any(row.sha256 in guard.origins for row in record.slices)
        if leaks:
            doubt = "was not compared with" if resampled else "shares slices with"
            raise UserError(
                f"The store {store} must hold nothing that --exclude names, but "
                f"{record.source_key} in it {doubt} the exclusions: curate into a new store."
            )


def _read_excluded(argument: Path) -> tuple[str, list[tuple[str, str | None]], int | None]:
    """Name, (SHA-256, perceptual hash or None) of each slice, and number of volumes."""
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


def _slices_of_store(store: Path) -> tuple[list[tuple[str, str | None]], int]:
    if _is_resampled(read_options(store)):
        raise UserError(
            f"A store given to --exclude must have the native geometry, but {store} was resampled, "
            "which changes every hash: curate it without --pixel-spacing and --size."
        )
    records: list[VolumeRecord] = list(read_records(store))
    return [(row.sha256, row.phash) for record in records for row in record.slices], len(records)


def _is_resampled(options: dict) -> bool:
    return options.get("pixel_spacing_mm") is not None or options.get("size") is not None


def _slices_of_list(path: Path) -> list[tuple[str, str | None]]:
    slices = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--exclude {path} cannot be read as text ({error}).") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LIST_LINE.fullmatch(line.strip())
        if match is None:
            raise UserError(
                f"Each line of {path} must begin with the SHA-256 of a slice (64 hexadecimal "
                f"digits), but line {number} is {line[:80]!r}: correct it or begin it with #."
            )
        sha256, look = match.groups()
        slices.append((sha256.lower(), look.lower() if look else None))
    return slices


def _slices_of_volumes(path: Path) -> tuple[list[tuple[str, str | None]], int]:
    sources, problems = find_sources([path])
    if problems:
        key, reason = problems[0]
        raise _hole(path, key, reason)
    slices = []
    for source in sources:
        try:
            stack = stack_slices(read_volume(source))
        except Unreadable as error:
            raise _hole(path, source.key, str(error)) from error
        slices += [
            (slice_sha256(stack.array[z]), perceptual_hash(stack.array[z], *stack.scale.window))
            for z in stack.telling()
        ]
    return slices, len(sources)


def _hole(path: Path, key: str, reason: str) -> UserError:
    return UserError(
        f"Everything in --exclude {path} must be readable, but {key} is not ({reason}): mend it, "
        "or name the folder or the files of the test images alone."
    )
