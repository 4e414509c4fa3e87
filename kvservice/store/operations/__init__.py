"""What operators ask for: explain, pin, drain, scrub, and what was requested."""
