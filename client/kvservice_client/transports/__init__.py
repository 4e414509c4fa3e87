"""The transports of bytes between client and daemon. One file per transport; ``base`` has the interface."""
