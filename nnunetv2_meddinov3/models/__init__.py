"""Backbones, the segmenter, and every checkpoint format in and out.

The public names load lazily, so that commands which only look at files start fast.
"""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "build_segmenter": "nnunetv2_meddinov3.models.build",
    "load_backbone": "nnunetv2_meddinov3.models.build",
    "save_backbone": "nnunetv2_meddinov3.models.build",
}
__all__ = ["build_segmenter", "load_backbone", "save_backbone"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
