"""The rules of storing, lookups, leases, moves and drops, and their order.

Everything here runs on one event loop thread; bytes are read, written, copied and hashed on
threads. Start with ``store``, which puts the parts together, ``transfers`` for saves and loads,
``mover`` for copies between tiers, ``block_lifecycle`` for the order of bytes and records.
"""
