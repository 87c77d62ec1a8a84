"""MedDINOv3 for stock nnU-Net: a plug-in, a pretraining module, a benchmark kit."""

__version__ = "0.1.0"
