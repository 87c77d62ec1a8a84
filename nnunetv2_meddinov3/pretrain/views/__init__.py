"""Views of one-channel slices in HU: crops, photometric changes, masks; batched in torch."""

from nnunetv2_meddinov3.pretrain.views.multicrop import Slices, make_views

__all__ = ["Slices", "make_views"]
