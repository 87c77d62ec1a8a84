"""One reader for each kind of input."""
