"""One source on its way into a store: read, reorient, check, guard, write."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import SimpleITK as sitk

from nnunetv2_meddinov3 import __version__
from nnunetv2_meddinov3.curate.leakage import Guard
from nnunetv2_meddinov3.curate.modalities import identify
from nnunetv2_meddinov3.curate.orient import reorient
from nnunetv2_meddinov3.curate.privacy import Names
from nnunetv2_meddinov3.curate.readers import read
from nnunetv2_meddinov3.curate.slices import (
    CutVolume,
    SliceRules,
    count_reasons,
    cut_volume,
    stack_slices,
)
from nnunetv2_meddinov3.curate.volume import Unreadable, Volume, VolumeSource
from nnunetv2_meddinov3.errors import first_line
from nnunetv2_meddinov3.store.fingerprints import source_sha256
from nnunetv2_meddinov3.store.records import VolumeRecord
from nnunetv2_meddinov3.store.writer import StoreWriter


@dataclass(frozen=True)
class Job:
    """What is the same for every source of a run; goes to worker processes as it is."""

    writer: StoreWriter
    rules: SliceRules = field(default_factory=SliceRules)
    guard: Guard = field(default_factory=Guard)
    names: Names = field(default_factory=Names)
    names_patients: bool = False  # by --patients, which also holds for what has entered before
    modality: str | None = None  # of volumes that do not say theirs


@dataclass(frozen=True)
class Outcome:
    """What became of one source.

    Attributes:
        key: Of the source.
        state: ``"entered"``, ``"present"`` (entered in an earlier run), ``"excluded"`` (kept out on
            request, by ``--exclude``) or ``"skipped"`` (it cannot enter).
        reason: Why it was excluded or skipped, in one line; else empty.
        slices: Number of slices written.
        left_out: Reason -> number of slices of the volume left out for it.
        n_bytes: Size of the source's files, 0 where they were not read.
        notes: Remarks in the record of the volume.
    """

    key: str
    state: str
    reason: str = ""
    slices: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    n_bytes: int = 0
    notes: tuple[str, ...] = ()


def ingest(source: VolumeSource, job: Job) -> Outcome:
    """Bring one source into the store.

    Nothing a source holds stops a run: what cannot be read or must not enter is skipped.

    Raises:
        UserError: If the store cannot be written.
    """
    stored = job.names.stored(source)
    outcome = _ingest(source, stored, job)
    if outcome.state == "present" and job.names_patients and source.kind != "dicom":
        job.writer.name_patient(stored.key, stored.patient)
    return outcome


def _ingest(source: VolumeSource, stored: VolumeSource, job: Job) -> Outcome:
    """Bring a source into the store under the names that it has there."""
    try:
        sha256 = source_sha256(source.paths)
        if (record := job.writer.present(stored.key, sha256)) is not None:
            return Outcome(source.key, "present", notes=_said_of_present(record, job))
        volume = reorient(read(source))  # in one line: the voxels in the file's order are freed
        volume = identify(volume, source, job.modality)
        stack = stack_slices(volume)
        excluded, near = job.guard.inspect(stack, volume)
        if excluded:
            return Outcome(source.key, "excluded", excluded)
        cut = cut_volume(volume, stack, job.rules, frozenset(near))
        n_bytes = sum(Path(path).stat().st_size for path in source.paths)
    except Exception as error:  # a reader may fail in its own way on a malformed file
        return skipped(source.key, _why(error))
    notes = tuple(job.names.remark(note, source.key, source.paths) for note in stack.notes)
    notes = (*notes, *job.guard.note())
    record = _record(stored, sha256, volume, cut, stack.intensity, notes)
    job.writer.write_volume(record, cut.array)
    counts = count_reasons(cut.left_out)
    return Outcome(source.key, "entered", "", len(cut.records), counts, n_bytes, notes)


def _said_of_present(record: VolumeRecord, job: Job) -> tuple[str, ...]:
    """Return a remark where the modality that is stated now came too late for a volume."""
    if job.modality is None or record.modality != "unknown" or job.modality == "CT":
        return ()
    return (f"entered before as unknown, without --modality {job.modality}: use a new store",)


def skipped(key: str, reason: str) -> Outcome:
    """Return the outcome of a source that does not enter."""
    return Outcome(key, "skipped", " ".join(reason.split()))


def _why(error: Exception) -> str:
    """Return why a source does not enter."""
    if isinstance(error, Unreadable):
        return str(error)
    if isinstance(error, MemoryError):
        return "needs more memory than is available"
    if isinstance(error, OSError):
        return f"cannot be read ({first_line(error)})"
    return f"cannot be read ({type(error).__name__}: {first_line(error)})"


def _record(
    source: VolumeSource,
    sha256: str,
    volume: Volume,
    cut: CutVolume,
    intensity: dict[str, float] | None,
    notes: tuple[str, ...],
) -> VolumeRecord:
    slices, height, width = cut.array.shape
    return VolumeRecord(
        source_key=source.key,
        source_sha256=sha256,
        dataset=source.dataset,
        patient=source.patient,
        modality=volume.modality or "unknown",
        windowed=volume.windowed,
        spacing_mm=cut.spacing,
        orientation=volume.orientation,
        shape=(slices, height, width),
        intensity=intensity,
        notes=notes,
        slices=cut.records,
        left_out=cut.left_out,
        versions=tool_versions(),
    )


@lru_cache(maxsize=1)
def tool_versions() -> dict[str, str]:
    """Return name -> version of what a stored array depends on."""
    packages = {name: metadata.version(name) for name in ("blosc2", "nibabel", "numpy")}
    return {
        "SimpleITK": sitk.Version.VersionString(),
        "nnunetv2_meddinov3": __version__,
        "python": platform.python_version(),
        **packages,
    }
