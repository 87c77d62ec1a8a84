"""Numbers over steps or epochs as small panels beside each other, and the same in words."""

from __future__ import annotations

import io
import math
from typing import Any

from matplotlib.figure import Figure  # not pyplot: no display, no global state

from nnunetv2_meddinov3.html import Block, Picture, Text

_COLUMNS = 3  # panels beside each other
_COLOURS = {"student": "#4477aa", "teacher": "#cc6677", "blind guess": "#999999"}

Rows = list[dict[str, Any]]
Panels = dict[str, dict[str, str]]  # title -> key in a row -> its name in the legend


def curves(rows: Rows, panels: Panels, over: str = "step") -> Block:
    """Return a picture of curves, or a sentence where there are none.

    Args:
        rows: With ``over``; a key may be missing, None or NaN in any.
        panels: What is drawn in each; what no row has is left out.
        over: Key of the horizontal axis, and its name.
    """
    panels = {
        title: known
        for title, series in panels.items()
        if (known := {k: name for k, name in series.items() if _points(rows, k, over)})
    }
    if not panels:
        return Text("None yet.")
    return Picture(png(draw_curves(rows, panels, over)), _in_words(rows, panels, over))


def draw_curves(rows: Rows, panels: Panels, over: str = "step") -> Figure:
    """Draw numbers over steps.

    Args:
        rows: With ``over``.
        panels: What is drawn in each; every key has a number in some row.
        over: Key of the horizontal axis, and its name.
    """
    lines = -(-len(panels) // _COLUMNS)
    figure = Figure(figsize=(4 * _COLUMNS, 2.6 * lines), layout="constrained")
    axes = figure.subplots(lines, _COLUMNS, squeeze=False).ravel()
    for axis, (title, series) in zip(axes, panels.items(), strict=False):
        for key, name in series.items():
            steps, values = zip(*_points(rows, key, over), strict=True)
            mark = "." if len(steps) == 1 else None  # a line of one point cannot be seen
            axis.plot(
                steps, values, label=name, color=_COLOURS.get(name), linewidth=1.2, marker=mark
            )
        axis.set_title(title, fontsize=10, loc="left")
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if len(series) > 1:
            axis.legend(fontsize=7, frameon=False)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis in axes[max(0, len(panels) - _COLUMNS) : len(panels)]:
        axis.set_xlabel(over, fontsize=8)
    return figure


def png(figure: Figure) -> bytes:
    """Return a figure as the bytes of a PNG."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return data.getvalue()


def _in_words(rows: Rows, panels: Panels, over: str) -> str:
    """What curves show, for those who cannot see them: where each begins and ends."""
    parts = []
    for title, series in panels.items():
        ends = []
        for key, name in series.items():
            points = _points(rows, key, over)
            which = f"{name} " if len(series) > 1 else ""
            ends.append(f"{which}from {points[0][1]:.4g} to {points[-1][1]:.4g}")
        parts.append(f"{title}: {', '.join(ends)}")
    ends_of_all = f"from {over} {rows[0][over]} to {rows[-1][over]}"
    return f"Curves {ends_of_all}: {'; '.join(parts)}."


def _points(rows: Rows, key: str, over: str) -> list[tuple[int, float]]:
    found = ((row[over], row.get(key)) for row in rows)
    return [(at, value) for at, value in found if value is not None and not math.isnan(value)]
