"""The daemon: stores KV blocks in DRAM and on SSD, and loads them layer by layer.

Floors, each importing only from those below it: ``blocks clock config counters`` - ``tiers index
policy`` - ``store`` - ``rpc`` - ``metrics daemon __main__``. See ARCHITECTURE.md.
"""

__version__ = "0.1.0"
