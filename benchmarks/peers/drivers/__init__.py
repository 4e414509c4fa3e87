"""One program per system, run by the Python of that system's environment: it starts the servers, and their clients.

The programs differ in the calls that put and get blocks (``loop.Client``). All else is shared: ``loop``.
"""
