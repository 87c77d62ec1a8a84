"""``report.html`` of a store: what is in it, what it looks like, what was left out and why."""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nnunetv2_meddinov3.curate.leakage import EXCLUDED
from nnunetv2_meddinov3.curate.slices import count_reasons
from nnunetv2_meddinov3.curate.volume import counted
from nnunetv2_meddinov3.html import Block, Picture, Section, Table, Text, write_page
from nnunetv2_meddinov3.store.index import read_records, read_skips
from nnunetv2_meddinov3.store.layout import REPORT
from nnunetv2_meddinov3.store.reader import SliceStore
from nnunetv2_meddinov3.store.records import kind_of

MAX_MONTAGE_DATASETS = 12
MONTAGE_SLICES = 8  # of each
MAX_SAMPLED_SLICES = 64  # for the histogram of HU
WINDOW_HU = (-160.0, 240.0)  # soft tissue
_HU_BINS = np.arange(-1100, 1600, 20)
_COLUMNS = (
    "volume_id",
    "dataset",
    "z",
    "modality",
    "windowed",
    "phash",
    "body_fraction",
    "spacing_z",
    "spacing_x",
    "intensity_stored_low",
    "intensity_stored_high",
)


def write_report(folder: Path | str) -> Path:
    """Write the page, which needs no other file, from the index and the records of a store.

    Returns:
        Its path.

    Raises:
        UserError: If it cannot be written.
    """
    folder = Path(folder)
    store = SliceStore(folder)
    left_out, per_dataset, notes, size = _read_volumes(folder)
    skips = [skip for skip in read_skips(folder) if not skip[1].startswith(EXCLUDED)]
    excluded = [skip for skip in read_skips(folder) if skip[1].startswith(EXCLUDED)]
    columns = {name: store.rows[name].to_numpy() for name in _COLUMNS}
    volumes = sum(row[1] for row in per_dataset)
    summary = (
        f"{counted(len(store), 'slice')} of {counted(volumes, 'volume')}, "
        f"{size / 1e6:.1f} MB compressed; sources that did not enter: {len(skips)}, "
        f"excluded on request: {len(excluded)}."
    )
    montage = (
        "Evenly spaced slices of the longest volume of each dataset, from caudal (left) to cranial "
        f"(right); CT in the window {WINDOW_HU[0]:g} to {WINDOW_HU[1]:g} HU."
    )
    flags = "Flagged slices are in the store; a reader may leave them out."
    sections = [
        Section("Datasets", [_datasets(per_dataset, columns)]),
        Section("Distributions", [Picture(as_png(_histograms(store, columns)), "Histograms")]),
        Section("Slices", [Text(montage), _montage(store, columns)]),
        Section("Flags", [Text(flags), _table(("flag", "slices"), _flags(store, columns))]),
        Section(
            "Slices left out of volumes that entered",
            [_table(("source", "slices", "reason"), left_out)],
        ),
        Section("Notes", [_table(("volumes", "note"), notes)]),
        Section(
            "Sources that did not enter", [*_by_kind(skips), _table(("source", "reason"), skips)]
        ),
        Section("Sources excluded on request", [_table(("source", "reason"), excluded)]),
        Section("Options", [_table(("option", "value"), sorted(store.options.items()))]),
    ]
    title = f"Slice store {folder.resolve().name}"
    return write_page(folder / REPORT, title, [Text(summary)], sections)


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> Block:
    """Return a table, of words where its last column has some, or a word where it has no rows."""
    if not rows:
        return Text("None.")
    return Table(head, rows, text=head[-1] in ("reason", "value", "note"))


_DatasetRow = tuple[str, int, int, int, int]  # name, volumes, patients, slices, left out


def _by_kind(skips: Sequence[tuple[str, str]]) -> list[Block]:
    """Return a table of the kinds of reasons, where there are fewer than sources."""
    kinds = Counter(kind_of(reason) for _, reason in skips)
    return [_table(("sources", "reason"), _counted(kinds))] if len(kinds) < len(skips) else []


def _counted(kinds: Counter[str]) -> list[tuple[int, str]]:
    """Return (number, kind), the most frequent first."""
    return [(number, kind) for kind, number in sorted(kinds.items(), key=lambda k: (-k[1], k[0]))]


def _read_volumes(
    folder: Path,
) -> tuple[list[tuple[str, int, str]], list[_DatasetRow], list[tuple[int, str]], int]:
    """Sum up the records.

    Returns:
        (source, slices, reason) of what was left out, counts by dataset, (volumes, kind) of the
        notes, size in bytes.
    """
    left_out = []
    volumes, slices, lost = Counter[str](), Counter[str](), Counter[str]()
    patients: dict[str, set[str]] = defaultdict(set)
    notes = Counter[str]()
    arrays = {}
    for record in read_records(folder):
        volumes[record.dataset] += 1
        slices[record.dataset] += len(record.slices)
        lost[record.dataset] += len(record.left_out)
        patients[record.dataset].add(record.patient)
        notes.update({kind_of(note) for note in record.notes})
        arrays[record.volume_id] = record.array_bytes
        for reason, number in count_reasons(record.left_out).items():
            left_out.append((record.source_key, number, reason))
    rows = [
        (name, volumes[name], len(patients[name]), slices[name], lost[name])
        for name in sorted(volumes)
    ]
    return left_out, rows, _counted(notes), sum(arrays.values())


def _datasets(rows: Sequence[_DatasetRow], columns: dict[str, np.ndarray]) -> Block:
    listed = Counter(columns["dataset"])
    modalities: dict[str, set[str]] = defaultdict(set)
    for name, modality in set(zip(columns["dataset"], columns["modality"], strict=True)):
        modalities[name].add(modality)
    head = ("dataset", "modality", "volumes", "patients", "slices", "duplicates", "left out")
    cells = [
        (
            name,
            ", ".join(sorted(modalities[name])) or "-",
            volumes,
            patients,
            listed[name],
            slices - listed[name],
            lost,
        )
        for name, volumes, patients, slices, lost in rows
    ]
    return _table(head, cells)


def _histograms(store: SliceStore, columns: dict[str, np.ndarray]) -> Figure:
    is_ct = (columns["modality"] == "CT") & ~columns["windowed"].astype(bool)
    sample = _evenly(np.flatnonzero(is_ct), MAX_SAMPLED_SLICES)
    values = [store.image(int(i))[::4, ::4].ravel() for i in sample]
    spacing_x, spacing_z = (columns[f"spacing_{axis}"].astype(float) for axis in "xz")
    return histogram_figure(
        spacing_x[np.isfinite(spacing_x)],
        spacing_z[np.isfinite(spacing_z)],
        np.concatenate(values) if values else np.empty(0),
        columns["body_fraction"],
    )


def _montage(store: SliceStore, columns: dict[str, np.ndarray]) -> Block:
    if not len(store):
        return Text("None.")
    rows = []
    for name in _evenly(np.unique(columns["dataset"]), MAX_MONTAGE_DATASETS):
        chosen = _evenly(_longest(columns, name), MONTAGE_SLICES)
        slices = [(store.image(int(i)), *_window(columns, i)) for i in chosen]
        rows.append((str(name), slices))
    return Picture(as_png(montage_figure(rows)), "Slices of each dataset")


def _longest(columns: dict[str, np.ndarray], dataset: str) -> np.ndarray:
    """Return the rows of a dataset's volume with most slices, caudal to cranial.

    Where no volume has enough slices for a row of the montage, all rows of the dataset.
    """
    rows = np.flatnonzero(columns["dataset"] == dataset)
    (volume, number), *_ = Counter(columns["volume_id"][rows]).most_common(1)
    if number < MONTAGE_SLICES:
        return rows
    rows = rows[columns["volume_id"][rows] == volume]
    return rows[np.argsort(columns["z"][rows], kind="stable")]


def _window(columns: dict[str, np.ndarray], row: int) -> tuple[float, float]:
    low, high = columns["intensity_stored_low"][row], columns["intensity_stored_high"][row]
    known = low is not None and high is not None and np.isfinite(low) and np.isfinite(high)
    return (float(low), float(high)) if known else WINDOW_HU


def _flags(store: SliceStore, columns: dict[str, np.ndarray]) -> list[tuple[str, int]]:
    counts = Counter(flag for flags in store.rows["flags"].to_pylist() for flag in flags)
    counts["same perceptual hash as a slice of another volume"] = _lookalikes(columns)
    return sorted(counts.items())


def _lookalikes(columns: dict[str, np.ndarray]) -> int:
    """Return the number of slices whose perceptual hash occurs in another volume too."""
    pairs = Counter(zip(columns["phash"], columns["volume_id"], strict=True))
    volumes = Counter(phash for phash, _ in pairs)
    return sum(number for (phash, _), number in pairs.items() if volumes[phash] > 1)


def _evenly(items: np.ndarray, number: int) -> np.ndarray:
    """Return at most so many items, evenly spaced, the first and the last among them."""
    if len(items) <= number:
        return items
    return items[np.linspace(0, len(items) - 1, number).round().astype(int)]


def histogram_figure(
    spacing_x: np.ndarray, spacing_z: np.ndarray, values: np.ndarray, body: np.ndarray
) -> Figure:
    """Draw histograms of the index, and of the values of a sample of its slices.

    Args:
        spacing_x: (N,) in-plane spacing of each slice in mm, without the unknown.
        spacing_z: (N,) spacing between slices in mm, without the unknown.
        values: (M,) HU of a sample of CT pixels, empty where there is no CT.
        body: (N,) body fraction of each slice.
    """
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    axes = figure.subplots(2, 2)
    panels = (
        (axes[0, 0], spacing_x, 40, "pixel spacing (mm)", "slices"),
        (axes[0, 1], spacing_z, 40, "distance between slices (mm)", "slices"),
        (axes[1, 0], values, _HU_BINS, "HU, of a sample of CT slices", "pixels"),
        (axes[1, 1], body, np.linspace(0, 1, 41), "body fraction", "slices"),
    )
    for axis, data, bins, label, unit in panels:
        if len(data):
            axis.hist(data, bins=bins, color="#36c")
        else:
            axis.text(0.5, 0.5, "unknown", ha="center", va="center", transform=axis.transAxes)
        axis.set_xlabel(label)
        axis.set_ylabel(unit)
    axes[1, 0].set_yscale("log" if len(values) else "linear")
    return figure


def montage_figure(rows: Sequence[tuple[str, Sequence[tuple[np.ndarray, float, float]]]]) -> Figure:
    """Draw one row of slices per dataset.

    Args:
        rows: Title of a row, and its slices, each as (H, W) values and the low and high end of
            the window to show it in.
    """
    columns = max(len(slices) for _, slices in rows)
    figure = Figure(figsize=(1.5 * columns, 1.75 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for line, (title, slices) in zip(axes, rows, strict=True):
        line[0].set_title(title, fontsize=8, loc="left")
        for axis, (image, low, high) in zip(line, slices, strict=False):
            axis.imshow(image, cmap="gray", vmin=low, vmax=high, interpolation="bilinear")
    return figure


def as_png(figure: Figure) -> bytes:
    """Return a figure as the bytes of a PNG."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
