"""Moves copies between tiers: makes room, copies up, copies down."""
