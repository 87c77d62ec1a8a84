"""Which number format a GPU trains in."""

import torch


def gpu_has_bf16() -> bool:
    """Return whether the visible GPU computes bf16 natively (Ampere and later, or ROCm)."""
    if not torch.cuda.is_available():
        return False
    return bool(torch.version.hip) or torch.cuda.get_device_capability()[0] >= 8
