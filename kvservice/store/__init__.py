"""The rules: what is stored, found, leased, moved and dropped, and in which order.

Everything here runs on one event loop thread; bytes are read, written, copied and hashed on
threads. Start with ``block_store`` for what the daemon offers, ``ingest`` for the save path,
``load`` for the load path, ``residency`` for the order of bytes and records.
"""
