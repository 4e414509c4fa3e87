"""One module per engine. Each imports its engine's package, and no other module does."""
