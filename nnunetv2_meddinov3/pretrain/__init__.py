"""Self-supervised pretraining of a DINOv3 backbone on CT volumes; knows nothing of nnU-Net."""
