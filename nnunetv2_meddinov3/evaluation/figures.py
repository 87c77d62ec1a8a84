"""Figures of scores: a dot and an interval for each label and method."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure  # not pyplot: no display, no global state

from nnunetv2_meddinov3.evaluation.statistics import Interval

TITLES = {
    "dice": "Dice",
    "nsd_voxel": "NSD, boundary voxels",
    "nsd_surface": "NSD, boundary area",
    "hd95": "HD95",
    "volume_error": "relative error of the volume",
}


def label_plot(
    methods: Mapping[str, Mapping[str, Interval]], labels: Sequence[str], metric: str
) -> bytes:
    """Draw the mean and 95 % interval of each label, one colour a method.

    Args:
        methods: Method -> label -> mean and interval.
        labels: From top to bottom.
        metric: Which, for the title and the limits of the axis.

    Returns:
        A PNG.
    """
    step = 0.8 / len(methods)
    height = max(2.2, 0.9 + len(labels) * max(0.32, 0.2 * len(methods)))
    figure = Figure(figsize=(7.5, height), layout="constrained", facecolor="white")
    axis = figure.subplots()
    for number, (method, found) in enumerate(methods.items()):
        known = [(at, found[label]) for at, label in enumerate(labels) if label in found]
        places = [at + (number - (len(methods) - 1) / 2) * step for at, _ in known]
        means = [i.mean for _, i in known]
        sides = [[i.mean - i.low for _, i in known], [i.high - i.mean for _, i in known]]
        # ten colours; further methods have them again with another mark
        mark = "osD^v"[number // 10 % 5]
        axis.errorbar(
            means, places, xerr=sides, fmt=mark, ms=4, lw=1.3, capsize=2, label=method or None
        )
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.set_xlabel(f"{TITLES[metric]}, mean over patients with 95 % interval")
    if metric in ("dice", "nsd_voxel", "nsd_surface"):
        axis.set_xlim(-0.02, 1.02)
    axis.grid(axis="x", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    if len(methods) > 1:
        figure.legend(loc="outside lower center", ncols=min(3, len(methods)), frameon=False)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()
