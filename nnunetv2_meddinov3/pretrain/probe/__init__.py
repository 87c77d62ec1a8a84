"""Probes of frozen features on labelled slices: k-NN, linear, and linear segmentation."""
