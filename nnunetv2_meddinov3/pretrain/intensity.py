"""The intensity contract: which values a network is trained on, and that a store has them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.pretrain.config import KINDS, StageConfig
from nnunetv2_meddinov3.store.reader import SliceStore


def intensity_of(config: StageConfig) -> dict[str, Any]:
    """Return the contract of a run, as its checkpoints state it."""
    intensity = config.intensity
    return {
        "unit": "HU",
        "clip": [float(v) for v in intensity.clip_hu],
        "mean": float(intensity.mean_hu),
        "std": float(intensity.std_hu),
        "values": sorted(config.data.modalities),
    }


def check_same_contract(metadata: dict[str, Any], config: StageConfig, where: str) -> None:
    """Refuse weights that were trained under another contract than the config's.

    Args:
        metadata: Of one of our checkpoints; weights that state no contract pass.
        config: Of the stage.
        where: What to call the weights.

    Raises:
        UserError: If clip, mean or standard deviation differ.
    """
    theirs, ours = metadata.get("intensity"), intensity_of(config)
    if not theirs:
        return
    for name in ("clip", "mean", "std"):
        if not np.allclose(theirs[name], ours[name], rtol=1e-6):
            raise UserError(
                "a stage must keep the intensity contract of the weights it starts from, but "
                f"{where} was trained with {name} {theirs[name]} HU and the config says "
                f"{ours[name]}: set intensity to the same values."
            )


def check_store(store: SliceStore, rows: np.ndarray, config: StageConfig) -> None:
    """Refuse a store that cannot be trained on.

    Args:
        store: The store.
        rows: Numbers of the rows that would be read.
        config: Of the stage.

    Raises:
        UserError: If it is empty, of a single volume, smaller than a group of images, or holds
            values of a kind that the config does not name.
    """
    if len(rows) == 0:
        raise UserError(
            f"the store {store.path} must hold slices, but it is empty: curate volumes into it "
            "(`meddinov3 curate`); its report.html says what was left out and why."
        )
    table = store.rows.select(["volume_id", "modality", "windowed"]).take(rows)
    volumes = len(table["volume_id"].unique())
    if volumes < 2:
        raise UserError(
            f"pretraining compares slices of different volumes, but {store.path} holds a single "
            "volume: curate more volumes into it."
        )
    group = config.losses.koleo_group
    if len(rows) < group:
        raise UserError(
            f"losses.koleo_group={group} needs at least {group} slices, but {store.path} holds "
            f"{len(rows)}: curate more volumes, or make the group smaller."
        )
    counted = table.group_by(["modality", "windowed"]).aggregate([([], "count_all")])
    kinds: Counter[str] = Counter()
    for each in counted.to_pylist():
        kinds[_kind(each["modality"], each["windowed"])] += each["count_all"]
    foreign = {kind: count for kind, count in kinds.items() if kind not in config.data.modalities}
    if foreign:
        named = " and ".join(f"{n} of {KINDS[kind]}" for kind, n in sorted(foreign.items()))
        wanted = ",".join([*config.data.modalities, *sorted(foreign)])
        raise UserError(
            "the intensity contract of this run is "
            f"{' and '.join(KINDS[k] for k in config.data.modalities)}, but {store.path} holds "
            f"{len(rows)} slices, {named}: curate these into another store, or train on them too "
            f"with 'data.modalities=[{wanted}]'."
        )


def _kind(modality: str, windowed: bool) -> str:
    if windowed:
        return "windowed"
    return {"CT": "hu", "MR": "mr"}.get(modality, "unknown")
