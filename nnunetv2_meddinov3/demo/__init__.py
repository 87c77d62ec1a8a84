"""``meddinov3 demo``: trains, predicts and reports on a synthetic CT."""
