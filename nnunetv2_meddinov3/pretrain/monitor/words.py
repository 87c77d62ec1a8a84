"""What the numbers of a run are called where people read them, without the libraries that draw."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nnunetv2_meddinov3.curves import Panels

_WHO = ("student", "teacher")
LOSSES: Panels = {
    "total loss": {"loss_total": "total"},
    "DINO loss": {"loss_dino_local": "local crops", "loss_dino_global": "global crops"},
    "iBOT loss": {"loss_ibot": "iBOT"},
    "KoLeo loss, mean over crops": {"loss_koleo": "KoLeo"},
    "SIGReg loss, mean over crops": {"loss_sigreg": "SIGReg"},
    "Gram loss": {"loss_gram": "Gram"},
    "learning rate": {"lr": "learning rate"},
    "gradient norm before clipping": {
        "grad_backbone": "backbone",
        "grad_dino_head": "DINO head",
        "grad_ibot_head": "iBOT head",
    },
    "images per second": {"images_per_second": "images per second"},
    "waiting for data, % of the time": {"data_wait_percent": "waiting"},
}
HEALTH_PANELS: Panels = {
    "effective rank of cls tokens": {f"cls_rank_{who}": who for who in _WHO},
    "effective rank of patch tokens": {f"patch_rank_{who}": who for who in _WHO},
    "mean cosine between cls tokens": {f"cls_similarity_{who}": who for who in _WHO},
    "entropy of targets / ln K": {
        "cls_target_entropy_share": "cls tokens",
        "patch_target_entropy_share": "patch tokens",
    },
    "prototypes used, share": {"prototypes_used": "prototypes"},
    "drift of patch similarities": {"gram_drift": "drift"},
    "relative change of weights": {"update": "change"},
}
PROBES: Panels = {
    "k-NN on slices, mAP": {"knn": "k-NN", "blind_knn": "blind guess"},
    "linear probe on slices, mAP": {"linear": "linear", "blind_linear": "blind guess"},
    "linear segmentation, Dice": {"dense": "segmentation", "blind_dense": "blind guess"},
}


def name_of(key: str) -> str:
    """Return what a number of a run is called, such as "effective rank of cls tokens, teacher".

    Args:
        key: Of a row of metrics, health or probes.
    """
    for panels in (LOSSES, HEALTH_PANELS, PROBES):
        for title, series in panels.items():
            if key in series:
                return f"{title}, {series[key]}" if len(series) > 1 else title
    return key.replace("_", " ")
