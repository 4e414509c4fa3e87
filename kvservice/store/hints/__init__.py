"""Hints of engines: their queues, what the daemon does about them, and the readiness of each queued request."""
