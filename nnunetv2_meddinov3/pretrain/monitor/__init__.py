"""Watching a run: rows of numbers, figures of health in words, maps of features, a report."""
