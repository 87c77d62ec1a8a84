"""The fillers with which numbers of the original were recorded."""

import numpy as np
import torch

from nnunetv2_meddinov3.pretrain.optim import meta_name


def sine(shape, a, b):
    """The filler of the recorded numbers: flat sin(a * i + b)."""
    n = int(np.prod(shape))
    values = np.sin(a * np.arange(n, dtype=np.float64) + b).astype(np.float32)
    return torch.from_numpy(values).view(shape)


def fill(module, phase, scale, is_gated=False):
    """Give every parameter, in the order of Meta's names, the recorded filler's values."""
    named = {}
    for name, parameter in module.named_parameters():
        named.setdefault(meta_name(name, is_gated), []).append(parameter)
    with torch.no_grad():
        for j, name in enumerate(sorted(named)):
            parts = named[name]
            sizes = [p.numel() for p in parts]
            if name.endswith("qkv.bias"):  # ours has no bias of keys
                sizes = [sizes[0], sizes[0], sizes[1]]
            values = scale * np.sin(0.37 * np.arange(sum(sizes)) + 1 + j + phase)
            if name.endswith("weight") and "norm" in name:
                values = 1 + values
            elif name.endswith("gamma"):
                values = 0.5 + values
            chunks = np.split(values, np.cumsum(sizes)[:-1])
            chunks = [chunks[0], chunks[2]] if len(chunks) == 3 else chunks
            for parameter, chunk in zip(parts, chunks, strict=True):
                parameter.copy_(torch.from_numpy(chunk).float().view(parameter.shape))
    return module
