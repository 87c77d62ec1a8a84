"""Data for pretraining: from volumes as they are stored to a store of axial slices."""
