"""Which blocks leave a tier first, and which are read ahead: policies over items, for the daemon's blocks."""
