"""One module an engine. Each imports its engine's package, and no other module does."""
