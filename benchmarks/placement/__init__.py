"""Placement in a real daemon, against the simulator's prediction for the same load.

``python -m benchmarks.placement`` starts a daemon with small tiers and a real SSD file for each run, plays
conversations on it in real time, and simulates the same turns on a machine with the daemon's sizes and rates.
"""
