"""Repairs a store whose index is damaged or lost, for `kvservice check`. No daemon runs meanwhile."""
