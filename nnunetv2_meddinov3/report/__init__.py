"""Pages about trained models, made from their folders."""
