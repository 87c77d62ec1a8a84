"""The leakage guard: volumes of a test set do not enter a store.

Their names raise the question, so that pretraining on them is no accident; what is left out is
decided by content.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from nnunetv2_meddinov3.curate.discover import find_sources
from nnunetv2_meddinov3.curate.modalities import identify
from nnunetv2_meddinov3.curate.orient import reorient
from nnunetv2_meddinov3.curate.readers import read
from nnunetv2_meddinov3.curate.slices import Stack, in_another_way, stack_slices
from nnunetv2_meddinov3.curate.volume import Unreadable, Volume, VolumeSource, counted
from nnunetv2_meddinov3.errors import UserError, first_line
from nnunetv2_meddinov3.progress import Progress
from nnunetv2_meddinov3.store.fingerprints import (
    as_numbers,
    bit_distances,
    perceptual_hash,
    slice_sha256,
    turned,
    turned_hashes,
)
from nnunetv2_meddinov3.store.index import read_records
from nnunetv2_meddinov3.store.layout import INDEX, MANIFEST, STORE, read_options
from nnunetv2_meddinov3.store.records import VolumeRecord

EXCLUDED = "excluded: "  # begins the reason of a source that --exclude keeps out
NEAR_BITS = 4  # of 64
_LIST_LINE = re.compile(r"([0-9a-fA-F]{64})(?:[\s,]+([0-9a-fA-F]{16}))?(?:[\s,].*)?")
_NOTE = "leakage guard"
# The benchmarks of the paper (MedDINOv3, sec. 4.1), as lower-case words joined by "_". Task 3 of
# the Medical Segmentation Decathlon is LiTS.
_PATTERNS = {
    "AMOS22": r"amos(_?(20)?22)?",
    "BTCV": r"btcv|abdomen_?btcv|synapse",
    "KiTS23": r"kits(_?(20)?\d\d)?",
    "LiTS": r"lits(_?(20)?17)?|(task|dataset)_?0*3_liver|msd_liver",
}
# Collections that hold images of these benchmarks, as their publications say.
_CONTAIN = {
    r"abdomen_?ct_?1k": ("KiTS23", "LiTS"),
    r"ct_?org": ("LiTS",),
    r"abdomen_?atlas(_?[\d_]*(mini|pro)?)?": ("AMOS22", "BTCV", "KiTS23", "LiTS"),
}
DEFAULT_BENCHMARKS = tuple(_PATTERNS)


def check_benchmarks(
    sources: Iterable[VolumeSource],
    arguments: Sequence[Path],
    exclude: Sequence[Path],
    names: Sequence[str] = DEFAULT_BENCHMARKS,
) -> None:
    """Refuse sources that look like a benchmark for which nothing is excluded.

    Args:
        sources: What was found.
        arguments: The sources as given.
        exclude: What must not enter, as given.
        names: The benchmarks, those of the paper or others by their own names.

    Raises:
        UserError: If a name of a source, or of a folder or file in it, is that of a benchmark or
            of a collection that contains it, and none of ``exclude`` has such a name.
    """
    texts = {source.dataset for source in sources}
    texts |= {part for source in sources for part in source.key.split("#")[0].split("/")}
    texts |= {part for path in arguments for part in path.resolve().parts[-2:]}
    covered = {part for path in exclude for part in path.resolve().parts}
    for name in names:
        suspects = sorted(text for text in texts if _holds(text, name))
        if suspects and not any(_is(text, name) for text in covered):
            raise UserError(
                f"The test images of {name} must not enter, but the sources hold {suspects[0]!r} "
                f"and no --exclude has a name like {name}: give --exclude with its test images, "
                "or --allow-benchmarks if you will not measure on it."
            )


@dataclass(frozen=True)
class Guard:
    """What must not enter.

    Attributes:
        origins: SHA-256 of a slice (int16, LPS, own geometry) -> name of the ``--exclude`` it
            comes from.
        phashes: (N,) uint64, sorted perceptual hashes of those slices, where they are known.
    """

    origins: dict[str, str] = field(default_factory=dict)
    phashes: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.uint64))

    def note(self) -> tuple[str, ...]:
        """Return what the record of a volume says of the guard it passed, nothing without one."""
        if not self.origins:
            return ()
        digest = hashlib.sha256("".join(sorted(self.origins)).encode()).hexdigest()[:16]
        return (f"{_NOTE} {digest}: compared with {len(self.origins)} excluded slices",)

    def inspect(self, stack: Stack, volume: Volume | None = None) -> tuple[str | None, list[int]]:
        """Compare a volume with what is excluded, also mirrored, turned and transposed in-plane.

        The incoming side is turned, since of a store or a list only hashes are known. Slices that
        are constant or show only air are not compared: they are alike in many volumes. Values that
        are not HU are compared in both ways in which a store may hold them (``in_another_way``).

        Args:
            stack: Its slices.
            volume: What they were made of, for the other way.

        Returns:
            The reason to leave out the whole volume, None if it may enter, and the indices of the
            slices that merely look like an excluded one.
        """
        if not self.origins:
            return None, []
        compared = stack.informative()
        other = None if volume is None else in_another_way(volume)
        arrays = [stack.array] if other is None else [stack.array, other]
        found = [
            each
            for z in compared
            if (each := next(filter(None, (self._origin(a[z]) for a in arrays)), None))
        ]
        if found:
            number = counted(len(found), "slice")
            names = " and ".join(sorted({name for name, _ in found}))
            as_it_is = any(is_itself for _, is_itself in found)
            how = "" if as_it_is else ", mirrored or turned"
            return f"{EXCLUDED}shares {number} with {names}{how}", []
        return None, [z for z in compared if self._is_near(stack, z)]

    def _origin(self, image: np.ndarray) -> tuple[str, bool] | None:
        """Return the exclusion that holds a slice, and whether as it is; None if none does."""
        for number, each in enumerate(turned(image)):
            if (name := self.origins.get(slice_sha256(each))) is not None:
                return name, number == 0
        return None

    def _is_near(self, stack: Stack, z: int) -> bool:
        if not len(self.phashes):
            return False
        hashes = as_numbers(set(turned_hashes(stack.array[z], *stack.scale.window)))
        return any(bit_distances(each, self.phashes).min() <= NEAR_BITS for each in hashes)


def build_guard(arguments: Sequence[Path], progress: TextIO | None = None) -> Guard:
    """Read everything that must not enter.

    Args:
        arguments: Each an nnU-Net raw dataset (its ``imagesTs`` if there are images in it, else
            all its images), a folder or file of volumes, a store in native geometry, or a text
            file with one SHA-256 of a slice per line, optionally followed by its perceptual hash.
        progress: Stream for a bar or lines about what was read; silent by default.

    Raises:
        UserError: If an argument is none of these, or anything in it cannot be read: a guard with
            a hole guards nothing.
    """
    if not arguments:
        return Guard()
    origins: dict[str, str] = {}
    phashes: set[str] = set()
    with Progress(len(arguments), "exclusions", stream=progress) as bar:
        for argument in arguments:
            name, slices, number = _read_excluded(argument)
            if not slices:
                raise UserError(
                    f"--exclude {argument} must hold volumes or hashes of slices, but has none: "
                    "name the folder with the test images."
                )
            origins |= {sha256: origins.get(sha256, name) for sha256, _ in slices}
            phashes |= {phash for _, phash in slices if phash}
            what = "a list of" if number is None else f"{counted(number, 'volume')} with"
            bar.advance(f"{name} ({what} {counted(len(slices), 'slice')})")
    return Guard(origins, np.sort(as_numbers(phashes)))


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
    """Return name, (SHA-256, perceptual hash or None) of each slice, and number of volumes."""
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


def _is_resampled(options: dict[str, Any]) -> bool:
    return options.get("pixel_spacing_mm") is not None or options.get("size") is not None


def _slices_of_list(path: Path) -> list[tuple[str, str | None]]:
    slices: list[tuple[str, str | None]] = []
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
        slices.append((sha256.lower(), phash.lower() if phash else None))
    return slices


def _slices_of_volumes(path: Path) -> tuple[list[tuple[str, str | None]], int]:
    sources, problems = find_sources([path])
    if problems:
        key, reason = problems[0]
        raise _hole(path, key, reason)
    slices: list[tuple[str, str | None]] = []
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
        slices += [
            (slice_sha256(stack.array[z]), perceptual_hash(stack.array[z], *stack.scale.window))
            for z in stack.informative()
        ]
        if other is not None:  # as a store of before, or a copy that says its modality, has it
            slices += [(slice_sha256(other[z]), None) for z in stack.informative()]
    return slices, len(sources)


def _hole(path: Path, key: str, reason: str) -> UserError:
    return UserError(
        f"Everything in --exclude {path} must be readable, but {key} is not ({reason}): fix it, "
        "or name the folder or the files of the test images alone."
    )


def _is(text: str, name: str) -> bool:
    pattern = _PATTERNS.get(name, re.escape(_words(name)))
    return re.search(rf"(?<![a-z0-9])({pattern})(?![a-z0-9])", _words(text)) is not None


def _holds(text: str, name: str) -> bool:
    if _is(text, name):
        return True
    return any(
        name in contained and re.search(rf"(?<![a-z0-9])({pattern})(?![a-z0-9])", _words(text))
        for pattern, contained in _CONTAIN.items()
    )


def _words(text: str) -> str:
    """Return lower-case words and numbers joined by "_"."""
    return "_".join(re.findall(r"[a-z0-9]+", text.lower()))
