"""Which items leave a tier first, and which are read ahead: the placement core, and the daemon's blocks as items."""
