"""Backbones, the segmenter, and every checkpoint format in and out.

The public names load lazily, so that commands which only look at files start fast.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nnunetv2_meddinov3.models.build import build_segmenter, load_backbone, save_backbone

__all__ = ["build_segmenter", "load_backbone", "save_backbone"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from nnunetv2_meddinov3.models import build

    return getattr(build, name)
