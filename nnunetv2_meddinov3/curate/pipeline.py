"""From volumes as stored on disk to a store of slices: one run, and what came of it."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from nnunetv2_meddinov3.case_names import patient_pattern
from nnunetv2_meddinov3.curate.discover import find_sources
from nnunetv2_meddinov3.curate.ingest import Job, Outcome, skipped
from nnunetv2_meddinov3.curate.leakage import (
    DEFAULT_BENCHMARKS,
    EXCLUDED,
    build_guard,
    check_benchmarks,
    check_store,
    mark_compared,
)
from nnunetv2_meddinov3.curate.modalities import check_modality
from nnunetv2_meddinov3.curate.patients import named_by
from nnunetv2_meddinov3.curate.privacy import Names
from nnunetv2_meddinov3.curate.report import write_report
from nnunetv2_meddinov3.curate.slices import SliceRules
from nnunetv2_meddinov3.curate.volume import VolumeSource, counted
from nnunetv2_meddinov3.curate.workers import run_in_processes, run_in_turn, run_on_dask
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.progress import Progress
from nnunetv2_meddinov3.signals import Stop
from nnunetv2_meddinov3.store.index import build_index
from nnunetv2_meddinov3.store.records import kind_of
from nnunetv2_meddinov3.store.sharing import check_target, one_at_a_time, writing
from nnunetv2_meddinov3.store.writer import StoreWriter

MAX_SHOWN = 20  # reasons in a summary
MAX_NAMED = 3  # sources of one reason
PROGRESS_EVERY = 50  # volumes between two lines where there is no terminal
ALL_ENTERED, NONE_ENTERED, SOME_SKIPPED = 0, 2, 3


@dataclass
class Summary:
    """What a run did.

    Attributes:
        entered: Number of volumes written.
        present: Number of volumes that an earlier run had written.
        skipped: (key, reason) of the sources that could not enter.
        excluded: (key, reason) of those kept out on request, by ``--exclude``.
        slices: Number of slices written, before duplicates are removed.
        left_out: Reason -> number of slices of the entered volumes left out for it.
        notes: Kind of a note -> number of the entered volumes that have it.
        flagged: Number of slices of an earlier run that are flagged ``near_excluded`` only now.
        n_bytes: Size of the files of the entered volumes.
        seconds: Time taken.
        signal: Number of the signal that stopped the run, None if it went to its end.
    """

    entered: int = 0
    present: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    excluded: list[tuple[str, str]] = field(default_factory=list)
    slices: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    flagged: int = 0
    n_bytes: int = 0
    seconds: float = 0.0
    signal: int | None = None

    def add(self, outcome: Outcome) -> None:
        """Count one more source."""
        self.entered += outcome.state == "entered"
        self.present += outcome.state == "present"
        if outcome.state == "skipped":
            self.skipped.append((outcome.key, outcome.reason))
        if outcome.state == "excluded":
            self.excluded.append((outcome.key, outcome.reason))
        self.slices += outcome.slices
        self.left_out.update(outcome.left_out)
        self.notes.update({kind_of(note) for note in outcome.notes})
        self.n_bytes += outcome.n_bytes

    @property
    def exit_code(self) -> int:
        """0 if every source entered, 3 if some could not, 2 if none entered.

        What was kept out on request counts as done. A run that a signal stopped has 128 +
        the number of the signal.
        """
        if self.signal is not None:
            return 128 + self.signal
        if not self.skipped:
            return ALL_ENTERED
        return SOME_SKIPPED if self.entered + self.present else NONE_ENTERED

    def __str__(self) -> str:
        rate = self.slices / self.seconds if self.seconds else 0.0
        lines = [
            f"{counted(self.entered, 'volume')} entered with {counted(self.slices, 'slice')} in "
            f"{self.seconds:.1f} s "
            f"({rate:.0f} slices/s, {self.n_bytes / 1e6 / max(self.seconds, 1e-9):.1f} MB/s of "
            f"files), {self.present} already present, {len(self.excluded)} excluded on request, "
            f"{len(self.skipped)} skipped."
        ]
        lines += [
            f"  left out: {counted(count, 'slice')} {reason}"
            for reason, count in sorted(self.left_out.items())
        ]
        lines += [
            f"  note on {counted(count, 'volume')}: {kind}"
            for kind, count in sorted(self.notes.items(), key=lambda item: (-item[1], item[0]))
        ]
        if self.flagged:
            lines.append(
                f"  flagged near_excluded: {counted(self.flagged, 'slice')} that the store had"
            )
        lines += _grouped("excluded", [(key, why[len(EXCLUDED) :]) for key, why in self.excluded])
        lines += _grouped("skipped", self.skipped)
        if self.signal is not None:
            lines.append("Stopped by a signal; the same command continues the store.")
        return "\n".join(lines)


def _grouped(what: str, sources: Sequence[tuple[str, str]]) -> list[str]:
    """Return a line for each kind of reason, the most frequent first, with the first sources."""
    kinds: dict[str, list[tuple[str, str]]] = {}
    for key, reason in sources:
        kinds.setdefault(kind_of(reason), []).append((key, reason))
    groups = sorted(kinds.items(), key=lambda item: (-len(item[1]), item[0]))
    lines = []
    for kind, members in groups[:MAX_SHOWN]:
        if len(members) == 1:
            lines.append(f"  {what} {members[0][0]}: {members[0][1]}")
            continue
        told = members[0][1] if len({reason for _, reason in members}) == 1 else kind
        named = ", ".join(key for key, _ in members[:MAX_NAMED])
        more = len(members) - MAX_NAMED
        rest = f" and {more} more" if more > 0 else ""
        lines.append(f"  {what} {counted(len(members), 'source')}: {told} ({named}{rest})")
    if len(groups) > MAX_SHOWN:
        number = sum(len(members) for _, members in groups[MAX_SHOWN:])
        lines.append(f"  and {number} more for other reasons, which the report lists.")
    return lines


def curate(
    sources: Sequence[Path | str],
    store: Path | str,
    *,
    workers: int = 1,
    shard: tuple[int, int] = (0, 1),
    exclude: Sequence[Path | str] = (),
    patients: str | None = None,
    modality: str | None = None,
    hide_paths: bool = False,
    pixel_spacing_mm: float | None = None,
    size: int | None = None,
    min_gap_mm: float = 0.0,
    keep_flagged: bool = False,
    dask_scheduler: str | None = None,
    benchmark_names: Sequence[str] = DEFAULT_BENCHMARKS,
    allow_benchmarks: bool = False,
    progress: TextIO | None = None,
) -> Summary:
    """Convert volumes into a store of axial slices, in ``workers`` processes.

    What the store has already is left alone, so an interrupted run continues where it stopped.
    SIGINT, SIGTERM and SIGUSR1 let the volumes at work finish, then index and report are written;
    a second Ctrl-C ends at once. With ``workers`` > 1 a script must call this under
    ``if __name__ == "__main__":``.

    Args:
        sources: nnU-Net raw datasets, folders of volumes, of DICOM or of PNG, and single files.
        store: Folder of the store; made where it does not exist.
        workers: Processes; 1 works in this one.
        shard: (i, n) takes the i-th of n parts, counted from 0; all may write one store at once.
        exclude: What must not enter, see ``leakage.build_guard``.
        patients: Regular expression whose first group, or whole match, is the patient in the name
            of a file or case, see ``patients.named_by``; also of what has entered before.
        modality: Of volumes that do not say theirs, one of ``modalities.MODALITIES``; values that
            are no HU outrank ``"CT"``.
        hide_paths: Store keyed hashes instead of the names of files and folders; for the lifetime
            of a store.
        pixel_spacing_mm: In-plane spacing to resample to; None keeps the native one.
        size: Pixels per side to resize to; None keeps the size.
        min_gap_mm: Smallest distance between slices of one volume that enter.
        keep_flagged: Let air-only and constant slices enter, flagged.
        dask_scheduler: Address of a Dask cluster to run on instead of ``workers``.
        benchmark_names: Test sets that the sources must not hold unless something is excluded.
        allow_benchmarks: Do not look for test sets by name.
        progress: Stream for a bar (on a terminal) or lines about the run; silent by default.

    Raises:
        UserError: A mistake in the arguments, before anything is written, or a store that cannot
            be written.
    """
    start = time.monotonic()
    rules = SliceRules(pixel_spacing_mm, size, min_gap_mm, keep_flagged)
    _check_numbers(workers, shard)
    check_modality(modality)
    check_target(Path(store), shard)
    pattern = None if patients is None else patient_pattern(patients)
    arguments, excluded = [Path(path) for path in sources], [Path(path) for path in exclude]
    found, refused = find_sources(arguments)
    if not found and not refused:
        raise UserError(
            f"The sources must hold volumes, but there is none in {', '.join(map(str, sources))}: "
            "give nnU-Net raw datasets, folders of NIfTI, NRRD, MHA, DICOM or PNG, or files."
        )
    if pattern is not None:
        found = named_by(pattern, found)
    if not allow_benchmarks:
        check_benchmarks(found, arguments, excluded, benchmark_names)
    guard = build_guard(excluded, progress)
    alike = check_store(guard, Path(store), progress)
    # an option only where it is set: stores of before have none of this name
    options = rules.options() | ({"hide_paths": True} if hide_paths else {})
    folder = Path(store).absolute()
    with Stop() as stop, writing(folder, _teller(progress), shard):
        writer = StoreWriter(folder, options)
        names = Names(writer.key(), hide_paths, tuple(sorted(set(guard.origins.values()))))
        job = Job(writer, rules, guard, names, pattern is not None, modality)
        summary = Summary(flagged=mark_compared(guard, writer, alike))
        for key, reason in refused:
            if in_shard(key, shard):
                _count(skipped(key, reason), summary, job)
        mine = [source for source in found if in_shard(source.key, shard)]
        with Progress(len(mine), "volumes", every=PROGRESS_EVERY, stream=progress) as bar:
            begin = time.monotonic()
            for outcome in _run(mine, job, workers, dask_scheduler, stop):
                _count(outcome, summary, job)
                rate = summary.slices / max(time.monotonic() - begin, 1e-9)
                bar.advance(
                    f"{summary.slices} slices, {rate:.0f} slices/s, {len(summary.skipped)} skipped"
                )
        build_index(folder)
        with one_at_a_time(folder):  # no shard builds an index under the report
            write_report(folder)
    summary.signal = stop.number
    summary.seconds = time.monotonic() - start
    return summary


def _teller(progress: TextIO | None) -> Callable[[str], None]:
    return lambda line: None if progress is None else print(line, file=progress)


def _count(outcome: Outcome, summary: Summary, job: Job) -> None:
    """Add an outcome to the summary, and note in the store why a source did not enter."""
    if outcome.state in ("skipped", "excluded"):
        reason = job.names.remark(outcome.reason, outcome.key)
        job.writer.write_skip(job.names.source_key(outcome.key), reason)
    summary.add(outcome)


def in_shard(key: str, shard: tuple[int, int]) -> bool:
    """Return whether a source falls to part i of n, by a hash of its key that never changes."""
    index, number = shard
    return int(hashlib.sha256(key.encode()).hexdigest()[:16], 16) % number == index


def _check_numbers(workers: int, shard: tuple[int, int]) -> None:
    if workers < 1:
        raise UserError(f"The number of workers must be at least 1, but is {workers}.")
    index, number = shard
    if not 0 <= index < number:
        raise UserError(
            f"A shard must be i/n with i from 0 to n - 1, but is {index}/{number}: of 4 shards the "
            "first is 0/4 and the last 3/4."
        )


def _run(
    sources: list[VolumeSource], job: Job, workers: int, dask_scheduler: str | None, stop: Stop
) -> Iterator[Outcome]:
    if dask_scheduler is not None:
        return run_on_dask(sources, job, dask_scheduler, stop)
    if workers == 1:
        return run_in_turn(sources, job, stop)
    return run_in_processes(sources, job, workers, stop)
