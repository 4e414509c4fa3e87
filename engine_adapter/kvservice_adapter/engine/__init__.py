"""What every connector needs, and no engine: what of a prompt is stored, its session, and the report of its request."""
