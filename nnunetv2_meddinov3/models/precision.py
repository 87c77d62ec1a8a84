"""Which number format a device trains in."""

import torch


def has_bf16(device: torch.device | None = None) -> bool:
    """Return whether a device computes bf16 natively: GPUs from Ampere on, and ROCm's.

    Args:
        device: Where the training runs, False for anything but a GPU; by default the visible GPU.
    """
    if not torch.cuda.is_available() or (device is not None and device.type != "cuda"):
        return False
    return bool(torch.version.hip) or torch.cuda.get_device_capability(device)[0] >= 8
