"""The leakage guard: volumes of a test set do not enter a store.

Their names raise the question, so that pretraining on them is no accident; what is left out is
decided by content.
"""

import functools
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import numpy as np

from nnunetv2_meddinov3.curate.exclusions import (
    Range,
    is_resampled,
    range_of,
    read_excluded,
)
from nnunetv2_meddinov3.curate.slices import (
    Stack,
    in_another_way,
    stack_of_stored,
)
from nnunetv2_meddinov3.curate.volume import Volume, VolumeSource, counted
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.progress import Progress
from nnunetv2_meddinov3.store.codec import decode
from nnunetv2_meddinov3.store.fingerprints import (
    NearHashes,
    as_numbers,
    slice_sha256,
    turned,
    turned_hashes,
)
from nnunetv2_meddinov3.store.index import read_records
from nnunetv2_meddinov3.store.layout import (
    RECORDS,
    STORE,
    array_name,
    read_options,
)
from nnunetv2_meddinov3.store.records import NEAR_EXCLUDED, VolumeRecord, read_frame
from nnunetv2_meddinov3.store.sharing import one_at_a_time
from nnunetv2_meddinov3.store.writer import StoreWriter

EXCLUDED = "excluded: "  # begins the reason of a source that --exclude keeps out
NEAR_BITS = 4  # of 64
_PROGRESS_EVERY = 100  # stored volumes between two lines where there is no terminal
_NOTE = "leakage guard"
_IN_ALL_SYMMETRIES = ", mirrored and turned too"  # which notes of earlier versions do not say
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
        ranges: Smallest, largest and mean value of each of those slices, which turning leaves as
            they are: a slice of other values need not be hashed. None where a list of hashes is
            among the exclusions, of which they are not known.
    """

    origins: dict[str, str] = field(default_factory=dict)
    phashes: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.uint64))
    ranges: frozenset[Range] | None = None

    def note(self) -> tuple[str, ...]:
        """Return what the record of a volume says of the guard it passed, nothing without one."""
        if not self.origins:
            return ()
        digest = hashlib.sha256("".join(sorted(self.origins)).encode()).hexdigest()[:16]
        compared = f"compared with {len(self.origins)} excluded slices"
        return (f"{_NOTE} {digest}: {compared}{_IN_ALL_SYMMETRIES}",)

    def has_passed(self, record: VolumeRecord) -> bool:
        """Return whether a stored volume was compared with the same exclusions."""
        return set(self.note()) <= set(record.notes)

    def has_passed_as_it_is(self, record: VolumeRecord) -> bool:
        """Return the same of a record that an earlier version wrote, which turned nothing."""
        return {each.removesuffix(_IN_ALL_SYMMETRIES) for each in self.note()} <= set(record.notes)

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
        if self.ranges is not None and range_of(image) not in self.ranges:
            return None
        for number, each in enumerate(turned(image)):
            if (name := self.origins.get(slice_sha256(each))) is not None:
                return name, number == 0
        return None

    def _is_near(self, stack: Stack, z: int) -> bool:
        if not len(self.phashes):
            return False
        hashes = as_numbers(set(turned_hashes(stack.array[z], *stack.scale.window)))
        return self._near_hashes.any_near(hashes)

    @functools.cached_property
    def _near_hashes(self) -> NearHashes:
        return NearHashes(self.phashes, NEAR_BITS)


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
    ranges: set[Range | None] = set()
    with Progress(len(arguments), "exclusions", stream=progress) as bar:
        for argument in arguments:
            name, slices, number = read_excluded(argument)
            if not slices:
                raise UserError(
                    f"--exclude {argument} must hold volumes or hashes of slices, but has none: "
                    "name the folder with the test images."
                )
            origins |= {each.sha256: origins.get(each.sha256, name) for each in slices}
            phashes |= {each.phash for each in slices if each.phash}
            ranges |= {each.range for each in slices}
            what = "a list of" if number is None else f"{counted(number, 'volume')} with"
            bar.advance(f"{name} ({what} {counted(len(slices), 'slice')})")
    known = frozenset(each for each in ranges if each is not None)
    return Guard(origins, np.sort(as_numbers(phashes)), None if None in ranges else known)


def check_store(guard: Guard, store: Path, progress: TextIO | None = None) -> dict[str, list[int]]:
    """Compare what a store holds with what is excluded now, as if it were to enter now.

    Stored slices are decompressed, a volume at a time, and go the way of incoming ones through
    ``Guard.inspect``; volumes whose record says that they did so already are passed over. Of a
    resampled store only the perceptual hashes can tell.

    Returns:
        Source key of each volume compared -> indices of its slices that look like an excluded one,
        for ``mark_compared``.

    Raises:
        UserError: If a volume of the store has an excluded slice, or was resampled and not
            compared with the same exclusions.
    """
    alike: dict[str, list[int]] = {}
    if not guard.origins or not (store / STORE).is_file():
        return alike
    resampled = is_resampled(read_options(store))
    number = sum(1 for _ in (store / RECORDS).glob("*.json"))
    with Progress(number, "stored volumes", every=_PROGRESS_EVERY, stream=progress) as bar:
        for record in read_records(store, in_order=False):
            bar.advance(f"{len(alike)} compared with the exclusions")
            if guard.has_passed(record) or not _is_in_place(store, record):
                continue
            if resampled and not guard.has_passed_as_it_is(record):
                raise _leak(store, record, "was not compared with the exclusions")
            array = decode(read_frame(store, record))
            stack = stack_of_stored(array, record.windowed, record.intensity)
            reason, alike[record.source_key] = guard.inspect(stack)
            if reason:
                raise _leak(store, record, reason.removeprefix(EXCLUDED))
    return alike


def mark_compared(guard: Guard, writer: StoreWriter, alike: dict[str, list[int]]) -> int:
    """Note in a store what ``check_store`` found, so that pretraining and later runs know it.

    Returns:
        The number of slices that have the flag ``near_excluded`` only now.

    Raises:
        UserError: If a record cannot be written.
    """
    if not alike:
        return 0
    with one_at_a_time(writer.folder):
        return sum(
            writer.remark(key, guard.note(), NEAR_EXCLUDED, near) for key, near in alike.items()
        )


def _is_in_place(store: Path, record: VolumeRecord) -> bool:
    """Return whether the array of a record is there; if not, it is written and compared anew."""
    path = store / array_name(record.volume_id)
    return path.is_file() and path.stat().st_size == record.array_bytes


def _leak(store: Path, record: VolumeRecord, what: str) -> UserError:
    return UserError(
        f"The store {store} must hold nothing that --exclude names, but {record.source_key} in it "
        f"{what}: curate into a new store."
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
