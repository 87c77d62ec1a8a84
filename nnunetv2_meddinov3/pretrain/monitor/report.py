"""``report.html`` of a stage: what was run, how it went, and what its features look like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nnunetv2_meddinov3.curves import Rows, curves, png
from nnunetv2_meddinov3.files import read_rows
from nnunetv2_meddinov3.html import Block, Code, Items, Picture, Section, Table, Text, write_page
from nnunetv2_meddinov3.pretrain.monitor.tracker import (
    WINDOW_HU,
    Moment,
    load_moments,
    pca_maps,
    similarity_maps,
)
from nnunetv2_meddinov3.pretrain.monitor.words import HEALTH_PANELS, LOSSES, PROBES
from nnunetv2_meddinov3.pretrain.probe.probing import too_few
from nnunetv2_meddinov3.pretrain.run_folder import (
    CONFIG,
    HEALTH,
    METRICS,
    PROBE,
    PROVENANCE,
    REPORT,
)

_BODY_HU = -300  # a pixel above it shows the body

_FACTS = {"world_size": "processes", "git": "code"}


def write_report(folder: Path) -> Path:
    """Write the page of a stage from the files in its folder.

    Args:
        folder: Of the stage.

    Returns:
        The page, which needs no other file.

    Raises:
        UserError: If it cannot be written.
    """
    metrics, health = read_rows(folder / METRICS), read_rows(folder / HEALTH)
    facts = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    sections = [
        Section("Health", [_verdicts(health)]),
        Section("Losses and gradients", [curves(metrics, LOSSES)]),
        Section(
            "Health metrics",
            [
                Text(
                    "Effective rank: how many directions the features fill. Entropy of the "
                    "targets: 1 is uniform, which says nothing. Prototypes used: those that are "
                    "the first choice of some crop."
                ),
                curves(health, HEALTH_PANELS),
            ],
        ),
        *_probes(read_rows(folder / PROBE)),
        *_features(load_moments(folder)),
        Section("Run", [_facts(facts)]),
        Section("Config", [Code((folder / CONFIG).read_text(encoding="utf-8"), "every value")]),
    ]
    title = f"{folder.resolve().parent.name}, {folder.name}"
    return write_page(folder / REPORT, title, [Text(_summary(metrics))], sections)


def _summary(metrics: Rows) -> str:
    if not metrics:
        return "No step is done yet."
    last = metrics[-1]
    speed = sorted(row["images_per_second"] for row in metrics)[len(metrics) // 2]
    return (
        f"{_count(last['step'], 'step')}, total loss {metrics[0]['loss_total']:.3f} at step "
        f"{metrics[0]['step']} and {last['loss_total']:.3f} at the last; {speed:.1f} images/s "
        f"(median), {max(row['memory_gb'] for row in metrics):.2f} GB of memory, "
        f"{sum(row['skipped'] for row in metrics)} of the logged steps skipped."
    )


def _verdicts(health: Rows) -> Block:
    """Each thing that went wrong, as it was last said, with the steps at which it was said."""
    said: dict[str, list[tuple[int, str]]] = {}
    for row in health:
        for sentence in row.get("verdicts", ()):
            # the same thing is said again with other numbers in brackets
            said.setdefault(sentence.partition("(")[0], []).append((row["step"], sentence))
    if not said:
        return Text("Nothing went wrong at any check.")
    return Items(
        [
            f"{each[-1][1]} (checks from step {each[0][0]} to {each[-1][0]}, {len(each)} of "
            f"{len(health)})"
            for each in said.values()
        ],
        "wrong",
    )


def _probes(rows: Rows) -> list[Section]:
    if not rows:
        return []
    rows = [{**row, **{f"blind_{k}": v for k, v in row.get("blind", {}).items()}} for row in rows]
    blocks: list[Block] = []
    start = next((row for row in rows if row.get("weights") == "start"), None)
    if start:
        values = [
            f"{title} {start[key]:.3f}"
            + (f" (blind guess {start[blind]:.3f})" if start.get(blind) is not None else "")
            for title, (key, blind) in PROBES.items()
            if start.get(key) is not None
        ]
        blocks.append(Text(f"The weights at the start (step 0): {'; '.join(values)}."))
    if "patients" in rows[-1] and (note := too_few(rows[-1]["patients"][1])) is not None:
        blocks.append(Text(f"{note[0].upper()}{note[1:]}"))
    worse = [row["verdict"] for row in rows if row.get("verdict")]
    if worse:
        blocks.append(Text(worse[-1], "wrong"))
    return [Section("Probes", [*blocks, curves(rows, PROBES)])]


def _features(moments: list[Moment]) -> list[Section]:
    if not moments:
        return []
    colours, similarities = draw_maps(moments)
    steps = ", ".join(str(moment.step) for moment in moments)
    grid = f"{_count(len(moments[-1].slices), 'slice')}, a row each, at the steps {steps}"
    return [
        Section(
            "Features of the teacher",
            [
                Text(
                    "The same slices over time. Three principal components of the patch tokens as "
                    "red, green and blue; colours of neighbouring columns are rotated to fit, "
                    "their absolute values mean nothing."
                ),
                Picture(png(colours), f"Principal components as colours: {grid}."),
                Text("Cosine of every patch with the one at the cross."),
                Picture(png(similarities), f"Cosine with the patch at the cross: {grid}."),
            ],
        )
    ]


def _facts(facts: dict[str, Any]) -> Table:
    rows = [(_FACTS.get(k, k.replace("_", " ")), _words(value)) for k, value in facts.items()]
    return Table((), rows, text=True)


def _words(value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, dict):
        return ", ".join(
            (name if v else f"not {name}") if isinstance(v, bool) else f"{name} {_words(v)}"
            for name, v in ((k.replace("_", " "), v) for k, v in value.items())
        )
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def draw_maps(moments: list[Moment]) -> tuple[Figure, Figure]:
    """Draw the same slices over time: principal components as colours, and similarities.

    Returns:
        Slices as rows and steps as columns, twice; in the second the cross is the patch to which
        every other is compared.
    """
    slices = moments[-1].slices
    places = [_place(s, p.shape[:2]) for s, p in zip(slices, moments[-1].patches, strict=True)]
    (left, colour_axes), (right, similarity_axes) = _grid(moments), _grid(moments)
    maps = pca_maps([moment.patches for moment in moments])
    for k, (moment, colours) in enumerate(zip(moments, maps, strict=True), start=1):
        similarities = similarity_maps(moment.patches, places)
        for i, (row, column) in enumerate(places):
            colour_axes[i, k].imshow(colours[i], interpolation="nearest")
            shown = similarity_axes[i, k].imshow(similarities[i], cmap="magma", vmin=-0.2, vmax=1)
            similarity_axes[i, k].plot(column, row, "+", color="#44dd88", markersize=9)
    bar = right.colorbar(shown, ax=similarity_axes, shrink=0.5, aspect=30)
    bar.ax.tick_params(labelsize=8)
    bar.set_label("cosine", fontsize=8)
    return left, right


def _grid(moments: list[Moment]) -> tuple[Figure, np.ndarray]:
    """A figure of axes, slices as rows; the first column shows the slices themselves."""
    slices = moments[-1].slices
    rows, columns = len(slices), len(moments) + 1
    figure = Figure(figsize=(1.9 * columns, 2.0 * rows + 0.3), layout="constrained")
    axes: np.ndarray = figure.subplots(rows, columns, squeeze=False)
    axis: Axes
    for axis in axes.ravel():
        axis.set_axis_off()
    axes[0, 0].set_title("slice", fontsize=9)
    for i, image in enumerate(slices):
        axes[i, 0].imshow(image, cmap="gray", vmin=WINDOW_HU[0], vmax=WINDOW_HU[1])
    for k, moment in enumerate(moments, start=1):
        axes[0, k].set_title(f"step {moment.step}", fontsize=9)
    return figure, axes


def _place(image: np.ndarray, grid: tuple[int, ...]) -> tuple[int, int]:
    """The patch nearest to the middle of the body."""
    body = np.argwhere(image > _BODY_HU)
    middle = body.mean(0) if len(body) else np.array(image.shape) / 2
    row, column = (middle * np.array(grid) / np.array(image.shape)).astype(int)
    return min(int(row), grid[0] - 1), min(int(column), grid[1] - 1)
