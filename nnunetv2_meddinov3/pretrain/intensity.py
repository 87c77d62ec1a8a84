"""The intensity contracts: which values a network is trained on, and that a store has them.

CT in HU has one contract; all other values are normalised by their volume's percentiles and have
another. A run uses those of the kinds of slices it trains on.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.models.contracts import HU, NORMALISED, contracts_of
from nnunetv2_meddinov3.pretrain.config import KINDS, Contract, Intensity, StageConfig
from nnunetv2_meddinov3.store.reader import SliceStore

_KIND_OF = {"CT": "hu", "MR": "mr", "unknown": "unknown"}  # of a modality; others are "other"
_BY_THEMSELVES = ("hu", "mr", "other")  # kinds that a run takes without being told
_SAMPLED = 32  # slices that are looked at to say what a contract clips
_MOST = 0.5


def intensity_of(config: StageConfig) -> dict[str, Any]:
    """Return the contract of a run, as its checkpoints state it.

    Returns:
        ``unit``, ``clip``, ``mean``, ``std`` and ``values``, the kinds of slices; a run on CT and
        on other values has the contract of these under ``others``.
    """
    contracts = []
    for unit in (HU, NORMALISED):
        kinds = [kind for kind in _kinds(config) if unit_of(kind, config.intensity) == unit]
        if kinds:
            contract = contract_in(unit, config.intensity)
            contracts.append(
                {
                    "unit": unit,
                    "clip": [float(v) for v in contract.clip],
                    "mean": float(contract.mean),
                    "std": float(contract.std),
                    "values": sorted(kinds),
                }
            )
    first, *others = contracts
    return {**first, **({"others": others} if others else {})}


def contract_in(unit: str, intensity: Intensity) -> Contract:
    """Return the contract of a unit, that of HU where a run takes all numbers for HU."""
    return intensity.hu if unit == HU or intensity.normalised is None else intensity.normalised


def unit_of(kind: str, intensity: Intensity) -> str:
    """Return the unit in which a run takes slices of a kind."""
    return HU if kind == "hu" or intensity.normalised is None else NORMALISED


def _kinds(config: StageConfig) -> list[str]:
    return list(config.data.modalities or ["hu"])


def check_same_contract(metadata: dict[str, Any], config: StageConfig, where: str) -> None:
    """Refuse weights that were trained under another contract for the same unit than the config's.

    Weights that have seen no values of a unit, as those of a CT run on MR, have no contract for it.

    Args:
        metadata: Of one of our checkpoints; weights that state no contract pass.
        config: Of the stage.
        where: What to call the weights.

    Raises:
        UserError: If clip, mean or standard deviation differ.
    """
    stated = contracts_of(metadata.get("intensity"))
    for unit, ours in contracts_of(intensity_of(config)).items():
        theirs = stated.get(unit, ours)
        for name in ("clip", "mean", "std"):
            if not np.allclose(theirs[name], ours[name], rtol=1e-6):
                said = f"{theirs[name]}{' HU' if unit == HU else ''}"
                raise UserError(
                    "a stage must keep the intensity contract of the weights it starts from, but "
                    f"{where} was trained with {name} {said} and the config says {ours[name]}: "
                    f"set intensity.{unit.lower()} to the same values."
                )


def with_kinds(config: StageConfig, store: SliceStore, rows: np.ndarray) -> StageConfig:
    """Return a config that states the kinds of slices that it trains on.

    Args:
        config: Of the stage; it is left as it is.
        store: The store.
        rows: Numbers of the rows that are trained on.
    """
    if config.data.modalities is not None:
        return config
    kinds = sorted(set(kinds_of(store)[rows].tolist())) or None
    data = config.data.model_copy(update={"modalities": kinds})
    return config.model_copy(update={"data": data})


def kinds_of(store: SliceStore) -> np.ndarray:
    """Return the kind of each row, one of ``KINDS``."""
    modality = store.rows["modality"].combine_chunks().dictionary_encode()
    names = [_KIND_OF.get(name, "other") for name in modality.dictionary.to_pylist()]
    kinds = np.array([*names, "unknown"])[modality.indices.to_numpy()]
    return np.where(store.rows["windowed"].to_numpy(), "windowed", kinds)


def rows_of_kinds(store: SliceStore, rows: np.ndarray, config: StageConfig) -> np.ndarray:
    """Return the rows of the kinds that a config names, or of the one that a store holds.

    Raises:
        UserError: If the config names none and the store holds several, or one that must be named;
            or if the store holds none of those that are named.
    """
    if not len(rows):
        return rows
    kinds = kinds_of(store)[rows]
    found = dict(
        zip(*(each.tolist() for each in np.unique(kinds, return_counts=True)), strict=True)
    )
    wanted = config.data.modalities
    if wanted is None:
        if len(found) == 1 and set(found) <= set(_BY_THEMSELVES):
            return rows
        raise _ask(store, found)
    kept = rows[np.isin(kinds, wanted)]
    if not len(kept):
        raise UserError(
            f"data.modalities=[{','.join(wanted)}] must name what the store holds, but "
            f"{store.path} holds {_listed(found)}: name these, or give another store."
        )
    return kept


def _ask(store: SliceStore, found: dict[str, int]) -> UserError:
    """Return the sentence on a store of which nobody said what is to be trained on."""
    first = next((kind for kind in _BY_THEMSELVES if kind in found), None)
    others = {kind: number for kind, number in found.items() if kind != first}
    everything = ",".join(filter(None, [first, *others]))
    if first is None:
        return UserError(
            f"{store.path} holds {sum(found.values())} slices, {_listed(found)}, which are trained "
            f"on only when told: with 'data.modalities=[{everything}]' they are, normalised by "
            "their volumes' percentiles."
        )
    return UserError(
        f"a run is on {KINDS[first]} alone unless told otherwise, but {store.path} holds "
        f"{sum(found.values())} slices, {_listed(others)} beside {found[first]} of "
        f"{KINDS[first]}: train on these with 'data.modalities=[{first}]', or on all, each kind by "
        f"its own contract, with 'data.modalities=[{everything}]'."
    )


def _listed(found: dict[str, int]) -> str:
    return " and ".join(f"{number} of {KINDS[kind]}" for kind, number in sorted(found.items()))


def check_store(store: SliceStore, rows: np.ndarray, config: StageConfig) -> None:
    """Refuse a store that cannot be trained on.

    Args:
        store: The store.
        rows: Numbers of the rows that would be read.
        config: Of the stage.

    Raises:
        UserError: If it is empty, of a single volume, smaller than a group of images, or holds
            values that are not HU and does not say what they mean.
    """
    if len(rows) == 0:
        raise UserError(
            f"the store {store.path} must hold slices, but it is empty: curate volumes into it "
            "(`meddinov3 curate`); its report.html says what was left out and why."
        )
    volumes = len(store.rows["volume_id"].take(rows).unique())
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
    if config.intensity.normalised is not None:
        _check_ends(store, rows)


def _check_ends(store: SliceStore, rows: np.ndarray) -> None:
    """Refuse slices of other values than HU without the ends of their volume's range."""
    other = rows[kinds_of(store)[rows] != "hu"]
    low, high = (
        store.rows[f"intensity_stored_{end}"].take(other).to_numpy().astype(float)
        for end in ("low", "high")
    )
    if number := int(np.count_nonzero(~(high > low))):
        raise UserError(
            f"values that are not HU must come with the percentiles of their volume, but {number} "
            f"slices of {store.path} do not: curate these volumes again into a new store."
        )


class Usage(NamedTuple):
    """What a contract makes of the slices of a run.

    Attributes:
        unit: Of the contract.
        slices: Number of the run's slices in it.
        low: Share of the pixels of a sample that are clipped at the lower end.
        high: Share of those clipped at the upper end.
        mean: Of the normalised pixels.
        std: Of the normalised pixels.
    """

    unit: str
    slices: int
    low: float
    high: float
    mean: float
    std: float


def usage(store: SliceStore, rows: np.ndarray, config: StageConfig) -> list[Usage]:
    """Return for each unit of a run how much of its contract's range some slices use.

    Raises:
        UserError: If a slice cannot be read.
    """
    intensity, out = config.intensity, []
    kinds = kinds_of(store)[rows]
    units = np.array([unit_of(kind, intensity) for kind in kinds.tolist()])
    for unit in (HU, NORMALISED):
        own = rows[units == unit]
        if not len(own):
            continue
        contract = contract_in(unit, intensity)
        places = np.unique(np.linspace(0, len(own) - 1, _SAMPLED).round().astype(int))
        pixels = np.concatenate([_in_unit(store, int(row), unit).ravel() for row in own[places]])
        low, high = contract.clip
        x = (np.clip(pixels, low, high) - contract.mean) / contract.std
        ends = float((pixels < low).mean()), float((pixels > high).mean())
        out.append(Usage(unit, len(own), *ends, float(x.mean()), float(x.std())))
    return out


def _in_unit(store: SliceStore, row: int, unit: str) -> np.ndarray:
    image, ends = store.image(row).astype(np.float64), store.ends(row)
    return image if unit == HU or ends is None else (image - ends[0]) / (ends[1] - ends[0])


def said_of_values(store: SliceStore, rows: np.ndarray, config: StageConfig) -> list[str]:
    """Return lines on what a run is trained on, and a warning where most of it is clipped."""
    lines = []
    for unit, slices, low, high, mean, std in usage(store, rows, config):
        clip = contract_in(unit, config.intensity).clip
        kinds = [KINDS[kind] for kind in _kinds(config) if unit_of(kind, config.intensity) == unit]
        what = " and ".join(kinds) + ("" if unit == HU else ", normalised by volume")
        lines.append(
            f"stage {config.stage}: {slices} slices of {what}; of a sample {low:.1%} of the pixels "
            f"are clipped at {clip[0]:g} and {high:.1%} at {clip[1]:g}, mean {mean:.2f} and "
            f"standard deviation {std:.2f} reach the network"
        )
        # air of a CT lies at the lower end or below it, and may be most of a slice
        if (high if unit == HU else low + high) > _MOST:
            lines.append(
                f"stage {config.stage}: most values are clipped: set intensity.{unit.lower()}.clip "
                "to their range, or curate them again with --modality if they are not HU"
            )
    return lines
