"""Measures of the daemon's own parts: the disk, the SSD tier and the index."""
