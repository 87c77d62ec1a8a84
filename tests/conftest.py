"""Shared by all tests: torch first, and the processor path on which the goldens were recorded."""

import os

# tests/golden was recorded with AVX2 kernels. Other instruction sets round differently, which the
# two-channel LayerNorm at the end of net_single_scale amplifies beyond its tolerance.
for _name, _value in {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}.items():
    os.environ.setdefault(_name, _value)

import torch  # noqa: E402

torch.manual_seed(0)
