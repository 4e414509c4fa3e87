"""Bytes and space. A tier knows no key, no recency, and no other tier."""
