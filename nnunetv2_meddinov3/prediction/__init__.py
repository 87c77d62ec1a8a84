"""Prediction for 2D configurations, faster than nnU-Net's own and with the same labels."""
