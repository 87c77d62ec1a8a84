"""One source on its way into a store: hash, read, cut, compare with what is excluded, write."""

import platform
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunetv2_meddinov3 import __version__
from nnunetv2_meddinov3.curate.leakage import Guard
from nnunetv2_meddinov3.curate.reading import read_volume
from nnunetv2_meddinov3.curate.slices import SliceRules, cut_volume
from nnunetv2_meddinov3.curate.stack import stack_slices
from nnunetv2_meddinov3.curate.volume import Unreadable, VolumeSource
from nnunetv2_meddinov3.store.fingerprints import source_sha256
from nnunetv2_meddinov3.store.records import VolumeRecord
from nnunetv2_meddinov3.store.writer import StoreWriter


@dataclass(frozen=True)
class Job:
    """What is the same for every source of a run; goes to worker processes as it is."""

    writer: StoreWriter
    rules: SliceRules = field(default_factory=SliceRules)
    guard: Guard = field(default_factory=Guard)


@dataclass(frozen=True)
class Outcome:
    """What became of one source.

    Attributes:
        key: of the source.
        state: ``"entered"``, ``"present"`` (entered in an earlier run) or ``"skipped"``.
        reason: why it was skipped, else empty.
        slices: number of slices written.
        left_out: reason -> number of slices of the volume left out for it.
        n_bytes: size of the source's files, 0 where they were not read.
    """

    key: str
    state: str
    reason: str = ""
    slices: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    n_bytes: int = 0


def enter(source: VolumeSource, job: Job) -> Outcome:
    """Bring one source into the store, or note there why it cannot enter.

    Nothing a source holds stops a run: what cannot be read, cut or shared is skipped.

    Raises:
        UserError: If the store cannot be written.
    """
    try:
        sha256 = source_sha256(source.paths)
        if job.writer.has(source.key, sha256):
            return Outcome(source.key, "present")
        record, array = _read(source, sha256, job)
    except Unreadable as error:
        return skip(source.key, str(error), job)
    except MemoryError:
        return skip(source.key, "needs more memory than there is", job)
    except OSError as error:
        return skip(source.key, f"cannot be read ({error.strerror or error})", job)
    except Exception as error:  # a reader may fail in its own way on a malformed file
        return skip(source.key, f"cannot be read ({type(error).__name__}: {error})", job)
    job.writer.write_volume(record, array)
    n_bytes = sum(Path(path).stat().st_size for path in source.paths)
    counts = count_reasons(record.left_out)
    return Outcome(source.key, "entered", "", len(record.slices), counts, n_bytes)


def _read(source: VolumeSource, sha256: str, job: Job) -> tuple[VolumeRecord, np.ndarray]:
    """The record and the slices (S, H, W) of a source that may enter.

    Raises:
        Unreadable: If it may not.
    """
    volume = read_volume(source)
    stack = stack_slices(volume)
    excluded, near = job.guard.inspect(stack)
    if excluded:
        raise Unreadable(excluded)
    cut = cut_volume(volume, stack, job.rules, frozenset(near))
    if not cut.records:
        counts = count_reasons(cut.left_out).items()
        reasons = ", ".join(f"{number} {reason}" for reason, number in counts)
        raise Unreadable(f"no slice is left ({reasons})")
    record = VolumeRecord(
        source_key=source.key,
        source_sha256=sha256,
        dataset=source.dataset,
        patient=source.patient,
        modality=volume.modality,
        windowed=volume.windowed,
        spacing_mm=cut.spacing,
        orientation=volume.orientation,
        shape=cut.array.shape,
        intensity=stack.intensity,
        notes=(*stack.notes, *job.guard.note()),
        slices=cut.records,
        left_out=cut.left_out,
        versions=tool_versions(),
    )
    return record, cut.array


def skip(key: str, reason: str, job: Job) -> Outcome:
    """Note in the store why a source did not enter."""
    line = " ".join(reason.split())
    job.writer.write_skip(key, line)
    return Outcome(key, "skipped", line)


def count_reasons(left_out: list[tuple[int, str]]) -> dict[str, int]:
    """Number of slices left out for each reason, without what differs from slice to slice."""
    return dict(Counter(reason.split(" (")[0] for _, reason in left_out))


@lru_cache(maxsize=1)
def tool_versions() -> dict[str, str]:
    """Name -> version of what a stored array depends on."""
    packages = {name: metadata.version(name) for name in ("blosc2", "nibabel", "numpy")}
    return {
        "SimpleITK": sitk.Version.VersionString(),
        "nnunetv2_meddinov3": __version__,
        "python": platform.python_version(),
        **packages,
    }
