"""Storage media: bytes and space. A tier does not know keys, recency or other tiers."""
