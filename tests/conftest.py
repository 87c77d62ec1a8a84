"""Shared by all tests: torch first, and the processor path on which the goldens were recorded."""

import os

# tests/golden was recorded with AVX2 kernels. Other instruction sets round differently, which the
# two-channel LayerNorm at the end of net_single_scale amplifies beyond its tolerance.
for _name, _value in {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    # networks of this size gain nothing from threads and lose much where cores are shared
    "OMP_NUM_THREADS": "1",
}.items():
    os.environ.setdefault(_name, _value)

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(scope="session")
def released_file():
    """A function that writes a random ViT in the format of MedDINOv3's release, Meta's names."""
    return _write_released_file


def _write_released_file(path, size="vit_tiny", seed=0):
    from nnunetv2_meddinov3.models.architecture import architecture_of
    from nnunetv2_meddinov3.models.backbone import Backbone

    torch.manual_seed(seed)
    backbone = Backbone(architecture_of(size, qkv_bias=False, norm_eps=1e-6))
    renamed = {"vit.reg_token": "storage_tokens", "vit.rope.periods": "rope_embed.periods"}
    state = {"backbone.mask_token": torch.zeros(1, backbone.embed_dim)}
    for name, tensor in backbone.state_dict().items():
        key = renamed.get(name, name.removeprefix("vit."))
        key = key.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
        state[f"backbone.{key}"] = tensor
    state["dino_head.last_layer.weight"] = torch.zeros(8, 4)
    torch.save({"teacher": state}, path)
    return backbone
