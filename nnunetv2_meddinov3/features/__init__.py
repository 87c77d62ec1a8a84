"""Looking inside: what a backbone makes of the slices of a scan."""
