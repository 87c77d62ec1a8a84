"""Volumes of any format to a store of slices."""
