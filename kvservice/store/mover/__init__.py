"""Moves copies between tiers: eviction, promotion and write-behind."""
