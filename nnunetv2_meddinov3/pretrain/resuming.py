"""Going on from a checkpoint: what must be the same, and what is taken from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.pretrain.config import StageConfig, differences, from_yaml
from nnunetv2_meddinov3.pretrain.runtime import Runtime
from nnunetv2_meddinov3.store.reader import SliceStore


@dataclass(frozen=True)
class Resumed:
    """What a stage takes from its last checkpoint.

    Attributes:
        step: Steps that are done.
        model: Every parameter and buffer by name.
        optimizer: State of AdamW by parameter name.
        refreshes: How often the Gram teacher was renewed.
        bad_in_a_row: Steps skipped just before.
        rng: Of torch, for this rank; None where the number of ranks changed. Nothing in training
            draws from it: every draw comes from seed, step and place.
    """

    step: int
    model: dict[str, Any]
    optimizer: dict[str, Any]
    refreshes: int
    bad_in_a_row: int
    rng: torch.Tensor | None

    @classmethod
    def of(cls, state: dict[str, Any], runtime: Runtime) -> Resumed:
        """Take apart what ``Stage.state`` returned."""
        same = state["world_size"] == runtime.world_size
        return cls(
            step=state["step"],
            model=state["model"],
            optimizer=state["optimizer"],
            refreshes=state["gram_refreshes"],
            bad_in_a_row=state["bad_in_a_row"],
            rng=state["rng"][runtime.rank] if same else None,
        )


def store_facts(store: SliceStore, rows: np.ndarray) -> dict[str, Any]:
    """Return what a checkpoint says of the slices it was trained on.

    Returns:
        ``records_sha256`` of the store, number of ``slices``, median in-plane ``spacing_mm`` (y, x)
        or None where unknown.
    """
    taken = store.rows.select(["spacing_y", "spacing_x"]).take(rows)
    medians = [pc.approximate_median(taken[name]).as_py() for name in taken.column_names]
    return {
        "records_sha256": store.records_sha256,
        "slices": len(rows),
        "spacing_mm": None if None in medians else medians,
    }


def check_same_run(
    state: dict[str, Any],
    config: StageConfig,
    store: dict[str, Any],
    path: Path,
    runtime: Runtime,
) -> None:
    """Refuse to go on with another config or other slices than the checkpoint's.

    Raises:
        UserError: If anything that changes results differs.
    """
    folder = path.parents[2]
    changed = differences(from_yaml(state["config"]), config)
    if changed:
        raise UserError(
            f"{folder} must be continued with the config it was started with, but "
            f"{'; '.join(changed[:3])}: give the same values, or another --out."
        )
    if state["store"]["records_sha256"] != store["records_sha256"]:
        raise UserError(
            f"{folder} must be continued on the slices it was started on, but the store now holds "
            f"others ({state['store']['slices']} before, {store['slices']} now): give the same "
            "store, or another --out."
        )
