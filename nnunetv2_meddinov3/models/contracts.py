"""The intensity contracts that a checkpoint states in its metadata."""

from __future__ import annotations

from typing import Any

HU, NORMALISED = "HU", "normalised"


def contracts_of(stated: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Return unit -> contract (``clip``, ``mean``, ``std``) of what a checkpoint states.

    Args:
        stated: ``metadata["intensity"]``: a contract, and those of other units under ``others``.
            One without a unit, as earlier versions wrote it, is in HU.
    """
    if not stated:
        return {}
    contracts = [stated, *stated.get("others", [])]
    return {each.get("unit", HU): each for each in contracts if "clip" in each}
