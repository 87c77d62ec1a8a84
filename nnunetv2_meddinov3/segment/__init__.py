"""Using a trained model: from a scan and a model's folder or zip to label maps."""
