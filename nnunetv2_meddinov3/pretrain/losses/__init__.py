"""The losses of DINOv3-style pretraining and the targets they compare with.

All are computed in fp32 whatever they are given; bf16 loses the small differences they live on.
"""

from nnunetv2_meddinov3.pretrain.losses.cross_entropy import DINOLoss, IBOTLoss
from nnunetv2_meddinov3.pretrain.losses.gram import GramLoss
from nnunetv2_meddinov3.pretrain.losses.koleo import KoLeoLoss
from nnunetv2_meddinov3.pretrain.losses.sigreg import SIGRegLoss
from nnunetv2_meddinov3.pretrain.losses.sinkhorn import sinkhorn_knopp

__all__ = ["DINOLoss", "GramLoss", "IBOTLoss", "KoLeoLoss", "SIGRegLoss", "sinkhorn_knopp"]
