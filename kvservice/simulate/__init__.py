"""Runs placement policies, the very classes of `kvservice.policy`, on traces and generated load."""
