"""The operators' verbs: explain, pin, drain and scrub; and the log of requests."""
