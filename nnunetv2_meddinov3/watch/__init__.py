"""Runs while they go: pretraining and fine-tuning in a terminal, from the files they write."""
