"""Figures of scores: a dot and an interval for each label and method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure  # not pyplot: no display, no global state

from nnunetv2_meddinov3.curves import png
from nnunetv2_meddinov3.evaluation.dice import DiceTable, mean_dice
from nnunetv2_meddinov3.evaluation.statistics import Interval

TITLES = {
    "dice": "Dice",
    "nsd_voxel": "NSD, boundary voxels",
    "nsd_surface": "NSD, boundary area",
    "hd95": "HD95",
    "volume_error": "relative error of the volume",
}


def case_plot(table: DiceTable) -> bytes:
    """Draw the Dice of every case as a dot and its mean as a line, one row a label.

    Args:
        table: Case -> label -> Dice; NaN is not drawn.

    Returns:
        A PNG.
    """
    means = mean_dice(table)
    figure = Figure(
        figsize=(7.5, max(2.2, 0.9 + 0.32 * len(means))), layout="constrained", facecolor="white"
    )
    axis = figure.subplots()
    # beside each other where many have one value; the same dots in every drawing
    aside = np.random.default_rng(0).uniform(-0.22, 0.22, len(table))
    for at, label in enumerate(means):
        found = np.array([row[label] for row in table.values()])
        axis.plot(found, at + aside, "o", ms=4, alpha=0.5, color="#4477aa", mew=0)
        axis.plot([means[label]] * 2, [at - 0.35, at + 0.35], color="#222222", lw=2)
    axis.set_yticks(range(len(means)), list(means))
    axis.set_ylim(len(means) - 0.5, -0.5)
    axis.set_xlabel("Dice of each case (dots) and their mean (line)")
    axis.set_xlim(-0.02, 1.02)
    axis.grid(axis="x", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    return png(figure)


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
    return png(figure)
