"""``report.html`` of a store: what is in it, what it looks like, what was left out and why."""

import base64
import html
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from string import Template

import numpy as np

from nnunetv2_meddinov3 import files
from nnunetv2_meddinov3.curate.figures import histogram_figure, montage_figure
from nnunetv2_meddinov3.curate.ingest import count_reasons
from nnunetv2_meddinov3.store.index import read_records, read_skips
from nnunetv2_meddinov3.store.layout import REPORT
from nnunetv2_meddinov3.store.reader import SliceStore

MONTAGE_DATASETS = 12
MONTAGE_SLICES = 8  # of each
SAMPLED_SLICES = 64  # for the histogram of HU
WINDOW_HU = (-160, 240)  # soft tissue

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Slice store $name</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; color: #222 }
table { border-collapse: collapse }
th, td { padding: .15rem .8rem; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child, .text td, .text th { text-align: left }
td { overflow-wrap: anywhere }
img { max-width: 100% }
</style>
</head>
<body>
<h1>Slice store $name</h1>
<p>$summary</p>
<h2>Datasets</h2>
$datasets
<h2>Distributions</h2>
$histograms
<h2>Slices</h2>
<p>Evenly spaced slices of the longest volume of each dataset, from caudal (left) to cranial
(right); CT in the window $low to $high HU.</p>
$montage
<h2>Flags</h2>
<p>Flagged slices are in the store; a reader may leave them out.</p>
$flags
<h2>Slices left out of volumes that entered</h2>
$left_out
<h2>Sources that did not enter</h2>
$skipped
<h2>Options</h2>
$options
</body>
</html>
""")


def write_report(folder: Path | str) -> Path:
    """Write the page, which needs no other file, from the index and the records of a store.

    Returns:
        Its path.
    """
    folder = Path(folder)
    store = SliceStore(folder)
    left_out, per_dataset, size = _read_volumes(folder)
    skips = read_skips(folder)
    columns = {name: store.rows[name].to_numpy() for name in _COLUMNS}
    page = _PAGE.substitute(
        name=html.escape(folder.resolve().name),
        summary=(
            f"{len(store)} slices of {sum(row[1] for row in per_dataset)} volumes, "
            f"{size / 1e6:.1f} MB compressed; {len(skips)} sources did not enter."
        ),
        datasets=_datasets(per_dataset, columns),
        histograms=_image(_histograms(store, columns), "Histograms"),
        montage=_image(_montage(store, columns), "Slices of each dataset"),
        low=WINDOW_HU[0],
        high=WINDOW_HU[1],
        flags=_flags(store, columns),
        left_out=_table(("source", "slices", "reason"), left_out),
        skipped=_table(("source", "reason"), skips),
        options=_table(("option", "value"), sorted(store.options.items())),
    )
    files.write_text(folder / REPORT, page)
    return folder / REPORT


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


def _read_volumes(folder: Path) -> tuple[list[tuple], list[tuple], int]:
    """What was left out; dataset, volumes, patients, slices, left out; size in bytes."""
    left_out = []
    volumes, slices, lost = Counter(), Counter(), Counter()
    patients = defaultdict(set)
    arrays = {}
    for record in read_records(folder):
        volumes[record.dataset] += 1
        slices[record.dataset] += len(record.slices)
        lost[record.dataset] += len(record.left_out)
        patients[record.dataset].add(record.patient)
        arrays[record.volume_id] = record.array_bytes
        for reason, number in count_reasons(record.left_out).items():
            left_out.append((record.source_key, number, reason))
    rows = [
        (name, volumes[name], len(patients[name]), slices[name], lost[name])
        for name in sorted(volumes)
    ]
    return left_out, rows, sum(arrays.values())


def _datasets(rows: Sequence[tuple], columns: dict[str, np.ndarray]) -> str:
    listed = Counter(columns["dataset"])
    modalities = defaultdict(set)
    for name, modality in set(zip(columns["dataset"], columns["modality"], strict=True)):
        modalities[name].add(modality)
    head = ("dataset", "modality", "volumes", "patients", "slices", "duplicates", "left out")
    return _table(
        head,
        [
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
        ],
    )


def _histograms(store: SliceStore, columns: dict[str, np.ndarray]) -> bytes:
    is_ct = (columns["modality"] == "CT") & ~columns["windowed"].astype(bool)
    sample = _evenly(np.flatnonzero(is_ct), SAMPLED_SLICES)
    values = [store.image(int(i))[::4, ::4].ravel() for i in sample]
    spacing_x, spacing_z = (columns[f"spacing_{axis}"].astype(float) for axis in "xz")
    return histogram_figure(
        spacing_x[np.isfinite(spacing_x)],
        spacing_z[np.isfinite(spacing_z)],
        np.concatenate(values) if values else np.empty(0),
        columns["body_fraction"],
    )


def _montage(store: SliceStore, columns: dict[str, np.ndarray]) -> bytes:
    if not len(store):
        return b""
    rows = []
    for name in _evenly(np.unique(columns["dataset"]), MONTAGE_DATASETS):
        chosen = _evenly(_longest(columns, name), MONTAGE_SLICES)
        slices = [(store.image(int(i)), *_window(columns, i)) for i in chosen]
        rows.append((str(name), slices))
    return montage_figure(rows)


def _longest(columns: dict[str, np.ndarray], dataset: str) -> np.ndarray:
    """Rows of the volume of a dataset with most slices, caudal to cranial.

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


def _flags(store: SliceStore, columns: dict[str, np.ndarray]) -> str:
    counts = Counter(flag for flags in store.rows["flags"].to_pylist() for flag in flags)
    counts["same perceptual hash as a slice of another volume"] = _lookalikes(columns)
    return _table(("flag", "slices"), sorted(counts.items()))


def _lookalikes(columns: dict[str, np.ndarray]) -> int:
    """Number of slices whose perceptual hash occurs in another volume too."""
    pairs = Counter(zip(columns["phash"], columns["volume_id"], strict=True))
    volumes = Counter(look for look, _ in pairs)
    return sum(number for (look, _), number in pairs.items() if volumes[look] > 1)


def _evenly(items: np.ndarray, number: int) -> np.ndarray:
    """At most so many of the items, evenly spaced, the first and the last among them."""
    if len(items) <= number:
        return items
    return items[np.linspace(0, len(items) - 1, number).round().astype(int)]


def _image(png: bytes, title: str) -> str:
    if not png:
        return "<p>None.</p>"
    data = base64.b64encode(png).decode("ascii")
    return f'<img alt="{title}" src="data:image/png;base64,{data}">'


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    if not rows:
        return "<p>None.</p>"
    lines = [_line(head, "th"), *(_line(row, "td") for row in rows)]
    texts = ' class="text"' if head[-1] in ("reason", "value") else ""
    return f"<table{texts}>\n" + "\n".join(lines) + "\n</table>"


def _line(cells: Sequence[object], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(str(c))}</{tag}>' for c in cells)}</tr>"
