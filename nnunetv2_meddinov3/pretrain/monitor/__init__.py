"""Monitoring of a run: rows of numbers, health in words, feature maps, a report."""
