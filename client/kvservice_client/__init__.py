"""The client of KVService: finds, loads and saves KV blocks from within an engine's process.

    client = Client("127.0.0.1:7070", name="my-engine")
    blocks = client.open_layout(layout)
    chain = block_chain(layout, token_ids)

    with blocks.lookup(chain) as lease:               # the load path: lookup, then layer by layer
        if lease.hit_blocks:
            for layer in lease.load():
                ...                                   # layer.index, layer.data

    blocks.save(chain[lease.hit_blocks:], layers)     # the save path

Load path: ``block_cache`` -> ``lease`` -> ``transports/shm`` or ``transports/grpc``. Save path:
``block_cache`` -> the same. ``lease.view()`` gives blocks in place, without a copy. Everything that
can go wrong is a ``KVError``, and means: recompute.
"""

from kvservice_api.errors import KVError
from kvservice_api.keys import BlockChain, ChainBuilder, block_chain
from kvservice_api.layout import LayerGroup, Layout, Rotary, Shard
from kvservice_client.admin import Admin, Tier
from kvservice_client.arena_map import ArenaObserver
from kvservice_client.block_cache import BlockCache
from kvservice_client.client import DEFAULT_ADDRESS, Client, EvictResult, PrefetchResult
from kvservice_client.hints import EngineHints, QueuedRequest, Readiness, ReadyState
from kvservice_client.lease import Lease, LoadedLayer, ResidencyRun
from kvservice_client.local_directory import LocalHit
from kvservice_client.pending_lookup import FoundPrefix, PendingLookup
from kvservice_client.reports import Outcome, RequestReport
from kvservice_client.retry import Clock
from kvservice_client.session import Session, SessionHistory, SessionState, Slice
from kvservice_client.tls import TlsFiles
from kvservice_client.transports.base import Durability, SaveResult
from kvservice_client.transports.in_place import View
from kvservice_client.transports.ordered import Stats, TransportStats
from kvservice_client.transports.reservation import Reservation

__all__ = [
    "DEFAULT_ADDRESS",
    "Admin",
    "ArenaObserver",
    "BlockCache",
    "BlockChain",
    "ChainBuilder",
    "Client",
    "Clock",
    "Durability",
    "EngineHints",
    "EvictResult",
    "FoundPrefix",
    "KVError",
    "LayerGroup",
    "Layout",
    "Lease",
    "LoadedLayer",
    "LocalHit",
    "Outcome",
    "PendingLookup",
    "PrefetchResult",
    "QueuedRequest",
    "Readiness",
    "ReadyState",
    "RequestReport",
    "Reservation",
    "ResidencyRun",
    "Rotary",
    "SaveResult",
    "Session",
    "SessionHistory",
    "SessionState",
    "Shard",
    "Slice",
    "Stats",
    "Tier",
    "TlsFiles",
    "TransportStats",
    "View",
    "block_chain",
]
