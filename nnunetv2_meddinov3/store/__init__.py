"""The slice store: int16 slices in blosc2 arrays, one record per volume, one index."""
