"""The rules: what is stored, found, leased, moved and dropped, and in which order.

Everything here runs on one event loop thread; bytes are read, written, copied and hashed on
threads. Start with ``store`` for what the daemon offers, ``transfers`` for saves and loads,
``mover`` for copies between tiers, ``block_lifecycle`` for the order of bytes and records.
"""
