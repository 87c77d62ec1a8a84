"""Recipes of comparisons: what is trained on what, run to the end, and the report of it."""
